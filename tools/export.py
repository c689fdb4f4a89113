#!/usr/bin/env python3
"""Write a run's student as files that others can use, check each, and describe them.

python tools/export.py output/my_run
python tools/export.py output/my_run DATASETS.ROOT /data --format onnx --int8

Classifiers: safetensors, pt2 (torch.export), onnx. Detectors: safetensors, torchscript, onnx. All but safetensors need
no code of the network, and take pixels of 0..255: the normalization is inside. Class names and preprocessing are in
every file, which is all that d2distill-predict and d2distill.load need.

Each file is compared with the student on the run's test images (KEY VALUE may say where they are now), else on those of
--images, else on random ones. Writes into RUN/export: the files, a table (export.md) and a model card (README.md).
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2

_FORMATS = ("safetensors", "pt2", "onnx", "torchscript")


def main() -> None:
    """``d2distill-export``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder, or a student_*.pth of it")
    parser.add_argument("--format", nargs="+", choices=_FORMATS, help="(default: all of the task)")
    parser.add_argument("--output", metavar="DIR", help="(default: RUN/export)")
    parser.add_argument("--int8", action="store_true", help="write a classifier's ONNX file with 8 bits as well")
    parser.add_argument("--images", metavar="FOLDER", help="pictures to check on where there are no test images")
    parser.add_argument("--device", default="cpu", help="of the comparison and of the latency (default: %(default)s)")
    parser.add_settings()
    args = parser.parse_args()
    require_detectron2()
    from d2distill.deployed import student_file

    file = student_file(args.run).absolute()
    import torch

    from d2distill.common.config import CfgNode, resolve_device
    from d2distill.common.engine.run_folder import write_text
    from d2distill.common.engine.weight_files import read_description
    from d2distill.exported import require
    from d2distill.tools.measuring import table

    task = "detection" if read_description(str(file)).get("task") == "detection" else "classification"
    kind = import_module(f"d2distill.tools.export_{task}").Export
    formats = args.format or list(kind.formats)
    _check(kind.formats, formats, args.int8, task)
    require("huggingface_hub", *(["onnx", "onnxruntime", "onnxscript"] if "onnx" in formats else []))
    from d2distill.tools.model_card import model_card

    device = resolve_device(CfgNode({"MODEL": {"DEVICE": args.device}}))
    export = kind(file, args.opts, args.images, device)
    output = Path(args.output) if args.output else file.parent / "export"
    output.mkdir(parents=True, exist_ok=True)
    print(f"checked on {export.pictures}", flush=True)
    student = export.student_row()
    rows = [*export.teacher_rows(), student]
    for form in formats:
        path = output / f"student{export.formats[form]}"
        export.write(form, path)
        rows.append(export.check(path))
        print(f"{path}: {rows[-1].difference}", flush=True)
    example = rows[-1].label
    if args.int8:
        path = output / "student_int8.onnx"
        calibrated = export.quantize(output / "student.onnx", path)
        rows.append(export.check(path))
        print(f"{path}: {rows[-1].difference}; calibrated on {calibrated}", flush=True)

    text = f"{table(rows, export.metrics)}\n\nLatency: median, on {_machine(torch, device)}. {export.caption}\n"
    write_text(output / "export.md", text)
    metrics = student.metrics or _results(file, export.metrics)
    metrics = {name: metrics[name] for name in export.metrics if name in metrics}
    card = model_card(
        file.parent.name, export.student.description, export.origin, export.dataset, metrics, example, text
    )
    card.save(output / "README.md")
    print(f"\n{text}\nModel card: {output / 'README.md'}")


def _results(file: Path, metrics: Sequence[str]) -> dict[str, float]:
    """What the run's results.json says of a student's file, by the file's name."""
    path = file.with_name("results.json")
    prefix = {"student_best": "best_", "student_final": ""}.get(file.stem)
    results = json.loads(path.read_text()) if prefix is not None and path.is_file() else {}
    return {name: results[prefix + name] for name in metrics if results.get(f"{prefix}{name}") is not None}


def _check(known: dict[str, str], formats: list[str], int8: bool, task: str) -> None:
    if unknown := [form for form in formats if form not in known]:
        raise ConfigError(f"--format {unknown[0]} is not for {task}: choose among {', '.join(known)}")
    if int8 and (task == "detection" or "onnx" not in formats):
        raise ConfigError("--int8 quantizes the ONNX file of a classifier: add onnx to --format, or leave it out")


def _machine(torch, device) -> str:
    threads = torch.get_num_threads()
    cpu = f"the CPU ({threads} thread{'s' * (threads > 1)})"
    return cpu if device.type == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
