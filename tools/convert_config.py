#!/usr/bin/env python3
"""Write a configuration of MDistiller as one of d2distill, and say what has no place here.

python tools/convert_config.py mdistiller/configs/cifar100/dkd/res32x4_res8x4.yaml -o mine.yaml
python tools/convert_config.py detection/configs/DKD/DKD-R18-R101.yaml -o mine.yaml

The result is short: what differs from the recipe in its _BASE_, a configuration of d2distill. MDistiller's own defaults
hold where the file says nothing. KEY VALUE pairs replace settings of the file, by MDistiller's keys.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2
from d2distill.configs import find_config

_DEFAULTS = Path(__file__).with_name("mdistiller.yaml")
#: Shapes, which are taken from the networks here.
_SHAPES = ("INPUT_SIZE", "SHAPES", "OUT_SHAPES", "IN_CHANNELS", "OUT_CHANNELS", "STUDENT_DIM", "TEACHER_DIM")
#: What a file has to say, since it makes no other student.
_IF_GIVEN = ("DATASET.NUM_WORKERS", "DATASET.TEST.BATCH_SIZE")
#: Of a detector: what describes its networks is in the _BASE_, and in the zoo's configuration of the teacher.
_FROM_BASE = (
    "KD.TYPE", "TEACHER.", "VERSION", "INPUT.FORMAT", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "MODEL.PIXEL_",
    "MODEL.BACKBONE.", "MODEL.RESNETS.", "MODEL.MOBILENETV2.", "MODEL.FPN.IN_FEATURES",
)  # fmt: skip
_NOTES = {
    "LOG.WANDB": "loggers are chosen by LOGGERS, e.g. LOGGERS: [tensorboard, wandb]",
    "LOG.TENSORBOARD_FREQ": "steps are logged every LOG_PERIOD",
    "LOG.SAVE_CHECKPOINT_FREQ": "the newest SOLVER.CHECKPOINT_KEEP checkpoints and the best student stay",
}
_TEACHERS = {
    "cifar100": "download_ckpts/cifar_teachers/{}_vanilla/ckpt_epoch_240.pth",
    "tiny_imagenet": "download_ckpts/tiny_imagenet_teachers/{}_vanilla/ti_res18",
    "imagenet": "torchvision:{}_Weights.IMAGENET1K_V1",
}


def main() -> None:
    """``d2distill-convert-config``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("file", metavar="MDISTILLER.yaml")
    parser.add_argument("-o", "--output", metavar="FILE", help="(default: print it)")
    parser.add_settings()
    args = parser.parse_args()
    if not Path(args.file).is_file():
        raise FileNotFoundError(f"{args.file}: no such file")
    if len(args.opts) % 2:
        raise ConfigError(f"settings come as KEY VALUE pairs, but {args.opts[-1]} has no value")
    require_detectron2()
    from d2distill.common.config_node import load_yaml, overlay
    from d2distill.common.foreign import is_of_mdistiller

    settings = load_yaml(args.file)
    if not is_of_mdistiller(settings):
        raise ConfigError(f"{args.file} is no configuration of MDistiller: it has neither DISTILLER nor KD.TYPE")
    for key, value in zip(args.opts[::2], args.opts[1::2], strict=True):
        overlay(settings, _nested({key: yaml.safe_load(value)}))
    convert = convert_classifier if settings.keys() & {"DISTILLER", "EXPERIMENT"} else _convert_detector
    base, changed, notes = convert(settings)
    text = yaml.safe_dump({"_BASE_": base, **changed}, sort_keys=False, default_flow_style=None, width=110)
    text = "".join([f"# MDistiller's {Path(args.file).name}, by d2distill-convert-config.\n", text])
    text += "".join(f"# Not converted: {note}\n" for note in notes)
    if not args.output:
        print(text, end="")
        return
    if Path(args.output).exists():
        raise ConfigError(f"{args.output} exists: choose another name, or remove it")
    Path(args.output).write_text(text, encoding="utf-8")
    task = "cls" if convert is convert_classifier else "det"
    print(f"{args.output}: d2distill-train-{task} --config-file {args.output}")
    for note in notes:
        print(f"not converted: {note}", file=sys.stderr)


def convert_classifier(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """The name of the ``_BASE_``, what differs from it, and what was not converted, a line each.

    Raises:
        ConfigError: a data set or a method that d2distill has not, or a value that it refuses.
    """
    from d2distill.classification.config import get_cfg
    from d2distill.classification.data import DATASET_REGISTRY, dataset_info
    from d2distill.classification.models import model_names
    from d2distill.common.distillers import DISTILLERS
    from d2distill.common.foreign import our_key

    defaults, given = _flat(_defaults()[0]), _flat(settings)
    theirs = {**defaults, **given}
    kind, data = theirs["DISTILLER.TYPE"], theirs["DATASET.TYPE"]
    names = {name.upper(): name for name, _ in DISTILLERS}
    if kind not in (*names, "NONE"):
        raise ConfigError(f"DISTILLER.TYPE {kind}: d2distill has no such method; there are {', '.join(names.values())}")
    if data not in DATASET_REGISTRY:
        raise ConfigError(f"DATASET.TYPE {data}: d2distill has {', '.join(DATASET_REGISTRY.names())}")
    base = f"cls/base_{data}.yaml" if data in _TEACHERS else "cls/base_cifar100.yaml"
    cfg = get_cfg()
    cfg.merge_from_file(find_config(base))
    known, ours, notes = _flat(cfg), {}, []
    settings_of = {node: cfg.DISTILL[node] for node in names}
    for key, value in theirs.items():
        node, target = key.partition(".")[0], our_key(key, settings_of) or key
        if node in names and node != kind:
            continue  # of another method
        if key in _NOTES:
            notes += [f"{key} {value}: {_NOTES[key]}"] if key in given else []
        elif node in ("DISTILLER", "EXPERIMENT") or key.startswith(("LOG.", "SOLVER.T", "SOLVER.DOT")):
            notes += [f"{key} {value}"] if key not in defaults else []  # the rest is below
        elif key in _IF_GIVEN and key not in given:
            continue
        elif target in known:
            ours[target] = value
        elif key not in defaults or (value != defaults[key] and not key.endswith(_SHAPES)):
            notes.append(f"{key} {value}: there is no such setting")
    if data not in _TEACHERS:
        notes.append(f"DATASET.TYPE {data} has no recipe of MDistiller: CIFAR-100's is the _BASE_")
    family = dataset_info(data).model_family
    for side in ("STUDENT", "TEACHER") if kind != "NONE" else ("STUDENT",):
        if f"{family}/{(name := theirs[f'DISTILLER.{side}'])}" not in model_names():
            notes.append(f"DISTILLER.{side} {name}: no model of {family} here; timm: and torchvision: have many")
    ours["MODEL.STUDENT.NAME"] = theirs["DISTILLER.STUDENT"]
    if kind != "NONE":
        ours["DISTILL.METHODS"], ours["MODEL.TEACHER.NAME"] = [names[kind]], theirs["DISTILLER.TEACHER"]
        ours["MODEL.TEACHER.WEIGHTS"] = _TEACHERS.get(data, _TEACHERS["cifar100"]).format(theirs["DISTILLER.TEACHER"])
    if theirs["SOLVER.TRAINER"].endswith("dot"):
        ours |= {"SOLVER.OPTIMIZER": "DOT", "SOLVER.DELTA": theirs["SOLVER.DOT.DELTA"]}
    elif theirs["SOLVER.TYPE"] != "SGD" or theirs["SOLVER.TRAINER"] not in ("base", kind.lower()):
        notes.append(f"SOLVER.TYPE {theirs['SOLVER.TYPE']}, SOLVER.TRAINER {theirs['SOLVER.TRAINER']}: SGD is used")
    if any(key.startswith("EXPERIMENT.") or key == "LOG.PREFIX" for key in given):
        name = theirs["EXPERIMENT.NAME"] or theirs["EXPERIMENT.TAG"]
        ours["OUTPUT_DIR"] = str(Path(theirs["LOG.PREFIX"], theirs["EXPERIMENT.PROJECT"], name))
    return base, _changed(cfg, ours), notes


def _convert_detector(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """As :func:`convert_classifier`, of detection/configs of MDistiller."""
    from d2distill.common.foreign import our_key
    from d2distill.detection.config import get_cfg

    defaults = _defaults()[1]
    types, theirs = defaults.pop("TYPES"), {**_flat(defaults), **_flat(settings)}
    if theirs["KD.TYPE"] not in types:
        raise ConfigError(f"KD.TYPE {theirs['KD.TYPE']}: MDistiller has {', '.join(types)}")
    methods = types[theirs["KD.TYPE"]]
    mobile = "mobilenet" in theirs.get("MODEL.BACKBONE.NAME", "")
    student = "mv2" if mobile else f"r{theirs.get('MODEL.RESNETS.DEPTH', 50)}"
    base = f"det/{student}{'_mask' * theirs.get('MODEL.MASK_ON', False)}.yaml"
    if not Path(find_config(base)).is_file():
        raise ConfigError(f"a student with ResNet-{student[1:]}: d2distill has configurations of r18, r50 and mv2")
    cfg = get_cfg()
    cfg.merge_from_file(find_config(base))
    known, notes = _flat(cfg), []
    settings_of = {name.upper(): cfg.DISTILL[name.upper()] for name in methods}
    kind = ("InstanceSegmentation/mask" if theirs.get("TEACHER.MODEL.MASK_ON") else "Detection/faster") + "_rcnn"
    ours = {
        "MODEL.META_ARCHITECTURE": "DistillRCNN",
        "TEACHER.CONFIG_FILE": f"COCO-{kind}_R_{theirs.get('TEACHER.MODEL.RESNETS.DEPTH', 50)}_FPN_3x.yaml",
        "DISTILL.METHODS": methods,
        **{f"DISTILL.{node}.WARMUP": 0 for node in settings_of},
    }
    for key, value in theirs.items():
        target = our_key(key, settings_of) or key
        if target in known and not key.startswith(_FROM_BASE):
            ours[target] = value
        elif target not in known and not key.startswith((*_FROM_BASE, "KD.")):
            notes.append(f"{key} {value}: there is no such setting")
    if "MODEL.WEIGHTS" in theirs:
        notes.append(
            f"MODEL.WEIGHTS {theirs['MODEL.WEIGHTS']}: holds both networks; here the student begins with ImageNet's "
            "weights and the teacher's are those of Detectron2's zoo; `tools/convert_weights.py split` divides the file"
        )
    return base, _changed(cfg, ours), notes


def _defaults() -> list[dict[str, Any]]:
    """MDistiller's own settings, of classifiers and of detectors."""
    return list(yaml.safe_load_all(_DEFAULTS.read_text()))


def _changed(cfg: Any, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What of `ours` differs from `cfg`, nested as in a file."""
    merged = cfg.clone()
    merged.merge_from_list([item for pair in ours.items() for item in pair])
    before, now = _flat(cfg), _flat(merged)
    changed = {key: now[key] for key in ours if now[key] != before[key]}
    return _nested({key: list(value) if isinstance(value, tuple) else value for key, value in changed.items()})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *nodes, last = key.split(".")
        node = nested
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    return nested


if __name__ == "__main__":
    main()
