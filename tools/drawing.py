"""Pictures with boxes: one alone, or what several detectors find in the same images, beside the ground truth."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from d2distill.detection.config import load_cfg
from d2distill.detection.data import build_test_loader, load_test_set, register_datasets
from d2distill.detection.weights import load_student
from d2distill.tools.comparison import Comparison

__all__ = ["draw_detections", "draw_picture"]

#: A box x0, y0, x1, y1 in pixels, its class, and its label.
Box = tuple[Sequence[float], int, str]


@torch.no_grad()
def draw_detections(comparison: Comparison, path: str | Path, num_images: int = 4, threshold: float = 0.3) -> None:
    """Draw the first test images as a PNG, a row for each: the ground truth, then what the first run of each row finds.

    Args:
        comparison: of detectors, whose runs have ended; test images are those of the first row.
        threshold: the lowest score of a box that is drawn.
    """
    cfgs = [load_cfg(entry.config_file, [*entry.opts, "DISTILL.METHODS", "[]"]) for entry in comparison.entries]
    register_datasets(cfgs[0])
    name = cfgs[0].DATASETS.TEST[0]
    records = load_test_set(cfgs[0], name)[:num_images]
    classes = MetadataCatalog.get(name).thing_classes
    # What a set is tested on has no annotations.
    annotations = {record["image_id"]: record["annotations"] for record in DatasetCatalog.get(name)}
    truth = [
        [
            (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"], classes[a["category_id"]])
            for a in annotations[record["image_id"]]
        ]
        for record in records
    ]
    columns = {f"ground truth\n(others: score of {threshold:.0%} or more)": truth}
    for entry, cfg in zip(comparison.entries, cfgs, strict=True):
        seed = entry.seeds[0]
        model = build_model(cfg).eval()
        load_student(model, str(comparison.folder(entry, seed) / "student_final.pth"), complete=True)
        found = columns[f"{entry.label}\nAP {comparison.results(entry)[seed]['bbox/AP']:.1f}"] = []
        for batch in islice(build_test_loader(cfg, name), num_images):
            instances = model(batch)[0]["instances"].to("cpu")
            # Detectron2 gives the one with the highest score first, which is to be on top.
            instances = instances[(instances.scores >= threshold).nonzero()[:, 0].flip(0)]
            parts = (x.tolist() for x in (instances.pred_boxes.tensor, instances.pred_classes, instances.scores))
            found.append([(box, kind, f"{classes[kind]} {score:.0%}") for box, kind, score in zip(*parts, strict=True)])
    images = [read_image(record["file_name"], "RGB") for record in records]
    # Detectron2's Visualizer needs OpenCV, takes colors at random, and small letters on small images.
    ratios = [image.shape[0] / image.shape[1] for image in images]
    figure = Figure(figsize=(3.5 * len(columns), 3.5 * sum(ratios) + 0.6), dpi=100, layout="constrained")
    grid = figure.subplots(len(images), len(columns), squeeze=False, height_ratios=ratios)
    for column, (title, boxes) in enumerate(columns.items()):
        grid[0, column].set_title(title)
        for axes, image, per_image in zip(grid[:, column], images, boxes, strict=True):
            axes.imshow(image, interpolation="bicubic")
            axes.axis("off")
            for box in per_image:
                _draw(axes, box, image.shape)
    figure.savefig(path)


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
    color = colormaps["tab10"](kind % 10)
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=2))
    x, side = (x0, "left") if x0 < shape[1] / 2 else (x1, "right")
    y, edge = (y0, "bottom") if y0 > 0.06 * shape[0] else (min(y1, 0.94 * shape[0]), "top")
    background = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
    axes.text(x, y, label, ha=side, va=edge, color="white", fontsize=10, bbox=background, in_layout=False)
