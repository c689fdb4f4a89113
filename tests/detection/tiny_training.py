"""Small runs of the detection trainer for the tests."""

import json
import os
from collections import Counter
from pathlib import Path

import torch

from d2distill.detection.data import load_training_set, register_datasets
from d2distill.detection.data.digits_coco import generate_split
from d2distill.detection.trainer import build_trainer, train
from tests.detection.tiny_detectors import build, plain, small_cfg
from tests.interruptions import disturb, read_state

STEPS = 6
TINY = {name: {"JSON": f"tiny/annotations/{name}.json", "IMAGES": f"tiny/{name}"} for name in ("train", "val")}


def make_tiny(root) -> None:
    """Ten images to train and four to test on, below `root`; and a teacher for each architecture."""
    for split, number in (("train", 10), ("val", 4)):
        generate_split(Path(root, "tiny"), split, number, seed=0)
    for name in ("rcnn", "retinanet"):
        weights = build(plain(tiny_cfg(name, ".")), seed=5).state_dict()
        for key, value in weights.items():
            if key.endswith("running_var"):
                value.fill_(1.5)  # to be told from a frozen batch norm that was reset
        torch.save({"model": weights}, teacher_file(root, name))


def teacher_file(root, name) -> str:
    return str(Path(root, f"teacher_{name}.pth"))


def tiny_cfg(name, folder, workers=0, **settings):
    """Six steps of two images; a checkpoint after every second, an evaluation after every third."""
    opts = {
        "OUTPUT_DIR": str(folder),
        "SEED": 3,
        "LOG_PERIOD": 2,
        "MODEL.ROI_HEADS.NUM_CLASSES": 10,
        "MODEL.RETINANET.NUM_CLASSES": 10,
        "TEACHER.MODEL.ROI_HEADS.NUM_CLASSES": 10,
        "TEACHER.MODEL.RETINANET.NUM_CLASSES": 10,
        "TEACHER.MODEL.WEIGHTS": teacher_file(os.environ["DETECTRON2_DATASETS"], name),
        "DATASETS.REGISTER": {f"tiny_{split}": entry for split, entry in TINY.items()},
        "DATASETS.TRAIN": ("tiny_train",),
        "DATASETS.TEST": ("tiny_val",),
        "INPUT.MIN_SIZE_TRAIN": (64, 96),
        "INPUT.MIN_SIZE_TEST": 96,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": STEPS,
        "SOLVER.STEPS": (4,),
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "TEST.EVAL_PERIOD": 3,
        "TEST.TEACHER": False,
        "REPORT.ENABLED": False,
        "DATALOADER.NUM_WORKERS": workers,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    if name == "retinanet":
        return small_cfg(
            "retinanet_bckd_r101_r50", **{"SOLVER.BASE_LR": 1e-4, "DISTILL.METHODS": ["BCKD", "PKD"], **opts}
        )
    # Batch norms that learn, so that running statistics are part of the state.
    return small_cfg("review_dkd_r101_r18", **{"MODEL.RESNETS.NORM": "BN", **opts})


def count_reads(monkeypatch) -> Counter:
    """How often each file of annotations is parsed from now on."""
    read, load = Counter(), json.load

    def counting(file, **options):
        read[Path(file.name).name] += 1
        return load(file, **options)

    monkeypatch.setattr("pycocotools.coco.json.load", counting)
    return read


def run(cfg, resume: bool = False) -> dict[str, float]:
    return train(cfg, resume)


def state(folder) -> tuple[dict, dict, list]:
    return read_state(folder, STEPS)


def run_disturbed(cfg, moment: str, step: int) -> None:
    """A run that :func:`tests.interruptions.disturb` ends."""
    register_datasets(cfg)
    trainer = build_trainer(cfg, load_training_set(cfg))
    disturb(trainer, moment, step)
    trainer.run()
