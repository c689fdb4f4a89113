"""Pictures with boxes: one alone, or those of several detectors on the same pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, Instances
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from d2distill.tools.visualizations.style import COLORS, text_color, wrap

__all__ = ["Box", "detection_grid", "draw_picture", "found_boxes", "true_boxes"]

#: A box x0, y0, x1, y1 in pixels, its class, and its label.
Box = tuple[Sequence[float], int, str]


def true_boxes(name: str, records: Sequence[Mapping[str, Any]]) -> list[list[Box]]:
    """The ground truth of some images of a registered data set."""
    classes = MetadataCatalog.get(name).thing_classes
    # What a set is tested on has no annotations.
    annotations = {record["image_id"]: record.get("annotations", ()) for record in DatasetCatalog.get(name)}
    return [
        [
            (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], classes[a["category_id"]])
            for a in annotations[record["image_id"]]
        ]
        for record in records
    ]


def found_boxes(instances: Instances, classes: Sequence[str], threshold: float) -> list[Box]:
    """What a detector found in an image, from a score on, the surest last, which is drawn on top."""
    instances = instances.to("cpu")
    # Detectron2 gives the one with the highest score first.
    instances = instances[(instances.scores >= threshold).nonzero()[:, 0].flip(0)]
    parts = (x.tolist() for x in (instances.pred_boxes.tensor, instances.pred_classes, instances.scores))
    return [(box, kind, f"{classes[kind]} {score:.0%}") for box, kind, score in zip(*parts, strict=True)]


def detection_grid(
    files: Sequence[str | Path], columns: Mapping[str, Sequence[Sequence[Box]]], title: str = "", width: float = 0.0
) -> Figure:
    """A row for each image file, a column for each title with the boxes of each image.

    Args:
        width: of the figure in inches of 100 pixels; 0: 3.5 for each column.
    """
    images = [read_image(str(file), "RGB") for file in files]
    # Detectron2's Visualizer needs OpenCV, takes colors at random, and small letters on small images.
    ratios = [image.shape[0] / image.shape[1] for image in images]
    side = width / len(columns) if width else 3.5
    size = (side * len(columns), side * sum(ratios) + (1.1 if title else 0.6))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(len(images), len(columns), squeeze=False, height_ratios=ratios)
    for column, (head, boxes) in enumerate(columns.items()):
        grid[0, column].set_title(wrap(head, side))
        for axes, image, per_image in zip(grid[:, column], images, boxes, strict=True):
            axes.imshow(image, interpolation="bicubic")
            axes.axis("off")
            for box in per_image:
                _draw(axes, box, image.shape)
    return figure


def draw_picture(source: str | Path, boxes: Sequence[Box], path: str | Path, title: str = "") -> None:
    """Draw an image file upright as a PNG, with boxes in its pixels, the last on top, and a title at its upper edge."""
    image = read_image(str(source), "RGB")
    height, width = image.shape[:2]
    # 8 inches long, so that letters and lines have the same share of every picture. Small ones are enlarged.
    inches, dpi = 8 / max(height, width), max(80, max(height, width) / 8)
    figure = Figure(figsize=(width * inches, height * inches), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    # Boxes begin at the edges of pixels.
    axes.imshow(image, interpolation="bicubic", aspect="auto", extent=(0, width, height, 0))
    axes.axis("off")
    for box in boxes:
        _draw(axes, box, image.shape)
    if title:
        background = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6}
        axes.text(0.01, 0.99, title, transform=axes.transAxes, va="top", color="white", bbox=background, wrap=True)
    figure.savefig(path)


def _draw(axes: Axes, box: Box, shape: Sequence[int]) -> None:
    """A box and its label, which is above where there is room, else below, and never leaves the image."""
    (x0, y0, x1, y1), kind, label = box
    color = COLORS[kind % len(COLORS)]
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=2))
    x, side = (x0, "left") if x0 < shape[1] / 2 else (x1, "right")
    y, edge = (y0, "bottom") if y0 > 0.06 * shape[0] else (min(y1, 0.94 * shape[0]), "top")
    background = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, label, ha=side, va=edge, color=text_color(color), fontsize=10, bbox=background, in_layout=False)
