"""Classes of unequal size: weights of the cross-entropy, balanced batches, and what is reported per class."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from d2distill.classification.config import validate
from d2distill.classification.data import build_dataset
from d2distill.classification.data.loader import EpochBatchSampler, FixedSubset
from d2distill.classification.evaluation import AccuracyEvaluator, report_classes
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine.accumulation import accumulate
from d2distill.common.errors import ConfigError, DataError
from tests.classification.distill_models import CLASSES, build, make_batch, make_cfg
from tests.classification.test_soft_targets import soften
from tests.classification.tiny_training import run, small_cfg

WEIGHTS = [0.5, 2.0, 1.0, 0.0, 3.0, 1.0, 1.0, 1.0, 0.25, 1.5]


def cross_entropy(batch, *opts):
    model = build([], *opts).eval()
    logits = model(batch)
    model.train().student.eval()
    return model(batch)["loss_ce"], logits


# ---- weights of the cross-entropy


def test_class_weights_scale_each_image_and_are_divided_by_the_batch_size():
    batch = make_batch(8)
    loss, logits = cross_entropy(batch, "SOLVER.CLASS_WEIGHTS", WEIGHTS)
    each = F.cross_entropy(logits, batch["label"], reduction="none") * torch.tensor(WEIGHTS)[batch["label"]]
    torch.testing.assert_close(loss, each.sum() / 8)


def test_class_weights_of_soft_targets():
    loss, logits = cross_entropy(batch := soften(make_batch(), "INPUT.MIXUP", 0.5), "SOLVER.CLASS_WEIGHTS", WEIGHTS)
    expected = -(torch.tensor(WEIGHTS) * batch["soft_target"] * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_parts_of_a_batch_add_up_to_the_whole():
    """Divided by the sum of its weights, as torch's own mean is, each part would count anew."""
    model = build([], "SOLVER.CLASS_WEIGHTS", WEIGHTS)
    model.student.eval()
    batch = make_batch(5)
    parts = accumulate(lambda batch, step: [(batch, 1.0)], 2)(batch, 0)
    assert len(parts) == 2
    torch.testing.assert_close(sum(w * model(part)["loss_ce"] for part, w in parts), model(batch)["loss_ce"])


def test_balanced_weights_are_scikit_learns(tmp_path, log):
    cfg = small_cfg(tmp_path, SOLVER__CLASS_WEIGHTS="balanced")
    train_set, _ = load_datasets(cfg)
    labels = train_set.labels.numpy()
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    assert len(set(expected)) > 1
    trainer = build_trainer(cfg, *load_datasets(cfg))
    assert "SOLVER.CLASS_WEIGHTS balanced: " in log.text and cfg.SOLVER.CLASS_WEIGHTS == "balanced"
    assert trainer.task.model.class_weights.tolist() == pytest.approx(expected)
    assert "class_weights" not in trainer.task.model.state_dict()


def test_a_class_without_images_has_no_weight(tmp_path):
    cfg = small_cfg(tmp_path, SOLVER__CLASS_WEIGHTS="balanced", DATASETS__TRAIN_SIZE=5)
    train_set, test_set = load_datasets(cfg)
    counts = train_set.samples_per_class()
    assert 0 in counts
    assert build_trainer(cfg, train_set, test_set).task.model.class_weights.tolist() == [
        5 / (10 * count) if count else 0.0 for count in counts
    ]


def test_class_weights_that_do_not_fit():
    with pytest.raises(ConfigError, match="has 2 numbers for 10 classes"):
        build([], "SOLVER.CLASS_WEIGHTS", [1, 2])
    with pytest.raises(ConfigError, match="balanced depends on the data set"):
        build([], "SOLVER.CLASS_WEIGHTS", "balanced")
    for value in ("balance", [1, -1]):
        cfg = make_cfg([], "MODEL.STUDENT.NAME", "resnet8", "SOLVER.CLASS_WEIGHTS", value)
        with pytest.raises(ConfigError, match=r'SOLVER\.CLASS_WEIGHTS is .* must be "balanced", or a list'):
            validate(cfg)


# ---- balanced batches

LABELS = torch.tensor([0] * 90 + [2] * 9 + [3])


def drawn(epochs=1, seed=5, start=0):
    return list(EpochBatchSampler(100, 32, epochs, seed, start, LABELS))


def test_balanced_batches_draw_all_classes_alike():
    batches = drawn(epochs=30)
    assert [len(batch) for batch in batches[:4]] == [32, 32, 32, 4], "an epoch is as long as ever"
    labels = LABELS[[index for batch in batches for _, index in batch]]
    # Of 3000 draws a third each: the standard deviation of a count is 26. Class 1 has no image.
    assert labels.bincount().tolist() == pytest.approx([1000, 0, 1000, 1000], abs=110)
    images = torch.bincount(torch.tensor([index for batch in batches for _, index in batch]), minlength=100)
    assert images[90:99].tolist() == pytest.approx([1000 / 9] * 9, abs=45), "all images of a class alike"


def test_balanced_batches_are_a_function_of_seed_and_epoch():
    whole = drawn(epochs=3)
    assert drawn(epochs=3, start=5) == whole[5:] and drawn(seed=6) != whole[:4]
    assert [i for batch in whole[:4] for _, i in batch] != [i for batch in whole[4:8] for _, i in batch]


def test_a_run_with_balanced_batches(tmp_path):
    trainer = build_trainer(cfg := small_cfg(tmp_path, DATALOADER__SAMPLER="balanced"), *load_datasets(cfg))
    dataset = FixedSubset(build_dataset("digits"), 40)
    expected = EpochBatchSampler(40, 16, 3, cfg.SEED, 4, dataset.labels)
    batches = list(trainer.task.build_batches(4))
    assert [batch["index"].tolist() for batch in batches] == [[index for _, index in batch] for batch in expected]


# ---- per class


def test_confusion_and_accuracy_per_class(tmp_path, log):
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    dataset = FixedSubset(build_dataset("digits"), 20)
    for target, predicted in ([[0, 0, 1], [0, 1, 1]], [[0, 2, 2], [3, 2, 1]]):
        logits = F.one_hot(torch.tensor(predicted), CLASSES).float()
        evaluator.process({"label": torch.tensor(target)}, logits)
    assert evaluator.evaluate()["top1"] == pytest.approx(50.0)
    per_class = report_classes(evaluator, dataset, tmp_path / "confusion.csv")
    assert per_class == {
        "0": pytest.approx(100 / 3), "1": 100.0, "2": 50.0, **dict.fromkeys("3456789"),
    }  # fmt: skip
    assert "Lowest top1 of a class: 0 33.33, 2 50.00, 1 100.00" in log.text
    with (tmp_path / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["true \\ predicted", *"0123456789"] and [row[0] for row in rows] == [*"0123456789"]
    counts = np.array([row[1:] for row in rows], dtype=int)
    assert counts[0].tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 0, 0] and counts[1, 1] == counts[2, 1] == counts[2, 2] == 1
    assert counts.sum() == 6


def test_counts_of_all_ranks(monkeypatch):
    """A rank without a batch counts nothing."""
    evaluators = [AccuracyEvaluator() for _ in range(3)]
    for evaluator in evaluators:
        evaluator.reset()
    for evaluator, target in zip(evaluators, ([0, 1], [1]), strict=False):
        evaluator.process({"label": torch.tensor(target)}, torch.eye(2)[[0] * len(target)])
    gathered = []
    monkeypatch.setattr(
        "d2distill.classification.evaluation.comm.all_gather", lambda own: gathered.append(own) or [own]
    )
    for evaluator in evaluators[:2]:
        evaluator.evaluate()
    with pytest.raises(DataError, match="no test image can be read"):
        evaluators[2].evaluate()
    monkeypatch.setattr("d2distill.classification.evaluation.comm.all_gather", lambda own: gathered)
    assert evaluators[2].evaluate()["top1"] == pytest.approx(100 / 3)
    assert evaluators[2].per_class.tolist() == [100.0, 0.0] and evaluators[2].pairs.tolist() == [[0, 1, 1], [0, 0, 0]]


def test_a_run_leaves_its_confusion_and_per_class_accuracy(tmp_path):
    cfg = small_cfg(tmp_path, SOLVER__EMA_DECAY=0.5, DISTILL__METHODS=[], SOLVER__EPOCHS=1, SOLVER__STEPS=[])
    results = run(cfg)
    written = json.loads((tmp_path / "results.json").read_text())
    with (tmp_path / "confusion.csv").open() as file:
        _, *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], dtype=int)
    # Of the student itself, not of its average, which was evaluated last.
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(results["top1"]) and counts.sum() == 500
    expected = 100 * np.diag(counts) / counts.sum(1)
    assert list(written["per_class"].values()) == pytest.approx(expected) and [*written["per_class"]] == [*"0123456789"]
    assert "per_class" not in run(cfg, resume=True), "which is no metric"
    assert "Lowest top1 of a class: " in (tmp_path / "log.txt").read_text()
