"""What distillation adds to a detector's step."""

import pytest
import torch

from d2distill.tools import detection_step
from tests.detection.tiny_detectors import small_cfg


def test_a_random_batch_is_one_of_a_training():
    cfg = small_cfg("reviewkd_r101_r18_mask")
    batch = detection_step.random_batch(cfg, 3, (64, 96), boxes=5)
    assert [x["image"].shape for x in batch] == [(3, 64, 96)] * 3 and batch[0]["image"].dtype == torch.uint8
    for record in batch:
        boxes = record["instances"].gt_boxes.tensor
        assert (boxes[:, 2:] - boxes[:, :2] >= 8).all() and (boxes >= 0).all()
        assert (boxes <= torch.tensor([96, 64, 96, 64])).all() and len(record["instances"].gt_masks) == 5
        assert (record["instances"].gt_classes < 5).all()
    again = detection_step.random_batch(cfg, 3, (64, 96), boxes=5)
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(batch, again, strict=True))
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


@pytest.mark.parametrize("name", ["dkd_r101_r18", "retinanet_bckd_r101_r50"])
def test_each_part_of_a_step_runs(name):
    cfg = small_cfg(name, **{"TEACHER.MODEL.WEIGHTS": "not there"})
    steps = detection_step.build_steps(cfg, detection_step.random_batch(cfg, 2, (64, 64)))
    assert list(steps) == ["plain", "distilled", "teacher", "teacher_backbone"]
    times = detection_step.median_times(steps, repeats=1, warm_up=0)
    assert times.keys() == steps.keys() and all(ms > 0 for ms in times.values())


def test_the_share_that_is_added():
    share = detection_step.added_share({"plain": 10.0, "distilled": 16.0, "teacher": 8.0, "teacher_backbone": 5.0})
    assert share == {
        "added_ms": 6.0,
        "added_per_plain": 0.6,
        "added_per_teacher": 0.75,
        "beyond_backbone_ms": 1.0,
    }
