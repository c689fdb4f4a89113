"""The page of a run, and what is measured for it."""

import csv
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from d2distill.classification.data import AugmentedDataset
from d2distill.classification.modeling import build_distiller
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.engine import report
from d2distill.common.engine.run_folder import read_metrics
from d2distill.common.errors import ConfigError
from d2distill.tools.report import main
from tests.classification.tiny_training import run, small_cfg
from tests.report_pages import Page, open_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A plain run, and one that has it as its teacher and is compared with it."""
    folder = tmp_path_factory.mktemp("runs")
    run(small_cfg(folder / "plain", MODEL__STUDENT__NAME="wrn_16_1", DISTILL__METHODS=[], SOLVER__EPOCHS=1))
    run(distilled(folder))
    return folder


def distilled(folder, **settings):
    weights = str(folder / "plain" / "student_final.pth")
    options = {"REPORT__ENABLED": True, "REPORT__BASELINE": str(folder / "plain"), "SOLVER__EMA_DECAY": 0.5}
    options |= {"SOLVER__EPOCHS": 2, "TEST__EVAL_PERIOD": 2}
    return small_cfg(folder / "<b>run", MODEL__TEACHER__WEIGHTS=weights, **options, **settings)


def words(text):
    return " ".join(text.split())


def test_a_page_that_needs_nothing_else(runs):
    folder = runs / "<b>run"
    page = open_page(folder / report.REPORT)
    assert list(page.sections)[1:] == [
        "Results", "Curves", "Classes", "Test images of the highest loss", "What differs from the defaults", "Cost",
        "Run it again", "Environment",
    ]  # fmt: skip
    assert "script" not in page.tags and all(value.startswith("data:image/png") for value in page.references)
    # A folder's name is text.
    assert "<b>run classification · resnet8 · distilled by KD, DKD · on digits" in words(page.sections[""])
    results = json.loads((folder / "results.json").read_text())
    table = words(page.sections["Results"])
    for name in ("Teacher wrn_16_1", "Student , last", "Its average (EMA), last", "Baseline, last plain"):
        assert name in table
    for name in ("top1", "best_top1", "ema_top5", "teacher_top1"):
        assert f"{results[name]:.2f}" in table
    for name in ("top-1 %", "teacher", "baseline", "losses", "test_loss", "learning rate"):
        assert name in page.sections["Curves"]
    differs = words(page.sections["What differs from the defaults"])
    assert "DISTILL.DKD.WARMUP 20 2" in differs and "DISTILL.AT" not in differs
    for name in ("parameters", "flops", "teacher_parameters", "teacher_flops"):
        assert f"{results[name]:,}" in page.sections["Cost"]
    assert f"'{folder}/config.yaml' OUTPUT_DIR" in page.sections["Run it again"]
    assert "PyTorch" in page.sections["Environment"]


def test_the_confusion_matrix_is_on_the_page(runs):
    page = Page((runs / "<b>run" / report.REPORT).read_text())
    with open(runs / "<b>run" / "confusion.csv", newline="") as file:
        _, *rows = csv.reader(file)
    shown = words(page.sections["Classes"]).split("right. 0 1 2 3 4 5 6 7 8 9 ")[1].replace(" %", "").split()
    expected = [
        word
        for i, (label, *counts) in enumerate(rows)
        for word in (label, *(c for c in counts if c != "0"), f"{100 * int(counts[i]) / sum(map(int, counts)):.1f}")
    ]
    assert shown == expected


def test_test_loss_and_the_worst_images_are_the_last_students(runs):
    """Not its average's, which is evaluated after it."""
    cfg = small_cfg(runs / "any", DISTILL__METHODS=[])
    _, test_set = load_datasets(cfg)
    model = build_distiller(cfg).eval()
    model.student.load_state_dict(torch.load(runs / "<b>run" / "student_final.pth", weights_only=True)["model"])
    samples = AugmentedDataset(test_set, cfg.INPUT.SIZE)
    images = torch.stack([samples[index]["image"] for index in range(len(test_set))])
    with torch.no_grad():
        logits = model({"image": images})
    losses = F.cross_entropy(logits, test_set.labels, reduction="none")
    assert read_metrics(runs / "<b>run")[-1]["test_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    rows = json.loads((runs / "<b>run" / "report.json").read_text())["worst"]
    order = torch.tensor([row["index"] for row in rows])
    assert torch.allclose(losses[order], losses.topk(len(rows)).values, rtol=1e-4) and len(set(order.tolist())) == 14
    assert [row["predicted"] for row in rows] == [str(int(label)) for label in logits[order].argmax(1)]
    assert [row["true"] for row in rows] == [str(int(label)) for label in test_set.labels[order]]


def test_training_accuracy_is_that_of_the_students_logits(runs):
    cfg = small_cfg(runs / "any")
    model = build_distiller(cfg, num_samples=40).train()
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    label = torch.arange(8)
    model({"image": images, "label": label, "index": label})
    # In training mode once more: the batch's own statistics.
    hits = (model.student.outputs(model.student_norm(images)).logits.argmax(1) == label).double().mean()
    assert model.step_metrics["train_top1"].item() == pytest.approx(100 * hits.item())
    assert all("train_top1" in line for line in read_metrics(runs / "<b>run"))


@pytest.mark.parametrize(
    "settings", [{"INPUT__MIXUP": 0.2, "DISTILL__METHODS": ["KD"]}, {"DISTILL__METHODS": ["SimKD"]}]
)
def test_no_training_accuracy_where_it_would_mean_nothing(tmp_path, settings):
    """Mixed images have no one class; a method may deploy other logits than those of the training."""
    cfg = small_cfg(tmp_path, **settings)
    trainer = build_trainer(cfg, *load_datasets(cfg))
    trainer.model.step_metrics = {"train_top1": torch.zeros(())}
    assert trainer.task.step_metrics() == {}


def test_the_tool_writes_it_anew_and_a_finished_run_once(runs, command, log):
    path = runs / "<b>run" / report.REPORT
    before = path.read_text()
    path.unlink()
    code, output, _ = command(main, runs / "<b>run")
    assert code == 0 and output.split("\n")[0] == str(path) and path.read_text() == before
    path.unlink()
    # Where it logs may be another place than before.
    run(distilled(runs, LOGGERS=["csv"]), resume=True)
    assert path.read_text() == before
    # A run of an older version has fewer files; and this one no baseline.
    for name in ("report.json", "confusion.csv", "environment.txt"):
        (runs / "plain" / name).unlink(missing_ok=True)
    assert command(main, runs / "plain", "--baseline", runs / "<b>run")[0] == 0
    assert "Baseline, last <b>run" in words(Page((runs / "plain" / report.REPORT).read_text()).sections["Results"])
    code, _, error = command(main, runs)
    assert code == 2 and "name the folder of a run that has ended" in error


def test_a_report_that_fails_does_not_fail_the_run(runs, log, monkeypatch):
    def fail(folder, defaults, baseline):
        raise ValueError("a bad picture")

    path = runs / "<b>run" / report.REPORT
    path.unlink()
    monkeypatch.setattr(report.page, "build_report", fail)
    assert run(distilled(runs), resume=True)["top1"] >= 0
    assert "report.html is not written (ValueError: a bad picture)" in log.text and not path.exists()


@pytest.mark.parametrize("classes", [5, 31])
def test_of_many_classes_the_lowest_are_shown(runs, tmp_path, classes):
    names = [f"class {i}" for i in range(classes)]
    matrix = [[9 if i == j else 7 if (i, j) == (3, 4) else 0 for j in range(classes)] for i in range(classes)]
    for file in ("config.yaml", "metrics.json"):
        (tmp_path / file).write_text((runs / "plain" / file).read_text())
    with open(tmp_path / "confusion.csv", "w", newline="") as file:
        csv.writer(file).writerows([["", *names], *([name, *row] for name, row in zip(names, matrix, strict=True))])
    results = {"top1": 50.0, "best_top1": 50.0, "steps": 3, "per_class": {n: 10.0 + i for i, n in enumerate(names)}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = words(Page(report.build_report(tmp_path, {})).sections["Classes"])
    if classes == 5:
        assert "class 3 9 7 56.2 %" in text
    else:
        assert "15 of 31 classes, from the lowest" in text and "class 14 24.00" in text and "class 15 " not in text
        assert "class 3 class 4 7" in text


def test_a_logger_that_there_is_not(tmp_path):
    with pytest.raises(
        ConfigError, match=r"LOGGERS is \['wandbb'\], but must be a list of tensorboard, csv, wandb and"
    ):
        small_cfg(tmp_path, LOGGERS=["wandbb"])


def test_a_baseline_without_results_is_passed_over(runs, log):
    page = Page(report.build_report(runs / "plain", {}, Path("nowhere")))
    assert "has no baseline: nowhere has no results.json" in log.text and "Baseline" not in page.sections["Results"]
