"""Figures of what classifiers make of the test images: t-SNE of features, class correlations, confusion."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps, patheffects
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from d2distill.common.errors import DataError, MissingDependencyError
from d2distill.deployed import student_file
from d2distill.tools.visualizations.classifiers import load_lineup
from d2distill.tools.visualizations.runs import run_label, run_settings, unique_labels
from d2distill.tools.visualizations.style import (
    COLORS,
    MOST_NAMES,
    grid,
    square_row,
    styled,
    text_color,
    tick_classes,
    wrap,
)

__all__ = ["class_correlation", "confusion_figure", "correlation_figure", "mean_logits", "tsne_figure"]

_MARKERS = "o^sDvP*X"
_OUTLINE = [patheffects.withStroke(linewidth=3, foreground="white")]
#: Colors of many classes: a map without its palest part.
_MANY = ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256)))


@styled
def tsne_figure(
    runs: Sequence[str | Path],
    teacher: str | Path | None = None,
    opts: Sequence[str] = (),
    samples: int = 1000,
    classes: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
) -> Figure:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) of what enters the classifier, of the teacher and each student.

    All panels have the same test images, in the same order and the same colors by class.

    Args:
        runs, teacher, opts: as :func:`.load_lineup`.
        samples: so many of the test images; 0: all.
        classes: only images of these.
        seed: of the embedding; the same gives the same figure.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise MissingDependencyError(f"t-SNE is scikit-learn's: pip install scikit-learn ({error})") from error
    lineup = load_lineup(runs, teacher, opts, device)
    dataset = lineup.test_set(samples, classes)
    if len(dataset) < 5:
        raise DataError(f"t-SNE needs at least 5 test images, not {len(dataset)}: raise --samples")
    shown = [lineup.classes.index(name) for name in classes] or list(range(len(lineup.classes)))
    title = f"t-SNE of the features before the classifier, {_images(dataset)}, colored by class"
    figure, all_axes = grid(title, len(lineup.networks), 4.4)
    for axes, network in zip(all_axes, lineup.networks, strict=True):
        outputs, labels = lineup.run(network, dataset)
        if outputs.pooled is None:
            raise DataError(f"{network.label} has no vector before its classifier")
        tsne = TSNE(random_state=seed, init="pca", perplexity=min(30, (len(dataset) - 1) / 3))
        points = tsne.fit_transform(outputs.pooled.flatten(1).numpy())
        known = outputs.logits is not None and outputs.logits.shape[1] == len(lineup.classes)
        accuracy = f"\ntop-1 {_top1(outputs.logits, labels):.1f} %" if known else ""
        axes.set_title(f"{wrap(network.label, 3.5)}{accuracy}")
        axes.set(xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        for number, label in enumerate(shown):
            own = points[(labels == label).numpy()]
            color, marker = class_style(number, len(shown))
            axes.scatter(*own.T, s=14, color=color, marker=marker, linewidths=0.3, edgecolors="white", alpha=0.9)
        style = {"ha": "center", "va": "center", "fontweight": "bold", "path_effects": _OUTLINE}
        for label in shown if len(shown) <= MOST_NAMES else []:
            if (labels == label).any():
                axes.text(*np.median(points[(labels == label).numpy()], 0), lineup.classes[label], **style)
    if len(shown) > MOST_NAMES:
        numbers = ScalarMappable(Normalize(0, len(shown) - 1), _MANY)
        figure.colorbar(numbers, ax=all_axes, label="class (number)", shrink=0.8)
    return figure


def class_style(number: int, count: int) -> tuple[object, str]:
    """Color and marker of one of `count` classes; of more than are named, the color says its number."""
    if count <= MOST_NAMES:
        palette = [*COLORS, "#000000"]
        return palette[number % len(palette)], _MARKERS[number // len(palette)]
    return _MANY(number / (count - 1)), _MARKERS[number % len(_MARKERS)]


@styled
def correlation_figure(
    runs: Sequence[str | Path],
    teacher: str | Path | None = None,
    opts: Sequence[str] = (),
    samples: int = 0,
    of_means: bool = False,
    device: str = "cpu",
) -> Figure:
    """The teacher's class correlations minus each student's, all in one color scale (CRD's Figure 2).

    Args:
        runs, teacher, opts: as :func:`.load_lineup`.
        samples: so many of the test images; 0: all.
        of_means: compare the mean logits of each class, as MDistiller's notebook does, in the place of correlations.

    Raises:
        ConfigError: there is no teacher.
        DataError: the teacher has other classes.
    """
    lineup = load_lineup(runs, teacher, opts, device)
    networks = [lineup.need_teacher(), *lineup.students]
    dataset = lineup.test_set(samples)
    matrices = []
    for network in networks:
        outputs, labels = lineup.run(network, dataset)
        if outputs.logits is None or outputs.logits.shape[1] != len(lineup.classes):
            raise DataError(f"{network.label} has other classes than the student: its logits cannot be compared")
        matrices.append(mean_logits(outputs.logits, labels) if of_means else class_correlation(outputs.logits))
    differences = [matrices[0] - matrix for matrix in matrices[1:]]
    limit = max(float(difference.abs().nan_to_num().max()) for difference in differences) or 1.0
    what = "Mean logits of each class" if of_means else "Correlations of the classes' logits"
    figure, all_axes = grid(
        f"{what}: {networks[0].label} minus student, {_images(dataset)}",
        len(differences),
        square_row(len(differences)),
    )
    for axes, student, difference in zip(all_axes, lineup.students, differences, strict=True):
        image = axes.imshow(difference, cmap="PuOr", vmin=-limit, vmax=limit)
        axes.set_title(f"{wrap(student.label, 3.5)}\nmean |difference| {difference.abs().nanmean():.3f}")
        axes.set(xlabel="logit of class" if of_means else "class", ylabel="class")
        tick_classes(axes, lineup.classes)
    unit = "difference of mean logits" if of_means else "difference of correlation coefficients"
    figure.colorbar(image, ax=all_axes, label=unit, shrink=0.8)
    return figure


def class_correlation(logits: Tensor) -> Tensor:
    """Pearson's correlation of each two columns of logits (N, C) over the images: (C, C), with a diagonal of 1."""
    return torch.corrcoef(logits.double().T).fill_diagonal_(1)


def mean_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Row c: the mean of logits (N, C) over the images of class c, NaN where there is none; with a diagonal of 0."""
    return torch.stack([logits[labels == c].double().mean(0) for c in range(logits.shape[1])]).fill_diagonal_(0)


@styled
def confusion_figure(
    runs: Sequence[str | Path],
    teacher: str | Path | None = None,
    opts: Sequence[str] = (),
    device: str = "cpu",
) -> Figure:
    """Confusion matrix of each run, in percent of the images of each class.

    It is that of the run's last evaluation, in its ``confusion.csv``; where there is none, or `opts` or a file of
    weights are given, the student is run on the test images.

    Args:
        runs, opts: as :func:`.load_lineup`.
        teacher: a run folder or file whose matrix is drawn first.
    """
    sources = [*map(str, filter(None, [teacher])), *map(str, runs)]
    matrices = [_confusion(source, opts, device) for source in sources]
    labels = unique_labels([label for label, *_ in matrices], [*map(Path, sources)])
    figure, all_axes = grid("Confusion, in percent of the images of each class", len(sources), square_row(len(sources)))
    for axes, name, (_, classes, counts, origin) in zip(all_axes, labels, matrices, strict=True):
        shares = 100 * counts / counts.sum(1, keepdims=True).clip(1)
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
        axes.set_title(f"{wrap(name, 3.5)}\ntop-1 {100 * counts.trace() / counts.sum():.1f} %, {origin}")
        axes.set(xlabel="predicted class", ylabel="class")
        tick_classes(axes, classes)
        # Numbers where there is room for them.
        for row, column in np.argwhere(shares >= 0.5) if len(classes) * len(sources) <= 30 else ():
            color = text_color(image.cmap(image.norm(shares[row, column])))
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=all_axes, label="images of the class (%)", shrink=0.8)
    return figure


def _confusion(source: str, opts: Sequence[str], device: str) -> tuple[str, list[str], np.ndarray, str]:
    """Label, classes, counts by class and predicted class, and which evaluation they are of."""
    file = Path(source, "confusion.csv")
    if file.is_file() and not opts:
        with open(file, newline="", encoding="utf-8") as content:
            (_, *classes), *rows = csv.reader(content)
        counts = np.array([row[1:] for row in rows], dtype=float)
        return run_label(run_settings(source), Path(source)), classes, counts, "last evaluation"
    lineup = load_lineup([source], None, opts, device)
    outputs, labels = lineup.run(lineup.students[0], lineup.test_set())
    counts = np.zeros((len(lineup.classes),) * 2)
    np.add.at(counts, (labels.numpy(), outputs.logits.argmax(1).numpy()), 1)
    return lineup.students[0].label, lineup.classes, counts, student_file(source).name


def _top1(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * (logits.argmax(1) == labels).double().mean().item()


def _images(dataset: object) -> str:
    return f"{len(dataset)} test images of {dataset.info.name}"
