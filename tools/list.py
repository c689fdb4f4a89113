#!/usr/bin/env python3
"""What there is to choose from: methods, models, configurations and data sets.

python tools/list.py methods                      # paper, what it looks at, tasks, results
python tools/list.py configs --filter reviewkd    # rows with that text, in capitals or not
python tools/list.py models --json
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import require_detectron2

ROOT = Path(__file__).resolve().parent.parent
_PUBLISHED = Path(__file__).with_name("published.yaml")
#: The pair on which most papers report.
_PAIR = "cifar100_r32x4_r8x4_"
#: Authors: (title, venue and year), or (title, arXiv:number).
_CITATION = re.compile(r"[A-Z][\w, ]+?(?: et al\.)?: ((?:[^:.]|: )+?, (?:[\w ]*?20\d\d\b|arXiv:[\d.]+\d))")
#: Made by tools/benchmark_methods.py; only a checkout has it.
_OWN = ROOT / "benchmarks" / "results" / "digits_methods_cpu.md"


def main() -> None:
    """``d2distill-list``."""
    run_cli(_main)


def _main() -> None:
    kinds = {"methods": methods, "models": models, "configs": configs, "datasets": datasets}
    parser = CommandParser(description=__doc__)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--filter", default="", metavar="TEXT", help="rows that have it in any column")
    parser.add_argument("--json", action="store_true", help="as a list of objects")
    args = parser.parse_args()
    require_detectron2()
    from tabulate import tabulate

    wanted = args.filter.lower()
    rows = [row for row in kinds[args.kind]() if wanted in " ".join(map(str, row.values())).lower()]
    if not rows and not args.json:
        print(f"nothing of {args.kind} has {args.filter!r} in it", file=sys.stderr)
        raise SystemExit(1)
    table = tabulate(rows, "keys", tablefmt="plain", disable_numparse=True)
    try:
        print(json.dumps(rows, indent=2, ensure_ascii=False) if args.json else table, flush=True)
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def methods() -> list[dict[str, str]]:
    """The distillation methods.

    ``adds`` are the values that training has beside the student's, in connectors and memories, on CIFAR-100 with
    ResNet32x4 and ResNet8x4 (1.2 M); ``published`` is the authors' top-1 there, ``digits`` ours, of the digits' table.
    """
    from d2distill.common.distillers import DISTILLERS

    added = _added_values()
    published, own = yaml.safe_load(_PUBLISHED.read_text()), _own_results()
    rows = []
    for name, method in sorted(DISTILLERS, key=lambda pair: pair[0].lower()):
        kinds = _detectors(method)
        notes = {
            "no teacher": not method.needs_teacher,
            "no mixed images": not method.takes_soft_target,
            "also sigmoids": method.takes_sigmoid,
        }
        rows.append(
            {
                "method": name,
                "looks at": ", ".join(method.needs),
                "notes": ", ".join(note for note, holds in notes.items() if holds),
                "tasks": "classification" + f", detection ({', '.join(kinds)})" * bool(kinds),
                "adds": f"{added[name] / 1e6:.2f} M" if added[name] else "-",
                "published": str(published.get(_PAIR + name.lower(), "")),
                "digits": own.get(name.lower(), ""),
                "paper": _paper(method),
            }
        )
    return rows


def _added_values() -> dict[str, int]:
    import torch

    from d2distill.classification.models import build_model
    from d2distill.classification.networks import network_info
    from d2distill.common.config import CfgNode
    from d2distill.common.distillers import DISTILLERS
    from d2distill.common.outputs import TrainingData

    student, teacher = (network_info(build_model(f"cifar/resnet{name}", 100), 32) for name in ("8x4", "32x4"))
    data, added = TrainingData(50_000, torch.arange(50_000) % 100), {}
    for name, kind in DISTILLERS:
        settings = CfgNode({**kind.common_defaults(), **kind.defaults()})
        method = kind(settings, student, teacher if kind.needs_teacher else None, data)
        added[name] = sum(value.numel() for value in (*method.parameters(), *method.buffers()))
    return added


def models() -> list[dict[str, Any]]:
    """The classifiers of this package, and their parameters with so many classes."""
    import torch

    from d2distill.classification.models import build_model, model_names

    classes, rows = {"cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}, []
    for qualified in model_names():
        family, _, name = qualified.partition("/")
        with torch.device("meta"):
            model = build_model(qualified, classes[family])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = f"{parameters / 1e6:.3f} M"
        rows.append({"model": name, "family": family, "classes": str(classes[family]), "parameters": size})
    any_of = dict.fromkeys(("family", "classes", "parameters"), "any")
    return [*rows, *({"model": name, **any_of} for name in ("timm:NAME", "torchvision:NAME"))]


def configs() -> list[dict[str, str]]:
    """The packaged configurations that can be trained, by the names that --config-file takes."""
    from d2distill import configs as package
    from d2distill.common.config_node import load_yaml

    published = yaml.safe_load(_PUBLISHED.read_text())
    rows = []
    for path in sorted(Path(package.__file__).parent.glob("*/*.yaml")):
        if path.stem.startswith("base_"):
            continue
        settings = load_yaml(str(path))
        rows.append(
            {
                "config": f"{path.parent.name}/{path.name}",
                "methods": ", ".join(settings.get("DISTILL", {}).get("METHODS", [])) or "-",
                "optimizer": settings.get("SOLVER", {}).get("OPTIMIZER", "SGD"),
                "pair": _pair(settings),
                "published": str(published.get(path.stem, "")),
                "comment": _comment(path),
            }
        )
    return rows


def datasets() -> list[dict[str, Any]]:
    """The data sets by name; detectors also take what Detectron2 knows and DATASETS.REGISTER names."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    import d2distill.detection.data  # noqa: F401  (registers its own)
    from d2distill.classification.data import DATASET_REGISTRY, dataset_info

    rows = []
    for name in DATASET_REGISTRY.names():
        info = dataset_info(name)
        classes = "yours" if info.num_classes is None else str(info.num_classes)
        rows.append({"data set": name, "task": "classification", "classes": classes,
                     "image size": str(info.image_size), "source": info.source})  # fmt: skip
    own = [name for name in DatasetCatalog.list() if name.startswith("digits_coco")]
    known = dict.fromkeys(own, "drawn when it is first used")
    known |= {f"coco_2017_{split}": "https://cocodataset.org" for split in ("train", "val")}
    for name, source in known.items():
        classes = str(len(MetadataCatalog.get(name).thing_classes))
        rows.append({"data set": name, "task": "detection", "classes": classes, "image size": "any", "source": source})
    return rows


def _paper(method: type) -> str:
    """What the docstrings of a method's module cite: title, and venue and year, or else arXiv's number."""
    module = sys.modules[method.__module__]
    texts = [method.__doc__, *(getattr(module, name).__doc__ for name in module.__all__)]
    for text in map(" ".join, (str(text).split() for text in texts)):
        if found := re.search(
            r"[A-Z][\w, ]+?(?: et al\.)?: ((?:[^:.]|: )+?, (?:[\w ]*?20\d\d\b|arXiv:[\d.]+\d))", text
        ):
            return found[1]
    return ""


def _detectors(method: type) -> list[str]:
    """The detectors for which a method can be built: they have no pooled vector, and are deployed as they are."""
    from fvcore.common.config import CfgNode
    from torch import nn

    from d2distill.common.distillers import Distiller
    from d2distill.common.outputs import NetworkInfo

    cfg, fitting = CfgNode({**method.common_defaults(), **method.defaults()}), []
    for kind, sigmoid in (("R-CNN", False), ("RetinaNet", True)):
        info = NetworkInfo(num_classes=80, feats=((256,),) * 5, sigmoid=sigmoid, module=nn.Module())
        try:
            method(cfg, info, info)
        except (ValueError, TypeError):
            continue
        if method.deployed is Distiller.deployed:
            fitting.append(kind)
    return fitting


def _own_results() -> dict[str, str]:
    """Last top-1 of each row of the digits' table."""
    lines = _OWN.read_text().splitlines() if _OWN.is_file() else []
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    return {row[1]: row[2] for row in cells[2:]}


def _pair(settings: dict[str, Any]) -> str:
    """Teacher and student, or the student alone."""
    model, teacher = settings.get("MODEL", {}), settings.get("TEACHER", {})
    if "STUDENT" in model:
        names = [model.get("TEACHER", {}).get("NAME", ""), model["STUDENT"]["NAME"]]
    else:
        backbone = model.get("BACKBONE", {}).get("NAME", "")
        student = "MobileNetV2" if "mobilenet" in backbone else f"ResNet-{model.get('RESNETS', {}).get('DEPTH', 50)}"
        names = [Path(teacher.get("CONFIG_FILE", "")).stem, student]
    return " -> ".join(filter(None, names))


def _comment(path: Path) -> str:
    """The first comment line of a file, or of its _BASE_."""
    text = path.read_text()
    if text.startswith("#"):
        return text.splitlines()[0].lstrip("# ")
    base = re.search(r"^_BASE_: (\S+)", text, re.MULTILINE)
    return _comment(path.parent / base[1]) if base else ""


if __name__ == "__main__":
    main()
