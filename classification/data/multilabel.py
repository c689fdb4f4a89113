"""Images with any number of classes each, from CSV files."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from d2distill.common.errors import DataError

from .datasets import DatasetInfo, FileDataset, dataset_info, find_folder, register_dataset, shortened

_SOURCE = (
    "write ROOT/train.csv and ROOT/val.csv, or train.csv alone and set DATASETS.VAL_FRACTION. The first line is "
    '"file,<class>,<class>,..." and the others are 0 or 1, or it is "file,labels" and the others are names with | '
    "between them; files are relative to ROOT."
)


@register_dataset(
    replace(dataset_info("imagenet"), name="multilabel", num_classes=None, source=_SOURCE, multi_label=True)
)
def build_multilabel(info: DatasetInfo, root: str, split: str) -> FileDataset:
    """ROOT/{train,val}.csv with the classes of each image; the classes are those of train.csv (else val.csv).

    In the order of the columns, or, where the file lists names, sorted.
    """
    name = f"{split}.csv"
    folder = find_folder(info, root, [""], lambda folder: [] if (folder / name).is_file() else [name])
    trained = split != "train" and (folder / "train.csv").is_file()
    classes = _read(folder / "train.csv")[0] if trained else []
    classes, paths, labels = _read(folder / name, classes)
    return FileDataset(replace(info, num_classes=len(classes)), folder, paths, labels, classes)


def _read(path: Path, known: Sequence[str] = ()) -> tuple[list[str], list[str], np.ndarray]:
    """Classes, files and labels (n, classes) of a CSV file; `known` are the classes that it must not go beyond."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if header[:1] != ["file"] or len(header) < 2:
        raise DataError(f'{path}: the first line must be "file,<class>,<class>,..." or "file,labels", but is {header}')
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise DataError(
                f"{path}, row {number}: {len(row)} columns, but the first line has {len(header)}: {row[:5]}"
            )
    if header[1:] == ["labels"]:
        lists = [[name.strip() for name in row[1].split("|") if name.strip()] for row in rows]
        found = sorted({name for names in lists for name in names})
    else:
        found = header[1:]
        for number, row in enumerate(rows, start=2):
            if wrong := set(row[1:]) - {"0", "1"}:
                raise DataError(f"{path}, row {number}: {sorted(wrong)[0]!r} is neither 0 nor 1")
        lists = [[name for name, cell in zip(found, row[1:], strict=True) if cell == "1"] for row in rows]
    if len(set(found)) < len(found):
        raise DataError(f"{path}: the first line names a class twice: {shortened(found)}")
    if unknown := [name for name in found if name not in (known or found)]:
        raise DataError(f"{path} has classes that train.csv does not have: {shortened(unknown)}")
    classes = list(known or found)
    index = {name: position for position, name in enumerate(classes)}
    labels = np.zeros((len(rows), len(classes)), dtype=bool)
    for row, names in zip(labels, lists, strict=True):
        row[[index[name] for name in names]] = True
    return classes, [row[0] for row in rows], labels
