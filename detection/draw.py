"""A picture of what several detectors find in the same images, beside what is there."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn

from d2distill.common.engine.compare import Entry
from d2distill.detection.config import CfgNode, load_cfg
from d2distill.detection.data import build_test_loader, load_test_set, register_datasets
from d2distill.detection.weights import load_student

__all__ = ["draw_detections"]

# In pixels: of an image in the picture, between two, and of the titles' line above them.
_WIDTH, _GAP, _TITLES = 340, 12, 52
_DPI = 100
_FONT, _LETTER = 10, (9, 18)  # points; about the pixels of a letter with its background

#: A box x0, y0, x1, y1 in pixels, its class, and what is written at it.
Box = tuple[Sequence[float], int, str]


def draw_detections(
    entries: Sequence[Entry],
    titles: Sequence[str],
    output_dir: str | Path,
    path: str | Path,
    num_images: int = 4,
    threshold: float = 0.3,
) -> None:
    """Draw the first test images, one row each, as a PNG: the ground truth, then every entry's detections.

    A class has one colour in all columns. Images are scaled to a width of 340 pixels.

    Args:
        entries: each is the student_final.pth of its first seed's run; test images are those of the first entry.
        titles: of the columns, one for each entry.
        output_dir: of the runs.
        threshold: the lowest score of a box that is drawn; the surest ones are on top.

    Raises:
        CheckpointError: a run has no finished student.
    """
    cfgs = [load_cfg(entry.config_file, [*entry.opts, "DISTILL.METHODS", "[]"]) for entry in entries]
    register_datasets(cfgs[0])
    name = cfgs[0].DATASETS.TEST[0]
    records = load_test_set(cfgs[0], name)[:num_images]
    classes = MetadataCatalog.get(name).thing_classes
    # What a set is tested on has no annotations.
    known = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    columns = [[_truth(known[record["image_id"]], classes) for record in records]]
    for entry, cfg in zip(entries, cfgs, strict=True):
        model = build_model(cfg).eval()
        load_student(model, str(entry.folders(output_dir)[0] / "student_final.pth"), complete=True)
        columns.append(_detections(cfg, model, name, num_images, threshold, classes))
    images = [read_image(record["file_name"], "RGB") for record in records]
    _compose(images, columns, [f"ground truth\n(others: score of {threshold:.0%} or more)", *titles]).savefig(path)


def _truth(record: dict, classes: Sequence[str]) -> list[Box]:
    return [
        (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], classes[a["category_id"]])
        for a in record["annotations"]
    ]


@torch.no_grad()
def _detections(
    cfg: CfgNode, model: nn.Module, name: str, num_images: int, threshold: float, classes: Sequence[str]
) -> list[list[Box]]:
    """The boxes that a detector finds in each of the first images of a set."""
    found = []
    for batch in islice(build_test_loader(cfg, name), num_images):
        instances = model(batch)[0]["instances"].to("cpu")
        # Detectron2 gives the surest one first.
        instances = instances[(instances.scores >= threshold).nonzero()[:, 0].flip(0)]
        parts = (x.tolist() for x in (instances.pred_boxes.tensor, instances.pred_classes, instances.scores))
        found.append([(box, kind, f"{classes[kind]} {score:.0%}") for box, kind, score in zip(*parts, strict=True)])
    return found


# Detectron2's Visualizer would do, but it needs OpenCV, takes colours at random, and small letters on small images.
def _compose(images: list[np.ndarray], columns: list[list[list[Box]]], titles: Sequence[str]) -> Figure:
    """Each image (H, W, 3), enlarged to _WIDTH, once in every column, with that column's boxes."""
    enlarged = [
        Image.fromarray(image).resize((_WIDTH, round(_WIDTH * len(image) / image.shape[1])), Image.Resampling.BICUBIC)
        for image in images
    ]
    width = len(columns) * (_WIDTH + _GAP) + _GAP
    height = _TITLES + sum(image.height + _GAP for image in enlarged)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    canvas = Image.new("RGB", (width, height), "white")
    for column, (title, boxes) in enumerate(zip(titles, columns, strict=True)):
        left, top = _GAP + column * (_WIDTH + _GAP), _TITLES
        axes.text(left + _WIDTH / 2, _TITLES - 6, title, ha="center", va="bottom", fontsize=12)
        for image, small, per_image in zip(enlarged, images, boxes, strict=True):
            canvas.paste(image, (left, top))
            for box in per_image:
                _draw(axes, box, _WIDTH / small.shape[1], (left, top), image.size)
            top += image.height + _GAP
    # One pixel of the canvas is one of the picture.
    axes.imshow(np.asarray(canvas), extent=(0, width, height, 0), interpolation="nearest")
    return figure


def _draw(axes: Axes, box: Box, scale: float, corner: tuple[int, int], size: tuple[int, int]) -> None:
    """A labelled box in the image of this size at this corner; the label is above where there is room, else below."""
    (x0, y0, x1, y1), kind, label = ([scale * x for x in box[0]], *box[1:])
    colour = colormaps["tab10"](kind % 10)
    x = max(min(x0, size[0] - _LETTER[0] * len(label)), 0)
    y = y0 - _LETTER[1] if y0 >= _LETTER[1] else min(y1, size[1] - _LETTER[1])
    axes.add_patch(
        Rectangle((corner[0] + x0, corner[1] + y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2)
    )
    background = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
    text = axes.text(corner[0] + x + 2, corner[1] + y + 2, label, va="top", color="white", fontsize=_FONT)
    text.set_bbox(background)
