"""A long training keeps its size: memory, open files, threads, child processes, and what a log period writes."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from d2distill.classification.models import FeatureClassifier, register
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine.run_folder import prepare_run, read_metrics, start_logs
from d2distill.common.outputs import Outputs
from d2distill.detection.data import load_training_set, register_datasets
from d2distill.detection.trainer import build_trainer as build_detection_trainer
from tests.classification.tiny_training import small_cfg
from tests.detection.tiny_training import tiny_cfg
from tests.processes import exit_code, start

pytestmark = pytest.mark.slow

STEPS, PERIOD = 2000, 100
#: What is filled once is full after so many steps.
WARM = 500
#: Megabytes that a process may grow by after that. Detectron2 keeps 0.4 kB a step of times and rates.
GROWTH = 3


class Watch(HookBase):
    """Every PERIOD steps what the process holds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % PERIOD == 0:
            threads = list(Path("/proc/self/task").iterdir())
            facts = {
                "megabytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": len(threads),
                "children": sum(len((thread / "children").read_text().split()) for thread in threads),
                "log": (self.folder / "log.txt").stat().st_size,
                "metrics": (self.folder / "metrics.json").stat().st_size,
                "names": len(os.listdir(self.folder)),
            }
            self.seen.append(facts)

    def after_train(self) -> None:
        (self.folder / "watched.json").write_text(json.dumps(self.seen))


class Small(FeatureClassifier):
    """A third of a millisecond a step."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4, num_classes)

    def outputs(self, images):
        stem = self.stem(images).relu()
        pooled = stem.mean((2, 3))
        return Outputs(self.fc(pooled), feats=[stem], pooled=pooled)


def classifier(folder: Path) -> None:
    """With a teacher, evaluations and checkpoints."""
    register("cifar/Small")(Small)
    settings = {"MODEL.STUDENT.NAME": "Small", "MODEL.TEACHER.NAME": "Small", "INPUT.SIZE": 8, "LOG_PERIOD": PERIOD}
    settings |= {"DATASETS.TRAIN_SIZE": 400, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.EPOCHS": STEPS // 100}
    settings |= {"SOLVER.CHECKPOINT_STEPS": 0, "SOLVER.STEPS": [], "TEST.EVAL_PERIOD": 2, "DISTILL.METHODS": ["KD"]}
    cfg = small_cfg(folder, **settings)
    prepare_run(cfg, False)
    start_logs(cfg.OUTPUT_DIR)
    trainer = build_trainer(cfg, *load_datasets(cfg))
    trainer.register_hooks([Watch(folder)])
    trainer.run()


class SmallDetector(nn.Module):
    """Finds the largest box that an image can have."""

    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, inputs):
        means = torch.stack([self.layer(each["image"].float() / 255).mean() for each in inputs])
        if self.training:
            return {"loss_cls": (means - 0.5).square().mean()}
        results = []
        for each in inputs:
            found = Instances((each["height"], each["width"]))
            found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, each["width"], each["height"]]]))
            found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
            results.append({"instances": found})
        return results


def write_pictures(folder: Path) -> None:
    """Two, in COCO's format."""
    images = [{"id": number, "file_name": f"{number}.png", "height": 16, "width": 16} for number in (1, 2)]
    box = {"category_id": 1, "bbox": [2, 3, 9, 8], "area": 72, "iscrowd": 0}
    annotations = [{"id": number, "image_id": number, **box} for number in (1, 2)]
    categories = [{"id": number, "name": str(number)} for number in range(1, 11)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "two.json").write_text(json.dumps(content))
    for image in images:
        Image.new("RGB", (16, 16)).save(folder / image["file_name"])


def detector(folder: Path) -> None:
    """With workers, evaluations and checkpoints."""
    META_ARCH_REGISTRY.register(SmallDetector)
    write_pictures(folder.parent)
    settings = {"MODEL.META_ARCHITECTURE": "SmallDetector", "DISTILL.METHODS": [], "TEACHER.MODEL.WEIGHTS": ""}
    settings |= {"SOLVER.MAX_ITER": STEPS, "SOLVER.IMS_PER_BATCH": 1, "SOLVER.STEPS": (), "LOG_PERIOD": PERIOD}
    settings |= {"INPUT.MIN_SIZE_TRAIN": (16,), "SOLVER.CHECKPOINT_PERIOD": PERIOD, "TEST.EVAL_PERIOD": 4 * PERIOD}
    entry = {"JSON": str(folder.parent / "two.json"), "IMAGES": str(folder.parent)}
    settings |= {"DATASETS.REGISTER": dict.fromkeys(("two_train", "two_val"), entry)}
    settings |= {"DATASETS.TRAIN": ("two_train",), "DATASETS.TEST": ("two_val",)}
    cfg = tiny_cfg("rcnn", folder, workers=1, **settings)
    prepare_run(cfg, False)
    start_logs(cfg.OUTPUT_DIR)
    register_datasets(cfg)
    trainer = build_detection_trainer(cfg, load_training_set(cfg))
    trainer.register_hooks([Watch(folder)])
    trainer.run()


@pytest.mark.parametrize("train", [classifier, detector])
def test_two_thousand_steps_leave_nothing_behind(tmp_path, monkeypatch, train):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    output = tmp_path / "output.txt"
    assert exit_code(start(train, tmp_path / "run", output=output)) == 0, output.read_text()
    seen = json.loads((tmp_path / "run" / "watched.json").read_text())
    assert len(seen) == STEPS // PERIOD
    warm, later = seen[WARM // PERIOD - 1], seen[WARM // PERIOD :]
    assert max(facts["megabytes"] for facts in later) < warm["megabytes"] + GROWTH
    for name in ("files", "threads", "children", "names"):
        # Two: what an evaluation closes may still be open.
        assert max(facts[name] for facts in later) <= warm[name] + 2, name
    # A period's line has what it had: the log does not write more and more.
    for name in ("log", "metrics"):
        sizes = [facts[name] for facts in seen]
        written = [after - before for before, after in pairwise(sizes)]
        assert max(written[WARM // PERIOD :]) < 1.2 * max(written[: WARM // PERIOD])
    assert len(read_metrics(tmp_path / "run")) == STEPS // PERIOD
