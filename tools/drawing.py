"""What the detectors of a comparison find in the same images, beside the ground truth."""

from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from d2distill.detection.config import load_cfg
from d2distill.detection.data import build_test_loader, load_test_set, register_datasets
from d2distill.detection.weights import load_student
from d2distill.tools.comparison import Comparison
from d2distill.tools.visualizations.boxes import detection_grid, found_boxes, true_boxes

__all__ = ["draw_detections"]


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
    columns = {f"ground truth\n(others: score of {threshold:.0%} or more)": true_boxes(name, records)}
    for entry, cfg in zip(comparison.entries, cfgs, strict=True):
        seed = entry.seeds[0]
        model = build_model(cfg).eval()
        load_student(model, str(comparison.folder(entry, seed) / "student_final.pth"), complete=True)
        found = columns[f"{entry.label}\nAP {comparison.results(entry)[seed]['bbox/AP']:.1f}"] = []
        for batch in build_test_loader(cfg, name, records):
            found.append(found_boxes(model(batch)[0]["instances"], classes, threshold))
    detection_grid([record["file_name"] for record in records], columns).savefig(path)
