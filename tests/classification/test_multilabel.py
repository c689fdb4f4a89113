"""Images with several classes each: CSV files, the loss, average precision, and which methods take them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from d2distill.classification.config import load_cfg, validate
from d2distill.classification.data import build_dataset, dataset_info
from d2distill.classification.data.splits import load_splits, split_positions
from d2distill.classification.evaluation import AveragePrecisionEvaluator, average_precision
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model
from d2distill.classification.trainer import build_trainer, evaluate, load_datasets, train
from d2distill.common.distillers import DISTILLERS, bckd_loss
from d2distill.common.engine.seeding import seed_step
from d2distill.common.errors import ConfigError, DataError, DivergedError
from tests.classification.distill_models import make_cfg
from tests.goldens.fill import array

NAMES = ["red", "green", "blue"]


def write_colors(root, n_train=24, n_val=12, lists=False):
    """Images whose red, green and blue are high where they have the class of that name."""
    rng = np.random.default_rng(0)
    written = {}
    for split, n in (("train", n_train), ("val", n_val)):
        labels = rng.integers(0, 2, (n, 3))
        lines = ["file,labels" if lists else f"file,{','.join(NAMES)}"]
        for number, label in enumerate(labels):
            file = f"images/{split}_{number}.png"
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(40 + 160 * label + rng.integers(-40, 40, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            names = "|".join(name for name, has in zip(NAMES, label, strict=True) if has)
            lines.append(f"{file},{names if lists else ','.join(map(str, label))}")
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
        written[split] = labels
    return written


def cfg_of(root, *opts):
    return load_cfg("", [
        "DATASETS.NAME", "multilabel", "DATASETS.ROOT", str(root), "MODEL.STUDENT.NAME", "cifar/resnet8",
        "INPUT.SIZE", 32, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, *opts,
    ])  # fmt: skip


# ---- CSV files


def test_columns_of_zeros_and_ones(tmp_path):
    written = write_colors(tmp_path)
    for split, labels in written.items():
        dataset = build_dataset("multilabel", tmp_path, split)
        assert dataset.classes == NAMES and np.array_equal(dataset.labels.numpy(), labels)
        image, label = dataset.load(3)
        assert label.dtype == torch.float32 and label.tolist() == labels[3].tolist()
        means = np.asarray(image).mean((0, 1))
        assert ((means > 120) == labels[3]).all()


def test_lists_of_names(tmp_path):
    written = write_colors(tmp_path, lists=True)
    order = [NAMES.index(name) for name in ("blue", "green", "red")]
    for split, labels in written.items():
        dataset = build_dataset("multilabel", tmp_path, split)
        assert dataset.classes == ["blue", "green", "red"]
        assert np.array_equal(dataset.labels.numpy(), labels[:, order])


def test_classes_go_by_name_and_their_order_is_a_setting(tmp_path):
    labels = write_colors(tmp_path)["val"]
    rows = [line.split(",") for line in (tmp_path / "val.csv").read_text().split()]
    (tmp_path / "val.csv").write_text("\n".join(",".join(row[i] for i in (0, 3, 1)) for row in rows))
    # Without a column for it no image has the class.
    assert np.array_equal(build_dataset("multilabel", tmp_path, "val").labels.numpy(), labels * [1, 0, 1])
    train_set, val_set = load_splits(cfg_of(tmp_path, "DATASETS.CLASSES", ["blue", "red", "green"]))
    assert train_set.classes == val_set.classes == ["blue", "red", "green"]
    assert val_set.load(2)[1].tolist() == [labels[2, 2], labels[2, 0], 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,a\nx.png,1\n", r"first line must be .*file,<class>.* but is \['image', 'a'\]"),
        ("", "first line must be"),
        ("file,a,b\nx.png,1\n", "row 2: 2 columns, but the first line has 3"),
        ("file,a,b\nx.png,1,0\ny.png,1,2\n", "row 3: '2' is neither 0 nor 1"),
        ("file,a,a\nx.png,1,0\n", "names a class twice"),
        ("file,a,b\n", "no images"),
    ],
)
def test_wrong_csv(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        build_dataset("multilabel", tmp_path, "train")


def test_missing_csv_and_unknown_classes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.csv\. .*\"file,labels\""):
        build_dataset("multilabel", tmp_path, "train")
    write_colors(tmp_path, lists=True)
    (tmp_path / "val.csv").write_text("file,labels\nimages/val_0.png,red|pink\n")
    with pytest.raises(DataError, match=r"val\.csv has classes that train\.csv does not have: pink$"):
        build_dataset("multilabel", tmp_path, "val")


def test_one_csv_is_divided_with_a_share_of_each_class(tmp_path):
    write_colors(tmp_path, n_train=60)
    (tmp_path / "val.csv").unlink()
    train_set, val_set = load_splits(cfg_of(tmp_path, "DATASETS.VAL_FRACTION", 0.25))
    assert sorted([*train_set.positions, *val_set.positions]) == list(range(60))
    whole = build_dataset("multilabel", tmp_path, "train").samples_per_class()
    assert val_set.samples_per_class() == pytest.approx([0.25 * count for count in whole], abs=3)


def test_rare_classes_are_in_both_parts():
    class Dataset:
        info, num_classes = dataset_info("multilabel"), 3
        labels = torch.zeros(40, 3, dtype=torch.bool)

        def __len__(self):
            return 40

    dataset = Dataset()
    dataset.labels[:, 0] = True
    dataset.labels[:2, 1] = True
    dataset.labels[1:4, 2] = True
    for seed in range(20):
        training, validation = split_positions(dataset, 0.1, seed)
        assert dataset.labels[training].any(0).all() and dataset.labels[validation].any(0).all()


# ---- the loss and the methods


def model_and_batch(methods=(), *opts, n=6):
    cfg = make_cfg(list(methods), "DATASETS.NAME", "multilabel", "INPUT.SIZE", 32, "MODEL.NUM_CLASSES", 3, *opts)
    torch.manual_seed(0)
    networks = [build_model(name, 3, image_size=32) for name in ("cifar/resnet8", "cifar/resnet14")]
    model = build_distiller(cfg, *networks, num_samples=40).train()
    model.student.eval()
    batch = {"image": (array(1, n, 3, 32, 32) * 60 + 120).clamp(0, 255), "index": torch.arange(n)}
    batch["label"] = (array(2, n, 3) > 0).float()
    batch["label"][0] = 0
    return model, batch


def test_the_loss_is_the_mean_over_images_and_classes():
    model, batch = model_and_batch()
    logits = model.student(model.student_norm(batch["image"]))
    loss = model(batch)["loss_ce"]
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, batch["label"]))
    loss.backward()
    assert model({name: part[:0] for name, part in batch.items()})["loss_ce"] == 0


def test_class_weights_are_those_of_positives(tmp_path):
    weights = [0.5, 1.0, 4.0]
    model, batch = model_and_batch((), "SOLVER.CLASS_WEIGHTS", weights)
    logits = model.student(model.student_norm(batch["image"]))
    expected = F.binary_cross_entropy_with_logits(logits, batch["label"], pos_weight=torch.tensor(weights))
    torch.testing.assert_close(model(batch)["loss_ce"], expected)
    labels = write_colors(tmp_path)["train"]
    cfg = cfg_of(tmp_path, "SOLVER.CLASS_WEIGHTS", "balanced")
    weights = build_trainer(cfg, *load_datasets(cfg)).task.model.class_weights
    assert weights.tolist() == pytest.approx((24 - labels.sum(0)) / labels.sum(0))


def test_bckd_counts_every_image():
    model, batch = model_and_batch(["BCKD"])
    student = model.student(model.student_norm(batch["image"]))
    teacher = model.teacher(model.teacher_norms[0](batch["image"]))
    loss = model(batch)["loss_bckd"]
    p, q = student.sigmoid(), teacher.sigmoid()
    expected = ((p - q).abs() * F.binary_cross_entropy(p, q, reduction="none")).sum(1).mean()
    torch.testing.assert_close(loss, model.distillers["bckd"].cfg.WEIGHT * expected)
    torch.testing.assert_close(bckd_loss(student, teacher, None), bckd_loss(student, teacher, torch.zeros(6).long()))


@pytest.mark.parametrize("name", [name for name, _ in DISTILLERS])
def test_methods_take_several_classes_or_refuse(name):
    method = DISTILLERS.get(name)
    if method.takes_soft_target and (method.takes_sigmoid or "logits" not in method.needs):
        model, batch = model_and_batch([name])
        assert model(batch)[f"loss_{name.lower()}"].isfinite()
        return
    reason = (
        "takes a softmax" if method.takes_soft_target else r"the one class of each image, but these have several; .* AT"
    )
    with pytest.raises(ConfigError, match=rf"DISTILL\.(METHODS|{name.upper()}): {name} .*{reason}.*BCKD") as error:
        model_and_batch([name])
    assert "KD, DIST" not in str(error.value), "which cannot either"


@pytest.mark.parametrize(
    ("key", "value"),
    [("INPUT.MIXUP", 0.2), ("INPUT.CUTMIX", 1.0), ("SOLVER.LABEL_SMOOTHING", 0.1), ("DATALOADER.SAMPLER", "balanced")],
)
def test_settings_for_one_class_are_refused(key, value):
    cfg = make_cfg([], "MODEL.STUDENT.NAME", "resnet8", "DATASETS.NAME", "multilabel", key, value)
    with pytest.raises(
        ConfigError, match=rf"^{key}.*: needs images of one class each, but those of multilabel have several"
    ):
        validate(cfg)


# ---- average precision


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_average_precision_is_scikit_learns(levels):
    """With ties too, which few levels have."""
    rng = np.random.default_rng(levels)
    for n in (1, 7, 200):
        scores, targets = rng.integers(0, levels, n).astype(np.float32), rng.random(n) < 0.3
        targets[0] = True
        found = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
        assert found.item() == pytest.approx(average_precision_score(targets, scores))


def test_mean_average_precision_over_batches_and_ranks(monkeypatch):
    logits, targets = array(3, 50, 4), array(4, 50, 4) > 0.5
    targets[:, 2] = False
    evaluators = [AveragePrecisionEvaluator() for _ in range(3)]
    gathered, all_gather = [], "d2distill.classification.evaluation.comm.all_gather"
    monkeypatch.setattr(all_gather, lambda own: gathered.append(own) or [own])
    for evaluator in evaluators:
        evaluator.reset()
    for evaluator, rows in ((0, slice(0, 20)), (0, slice(20, 30)), (1, slice(30, 50))):
        evaluators[evaluator].process({"label": targets[rows].float()}, logits[rows])
    for evaluator in evaluators[:2]:
        evaluator.evaluate()
    with pytest.raises(DataError, match="no test image can be read"):
        evaluators[2].evaluate()
    monkeypatch.setattr(all_gather, lambda own: gathered)
    results = evaluators[2].evaluate()
    each = [average_precision_score(targets[:, c], logits[:, c]) for c in (0, 1, 3)]
    loss = F.binary_cross_entropy_with_logits(logits, targets.float()).item()
    assert results == {"mAP": pytest.approx(100 * np.mean(each)), "test_loss": pytest.approx(loss)}
    assert evaluators[2].per_class.tolist() == pytest.approx(
        [100 * v for v in (*each[:2], np.nan, each[2])], nan_ok=True
    )


def test_no_average_precision_of_logits_that_are_not_finite():
    evaluator = AveragePrecisionEvaluator()
    evaluator.reset()
    evaluator.process({"label": torch.ones(2, 2)}, torch.tensor([[0.0, float("nan")], [0.0, 0.0]]))
    with pytest.raises(DivergedError, match="logits of 1 of 2 test images are not finite"):
        evaluator.evaluate()


# ---- a run


def test_a_student_is_distilled_by_bckd(tmp_path):
    write_colors(tmp_path)
    opts = [
        "OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.EPOCHS", 8, "SOLVER.STEPS", [], "SOLVER.IMS_PER_BATCH", 8,
        "INPUT.AUGMENTATION", "none", "SOLVER.ACCUMULATE", 2, "MODEL.TEACHER.NAME", "cifar/resnet8",
        "DISTILL.METHODS", ["BCKD", "AT"], "DISTILL.BCKD.WEIGHT", 0.1, "TEST.EVAL_PERIOD", 8,
    ]  # fmt: skip
    seed_step(0, 0)
    torch.save(build_model("cifar/resnet8", 3, image_size=32).state_dict(), tmp_path / "teacher.pth")
    teacher = ["MODEL.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")]
    results = train(cfg_of(tmp_path, *opts, *teacher))

    assert set(results) == {"mAP", "test_loss", "best_mAP"} and results["mAP"] > 90
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    # Of random weights it is about the share of each class.
    assert 30 < written["teacher_mAP"] < 80 and "near chance" in (tmp_path / "run" / "log.txt").read_text()
    assert [*written["per_class"]] == NAMES and np.mean([*written["per_class"].values()]) == pytest.approx(
        results["mAP"]
    )
    assert not (tmp_path / "run" / "confusion.csv").exists()
    weights = ["MODEL.STUDENT.WEIGHTS", str(tmp_path / "run" / "student_final.pth")]
    assert evaluate(cfg_of(tmp_path, *opts, *weights)) == {k: results[k] for k in ("mAP", "test_loss")}
