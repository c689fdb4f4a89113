"""Small data sets in COCO's format, and configurations that name them."""

import json

from PIL import Image

from d2distill.detection.config import get_cfg

POLYGON = [[1, 1, 5, 1, 5, 5]]


def annotation(number, image, category=1, **changes):
    fixed = {"id": number, "image_id": image, "category_id": category, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    return {**fixed, "segmentation": POLYGON, **changes}


def coco(classes=("cat", "dog"), images=2, annotations=None):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 9} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
        "annotations": [annotation(1, 1), annotation(2, 2, 2)] if annotations is None else annotations,
    }


def write(root, name, content=None):
    (root / name).mkdir()
    for number in (1, 2):
        Image.new("RGB", (9, 8)).save(root / name / f"{number}.png")
    (root / f"{name}.json").write_text(json.dumps(content or coco()))


def own_cfg(names=("pets",), test=(), num_classes=2, **register):
    cfg = get_cfg()
    for name in {*names, *test}:
        cfg.DATASETS.REGISTER[name] = type(cfg)({"JSON": f"{name}.json", "IMAGES": name})
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(names), tuple(test or names)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    return cfg
