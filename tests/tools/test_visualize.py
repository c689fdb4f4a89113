"""Figures of runs: what is drawn, and what the command says where it cannot draw."""

import functools
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from d2distill.classification.trainer import train
from d2distill.common.engine.checkpoint import save_student
from d2distill.common.errors import ConfigError, DataError, MissingDependencyError
from d2distill.deployed import load
from d2distill.detection.config import get_cfg as get_detection_cfg
from d2distill.tools.visualizations import attention, curves, features, style
from d2distill.tools.visualizations.classifiers import Classifier, load_lineup
from d2distill.tools.visualize import main as visualize
from tests.classification.tiny_training import small_cfg

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ALONE = {"DISTILL.METHODS": [], "MODEL.TEACHER.NAME": ""}


def write_run(folder, cfg, lines, **results):
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def logged(*accuracies, **more):
    """An evaluation in each epoch, and the losses and the learning rate of a step in between."""
    lines = []
    for epoch, value in enumerate(accuracies, 1):
        lines.append(
            {"epoch": epoch - 0.5, "iteration": 2 * epoch - 2, "total_loss": 3.0, "loss_ce": 3.0, "lr": 0.1, **more}
        )
        lines.append({"epoch": epoch, "iteration": 2 * epoch - 1, "top1": value, "best_top1": value})
    return lines


@pytest.fixture
def logs(tmp_path):
    """Two seeds of a plain student, one of which logged less, and one distilled run with its teacher measured."""
    accuracies = {0: (10, 40, 70), 1: (20, 60), 2: (5, 50, 80)}
    cfgs = {seed: small_cfg(tmp_path / f"plain_{seed}", SEED=seed, **ALONE) for seed in (0, 1)}
    cfgs[2] = small_cfg(tmp_path / "distilled", SEED=0, DISTILL__METHODS=["KD"])
    more = {2: {"loss_kd": 1.5}}
    facts = {2: {"teacher_top1": 91.25, "teacher_top5": 99.0}}
    return [
        write_run(Path(cfg.OUTPUT_DIR), cfg, logged(*accuracies[i], **more.get(i, {})), **facts.get(i, {}))
        for i, cfg in cfgs.items()
    ]


# ---- learning curves


def test_runs_of_several_seeds_are_a_line_with_a_band(logs):
    figure = curves.curves_figure(logs)
    accuracy, *others = figure.axes
    plain, distilled, teacher = accuracy.lines
    # The epochs that both seeds have logged.
    assert plain.get_xydata().tolist() == [[1, 15], [2, 50]]
    assert distilled.get_xydata().tolist() == [[1, 5], [2, 50], [3, 80]]
    (band,) = accuracy.collections
    assert {(x, y) for x, y in band.get_paths()[0].vertices.tolist()} == {(1, 10), (1, 20), (2, 40), (2, 60)}
    assert list(teacher.get_ydata()) == [91.25, 91.25]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "resnet8 (2 seeds): 50.0 at the end",
        "resnet8, KD from wrn_16_1: 80.0 at the end",
        "teacher wrn_16_1: 91.2",
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "test top-1 (%)", "total loss, training", "loss_ce, training", "loss_kd, training", "learning rate"
    ]  # fmt: skip
    assert [len(axes.lines) for axes in others] == [2, 2, 1, 2]
    assert "epoch" == others[0].get_xlabel() and "digits" in figure.get_suptitle()


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(logs, tmp_path):
    other = small_cfg(
        tmp_path / "lower", SEED=0, **{"DISTILL.METHODS": [], "MODEL.TEACHER.NAME": "", "SOLVER.BASE_LR": 0.01}
    )
    folder = write_run(tmp_path / "lower", other, logged(30, 35, train_top1=60.0))
    figure = curves.curves_figure([*logs[:2], folder, folder])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["resnet8 (plain_0) (2 seeds): 50.0 at the end", "resnet8 (lower): 35.0 at the end"]
    # The only loss is the total.
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "test top-1 (%)", "loss_ce, training", "training top-1 (%)", "learning rate"
    ]  # fmt: skip


def test_detectors_are_drawn_over_iterations(tmp_path):
    cfg = get_detection_cfg()
    lines = [{"iteration": 19, "total_loss": 2.0, "lr": 0.1}, {"iteration": 39, "bbox/AP": 12.5, "best_bbox/AP": 12.5}]
    lines[1] |= {"bbox/AP50": 30.0, "best_bbox/AP50": 30.0}
    figure = curves.curves_figure([write_run(tmp_path / "fpn_seed3", cfg, lines)])
    assert figure.axes[0].get_ylabel() == "test box AP (%)" and figure.axes[0].get_xlabel() == "iteration"
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[40, 12.5]]
    assert figure.legends[0].get_texts()[0].get_text() == "fpn: 12.5 at the end"


# ---- what networks make of the test images


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders: a teacher, a plain student, and one that it taught, all of them hardly trained."""
    root = tmp_path_factory.mktemp("runs")
    settings = {"SOLVER.EPOCHS": 1, "SOLVER.STEPS": [], "DATASETS.TRAIN_SIZE": 16, "INPUT.SIZE": 32}
    weights = str(root / "teacher" / "student_final.pth")
    train(small_cfg(root / "teacher", **settings, **ALONE, **{"MODEL.STUDENT.NAME": "wrn_16_1"}))
    train(small_cfg(root / "plain", **settings, **ALONE))
    train(small_cfg(root / "taught", **settings, **{"DISTILL.METHODS": ["KD"], "MODEL.TEACHER.WEIGHTS": weights}))
    return {name: root / name for name in ("teacher", "plain", "taught")}


@functools.cache
def reference(folder, samples):
    """Logits, pooled vectors and classes of so many test images, by the student of a folder."""
    model, dataset = load(folder), load_lineup([folder]).test_set(samples)
    images = [dataset.load(index) for index in range(len(dataset))]
    with torch.inference_mode():
        outputs = model.network.outputs(model.preprocess.normalize(torch.stack([image for image, _ in images])))
    return outputs.logits.double().numpy(), outputs.pooled.numpy(), np.array([label for _, label in images])


def test_correlation_is_the_difference_of_the_networks_own(runs):
    figure = features.correlation_figure([runs["plain"], runs["taught"]], samples=100)
    teacher, *students = (np.corrcoef(reference(runs[name], 100)[0].T) for name in ("teacher", "plain", "taught"))
    for axes, student, name in zip(figure.axes, students, ("resnet8", "resnet8, KD from wrn_16_1"), strict=False):
        drawn = axes.images[0].get_array()
        np.testing.assert_allclose(drawn, teacher - student, atol=1e-4)
        assert not np.diag(drawn).any()
        assert axes.get_title() == f"{name}\nmean |difference| {np.abs(teacher - student).mean():.3f}"
    limits = {axes.images[0].get_clim() for axes in figure.axes[:2]}
    assert len(limits) == 1 and sum(*limits) == 0
    assert "teacher wrn_16_1 minus student, 100 test images of digits" in figure.get_suptitle()


def test_mean_logits_as_mdistillers_notebook(runs):
    figure = features.correlation_figure([runs["taught"]], samples=100, of_means=True)
    means = []
    for name in ("teacher", "taught"):
        logits, _, labels = reference(runs[name], 100)
        means.append(np.stack([logits[labels == c].mean(0) for c in range(10)]))
    difference = np.abs(means[0] - means[1])
    np.fill_diagonal(difference, 0)
    np.testing.assert_allclose(np.abs(figure.axes[0].images[0].get_array()), difference, atol=1e-4)
    assert f"mean |difference| {difference.mean():.3f}" in figure.axes[0].get_title()


def test_tsne_shows_the_same_samples_in_the_same_colors(runs, monkeypatch):
    given = []

    def fit_transform(self, vectors):
        given.append(vectors)
        return np.stack([np.arange(len(vectors)), vectors[:, 0]], 1)

    monkeypatch.setattr("sklearn.manifold.TSNE.fit_transform", fit_transform)
    figure = features.tsne_figure([runs["plain"], runs["taught"]], samples=60)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == [
        "teacher wrn_16_1", "resnet8", "resnet8, KD from wrn_16_1"
    ]  # fmt: skip
    # Of each class which samples are drawn, and how: the first coordinate is the sample's number.
    drawn = [
        [(*part.get_offsets()[:, 0].tolist(), *part.get_facecolor().ravel().tolist()) for part in axes.collections]
        for axes in figure.axes
    ]
    assert drawn[0] == drawn[1] == drawn[2] and len(drawn[0]) == 10 and sum(len(part) - 4 for part in drawn[0]) == 60
    assert [vectors.shape for vectors in given] == [(60, 64)] * 3
    np.testing.assert_allclose(given[1], reference(runs["plain"], 60)[1], atol=1e-4)
    given.clear()
    chosen = features.tsne_figure([runs["plain"]], classes=["3", "8"], samples=1000)
    assert len(chosen.axes) == 1 and len(chosen.axes[0].collections) == 2
    assert [len(vectors) for vectors in given] == [
        np.isin(load_lineup([runs["plain"]]).test_set().labels, (3, 8)).sum()
    ]


def test_tsne_repeats(runs):
    first, second = (features.tsne_figure([runs["plain"]], samples=30).axes[0].collections for _ in range(2))
    assert all((a.get_offsets() == b.get_offsets()).all() for a, b in zip(first, second, strict=True))


def test_confusion_of_the_log_and_of_the_weights(runs):
    logged, computed = (features.confusion_figure([runs["plain"] / name]) for name in ("", "student_final.pth"))
    counts = np.zeros((10, 10))
    logits, _, labels = reference(runs["plain"], 500)
    np.add.at(counts, (labels, logits.argmax(1)), 1)
    for figure in (logged, computed):
        np.testing.assert_allclose(figure.axes[0].images[0].get_array(), 100 * counts / counts.sum(1, keepdims=True))
        assert f"top-1 {100 * counts.trace() / 500:.1f} %" in figure.axes[0].get_title()
    assert "last evaluation" in logged.axes[0].get_title() and "student_final.pth" in computed.axes[0].get_title()
    both = features.confusion_figure([runs["plain"]], teacher=runs["teacher"])
    assert [axes.get_title().split("\n")[0] for axes in both.axes[:2]] == ["wrn_16_1", "resnet8"]


def test_attention(runs, tmp_path):
    maps = [torch.tensor([[[[1.0, 2]], [[3, 4]]]]), torch.ones(1, 2, 1, 1)]
    network = Classifier("net", None, None, None)
    assert attention.attention_map(network, maps, 0).tolist() == [[[5, 10]]]
    with pytest.raises(ConfigError, match="--stage 2: net has 2 feature maps, 0 to 1"):
        attention.attention_map(network, maps, 2)
    with pytest.raises(DataError, match="net has no feature maps"):
        attention.attention_map(network, None)

    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    figure = attention.attention_figure([runs["taught"]], pictures=[tmp_path / "red.png"])
    picture, teacher, student, _ = figure.axes
    assert (picture.images[0].get_array() == (200, 30, 30)).all() and picture.get_title() == "picture\nred.png"
    model = load(runs["taught"])
    outputs = model.network.outputs(model.preprocess(tmp_path / "red.png")[None])
    expected = outputs.feats[-1].square().mean(1)[0].detach().numpy()
    np.testing.assert_allclose(student.images[1].get_array(), expected / expected.max(), rtol=1e-5)
    chosen, probability = outputs.logits.argmax().item(), outputs.logits.softmax(1).max().item()
    assert student.get_title() == f"resnet8, KD from wrn_16_1\npredicts {chosen}, {probability:.0%}"
    assert teacher.get_title().startswith("teacher wrn_16_1\npredicts")
    figure = attention.attention_figure([runs["taught"]], samples=2, stage=1)
    assert [axes.get_title()[-7:-2] for axes in figure.axes[0:6:3]] == ["class"] * 2


def test_the_teacher_may_be_named(runs):
    lineup = load_lineup([runs["plain"]], teacher=runs["teacher"])
    assert [network.label for network in lineup.networks] == ["teacher wrn_16_1", "resnet8"]
    lineup = load_lineup([runs["taught"]], opts=["MODEL.TEACHER.WEIGHTS", str(runs["plain"] / "student_final.pth"),
                                                 "MODEL.TEACHER.NAME", "resnet8"])  # fmt: skip
    assert lineup.teacher.label == "teacher resnet8"
    with pytest.raises(ConfigError, match=r"no teacher: .* --teacher"):
        load_lineup([runs["plain"]]).need_teacher()


def test_weights_alone(runs, tmp_path):
    """A student's file elsewhere has a teacher and pictures only where they are named."""
    shutil.copy(runs["taught"] / "student_final.pth", tmp_path)
    lineup = load_lineup([tmp_path / "student_final.pth"])
    assert lineup.teacher is None and lineup.students[0].label == "resnet8"
    with pytest.raises(ConfigError, match=r"no config\.yaml beside the weights"):
        lineup.test_set()
    assert len(load_lineup([runs["plain"], tmp_path / "student_final.pth"]).students) == 2


# ---- the command


def test_the_command_writes_figures_of_1200_pixels(runs, tmp_path, command):
    code, out, error = command(
        visualize, "confusion", runs["plain"], "--output", tmp_path, "DATASETS.NAME", "digits", "--device", "cpu"
    )
    assert (code, error) == (0, "") and out.split() == [str(tmp_path / f"confusion.{form}") for form in ("png", "svg")]
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.width == 1200
    assert ElementTree.parse(tmp_path / "confusion.svg").getroot().tag.endswith("svg")
    assert command(visualize, "curves", *runs.values(), "--output", tmp_path, "--format", "svg")[0] == 0
    assert not (tmp_path / "curves.png").exists() and (tmp_path / "curves.svg").exists()


def test_what_cannot_be_drawn_is_said_in_one_line(runs, tmp_path, command, logs):
    cfg = get_detection_cfg()
    detector = write_run(tmp_path / "detector", cfg, logged(1))
    save_student(detector / "student_best.pth", {"w": torch.zeros(1)}, {"task": "detection"})
    (tmp_path / "empty").mkdir()
    said = {
        ("curves", tmp_path / "empty"): "empty has no metrics.json with numbers",
        ("curves", tmp_path / "none"): "none: no such run folder",
        ("curves", logs[0], detector): "a run of classification, .*detector of detection: draw them apart",
        ("curves", logs[0], "DATASETS.ROOT", "x"): "DATASETS.ROOT is not for curves",
        ("tsne", logs[0]): "plain_0 has no student_best.pth",
        ("tsne", runs["plain"], "--classes", "11"): r"--classes: no class 11 \(did you mean 1",
        ("tsne", runs["plain"], "--threshold", "0.5"): "--threshold is not for tsne",
        ("tsne", runs["plain"], "--samples", "0"): "--samples 0: at least 1",
        ("correlation", runs["plain"]): "no teacher: none of the runs names one",
        ("confusion", runs["plain"], "DATASETS.ROOT"): "DATASETS.ROOT: settings come in pairs",
        ("detections", "DATASETS.ROOT", "x"): "no run folder before DATASETS.ROOT",
    }  # fmt: skip
    for arguments, message in said.items():
        code, out, error = command(visualize, *arguments, "--output", tmp_path / "out")
        assert code == 2 and out == "" and error.count("\n") == 1, error
        assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_a_figure_is_for_its_task(runs, monkeypatch):
    class Other:
        description = {"task": "detection"}

    monkeypatch.setattr("d2distill.tools.visualizations.classifiers.load", lambda path, device: Other())
    with pytest.raises(DataError, match="plain is a detector: this figure is for classifiers"):
        features.tsne_figure([runs["plain"]])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn"):
        features.tsne_figure([runs["plain"]])


def test_colors_of_many_classes_stay_apart():
    styles = [features.class_style(number, 20) for number in range(20)]
    assert len({(str(color), marker) for color, marker in styles}) == 20
    assert [color for color, _ in styles[:7]] == list(style.COLORS)
    many = [features.class_style(number, 200) for number in range(200)]
    assert len({(str(color), marker) for color, marker in many}) == 200
    assert style.text_color("#F0E442") == "black" and style.text_color("#0072B2") == "white"
    assert isinstance(style.new_figure("x " * 200, 3), Figure)


# ---- the notebooks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tsne", "correlation"])
def test_notebook(name, runs, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "tools" / "visualizations" / f"{name}.ipynb", as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += f"\nruns, samples = {[str(runs['plain']), str(runs['taught'])]}, 50"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == {"tsne": 1, "correlation": 2}[name]
    assert (tmp_path / f"{name}.png").is_file() and (tmp_path / f"{name}.svg").is_file()
