#!/usr/bin/env python3
"""Predict pictures: classes with probabilities, or boxes, which are drawn.

python tools/predict.py output/my_run photo.jpg
python tools/predict.py output/my_run/export/student.onnx photos "more/**/*.png" --output found

MODEL is the folder of a run, a student_*.pth of it, or a file of d2distill-export. The data that it was trained on is
not needed. Writes predictions.csv, predictions.json and pictures. Pictures that cannot be read get a line each, and the
exit code is then 1.
"""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import DataError, require_detectron2
from d2distill.common.text import printable


def main() -> None:
    """``d2distill-predict``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run folder, a student_*.pth or an exported file")
    parser.add_argument("input", metavar="INPUT", nargs="+", help="pictures, folders with pictures at any depth, globs")
    parser.add_argument("--output", default="predictions", metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--top", type=int, default=5, help="classes per picture (default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="lowest score of a box, or of a class where a picture may have several (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=0, help="(default: 32 for classes, 1 for boxes)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto, the GPU if there is one")
    parser.add_argument("--draw", action="store_true", help="write pictures with their classes too")
    args = parser.parse_args()
    require_detectron2()
    from d2distill.deployed import load, student_file

    student_file(args.model)  # a wrong name is answered before torch is imported
    import torch
    from tabulate import tabulate

    from d2distill.common.config import CfgNode, resolve_device

    output, device = Path(args.output), resolve_device(CfgNode({"MODEL": {"DEVICE": args.device}}))
    model = load(args.model, str(device))
    detects = model.description["task"] == "detection"
    paths = find_pictures(args.input, output)

    def run(inputs: list[Any]) -> list[dict[str, Any]]:
        if detects:
            return _boxes(model, inputs, args.threshold)
        return _classes(model, torch.stack(inputs), args.top, args.threshold)

    output.mkdir(parents=True, exist_ok=True)
    records = list(predict(paths, model.preprocess, run, args.batch_size or (1 if detects else 32)))
    text = json.dumps(records, indent=2, ensure_ascii=False) + "\n"
    # Names that are no UTF-8 are escapes in both files, as JSON reads them.
    (output / "predictions.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    write_csv(output / "predictions.csv", records, ["class", "score", "x0", "y0", "x1", "y1"] if detects else None)
    if detects or args.draw:
        for record, name in zip(records, _names_below(output, paths), strict=True):
            if "error" not in record:
                _draw(record, name, model.classes)
    shown = [{"picture": printable(r["file"]), "found": printable(_summary(r))} for r in records if "error" not in r]
    if shown:
        print(tabulate(shown, "keys", tablefmt="github", disable_numparse=True))
    print(f"{len(shown)} of {len(records)} pictures; see {output}")
    if len(shown) < len(records):
        raise SystemExit(1)


def find_pictures(inputs: Sequence[str], output: Path | None = None) -> list[Path]:
    """Files, those in folders that have an ending of pictures, and what globs match; each once, without `output`'s."""
    from d2distill.classification.data.folders import ImageFiles

    found: dict[Path, None] = {}
    is_picture = ImageFiles()
    own = {os.path.realpath(folder) for folder in (output, output / "pictures")} if output else set()
    for item in inputs:
        matches = [item] if Path(item).exists() else sorted(glob(item, recursive=True))
        if not matches:
            raise DataError(f"{item}: no such picture or folder, and no glob that matches any")
        for match in map(Path, matches):
            if not match.is_dir():
                found[match] = None
                continue
            for folder, subfolders, names in os.walk(match):
                visible = (name for name in sorted(subfolders) if not name.startswith("."))
                subfolders[:] = [name for name in visible if os.path.realpath(os.path.join(folder, name)) not in own]
                found |= {Path(folder, name): None for name in sorted(names) if is_picture(name)}
    if is_picture.passed_over:
        kinds = ", ".join(f"{kind} ({number})" for kind, (number, _) in is_picture.passed_over.items())
        print(printable(f"passed over as no pictures, by their ending: {kinds}"), file=sys.stderr)
    if not found:
        raise DataError(f"no pictures in {', '.join(inputs)}")
    return list(found)


def predict(
    paths: Sequence[Path], preprocess: Callable[[Path], Any], run: Callable[[list[Any]], list[dict]], batch_size: int
) -> Iterator[dict[str, Any]]:
    """A record for each picture, in order: ``file`` and what `run` found; or ``error``, which is printed as well."""
    from tqdm import tqdm

    for start in tqdm(range(0, len(paths), batch_size), disable=None):  # only on a terminal
        batch = paths[start : start + batch_size]
        inputs, errors = {}, {}
        for path in batch:
            try:
                inputs[path] = preprocess(path)
            except DataError as error:
                errors[path] = str(error)
                print(printable(str(error)), file=sys.stderr)
        found = dict(zip(inputs, run(list(inputs.values())) if inputs else [], strict=True))
        for path in batch:
            yield {"file": str(path), **(found[path] if path in found else {"error": errors[path]})}


def _classes(model: Any, images: Any, top: int, threshold: float) -> list[dict[str, Any]]:
    import torch

    with torch.inference_mode():
        logits = model(images.to(_device(model))).float().cpu()
    several = bool(model.description.get("multi_label"))
    probabilities = logits.sigmoid() if several else logits.softmax(1)
    ranked = probabilities.sort(dim=1, descending=True, stable=True)
    records = []
    for values, indices in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True):
        pairs = [(model.classes[i], value) for i, value in zip(indices, values, strict=True)]
        pairs = [pair for pair in pairs if pair[1] >= threshold] if several else pairs[:top]
        records.append({"classes": [{"class": name, "probability": value} for name, value in pairs]})
    return records


def _boxes(model: Any, inputs: list[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
    import torch

    with torch.inference_mode():
        results = model(inputs)
    records = []
    for entry, result in zip(inputs, results, strict=True):
        found = result["instances"].to("cpu")
        parts = (x.tolist() for x in (found.pred_boxes.tensor, found.pred_classes, found.scores))
        boxes = [
            {"class": model.classes[kind], "score": score, "box": box}
            for box, kind, score in zip(*parts, strict=True)
            if score >= threshold
        ]
        records.append({"width": entry["width"], "height": entry["height"], "boxes": boxes})
    return records


def _device(model: Any) -> Any:
    # A file's program has no parameters, and moves its images itself.
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device


def write_csv(path: Path, records: Iterable[dict[str, Any]], columns: Sequence[str] | None) -> None:
    """A line for each class, or for each box where there are `columns`."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *(columns or ["rank", "class", "probability"])])
        for record in records:
            for rank, entry in enumerate(record.get("classes", ()), start=1):
                writer.writerow([record["file"], rank, entry["class"], f"{entry['probability']:.6f}"])
            for entry in record.get("boxes", ()):
                numbers = (f"{x:.2f}" for x in entry["box"])
                writer.writerow([record["file"], entry["class"], f"{entry['score']:.6f}", *numbers])


def _names_below(output: Path, paths: Sequence[Path]) -> list[Path]:
    """Where each picture is drawn: below the output as they are below the folder that holds all of them."""
    whole = [path.absolute() for path in paths]
    root = os.path.commonpath([path.parent for path in whole])
    # Two that differ in their ending alone stay two.
    return [output / "pictures" / f"{path.relative_to(root)}.png" for path in whole]


def _draw(record: dict[str, Any], path: Path, classes: Sequence[str]) -> None:
    from d2distill.tools.visualizations.boxes import draw_picture

    path.parent.mkdir(parents=True, exist_ok=True)
    # The one with the highest score comes first, and is to be on top.
    found = reversed(record.get("boxes", []))
    boxes = [(e["box"], classes.index(e["class"]), f"{e['class']} {e['score']:.0%}") for e in found]
    draw_picture(record["file"], boxes, path, title="" if "boxes" in record else _summary(record))


def _summary(record: dict[str, Any]) -> str:
    if "classes" in record:
        return ", ".join(f"{e['class']} {e['probability']:.1%}" for e in record["classes"]) or "no class"
    counts = Counter(entry["class"] for entry in record["boxes"])
    return ", ".join(f"{name} ({number})" for name, number in counts.most_common()) or "nothing"


if __name__ == "__main__":
    main()
