"""Where classifiers look: spatial attention maps of teacher and students on pictures."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from d2distill.common.errors import ConfigError, DataError
from d2distill.tools.visualizations.classifiers import Classifier, fit_picture, load_lineup
from d2distill.tools.visualizations.style import new_figure, styled, wrap

__all__ = ["attention_figure", "attention_map"]


@styled
def attention_figure(
    runs: Sequence[str | Path],
    teacher: str | Path | None = None,
    opts: Sequence[str] = (),
    pictures: Sequence[str | Path] = (),
    samples: int = 4,
    stage: int = -1,
    device: str = "cpu",
) -> Figure:
    """A row for each picture: itself, then the attention of the teacher and of each student, and what they predict.

    Args:
        runs, teacher, opts: as :func:`.load_lineup`.
        pictures: files; none: `samples` of the test images.
        stage: which of the networks' feature maps, -1 for the deepest.
    """
    lineup = load_lineup(runs, teacher, opts, device)
    networks, shown = lineup.networks, lineup.pictures(pictures, samples)
    columns = 1 + len(networks)
    side = min(10.8 / columns - 0.1, 3.2)
    which = "deepest feature map" if stage == -1 else f"feature map {stage}"
    figure = new_figure(f"Attention: channel mean of the squared {which}", len(shown) * (side + 0.3) + 0.8)
    all_axes = figure.subplots(len(shown), columns, squeeze=False)
    # What the networks are, above the first row.
    heads = [f"{wrap(label, 1.2 * side)}\n" for label in ("picture", *(n.label for n in networks))], [""] * columns
    for row, (name, picture) in enumerate(shown):
        above = heads[min(row, 1)]
        original = fit_picture(lineup.students[0], picture).permute(1, 2, 0).numpy()
        all_axes[row, 0].imshow(original)
        all_axes[row, 0].set_title(above[0] + (name if pictures else f"class {name}"), fontsize=10)
        for axes, network, head in zip(all_axes[row, 1:], networks, above[1:], strict=True):
            image = fit_picture(network, picture)
            outputs = network.outputs(image[None].to(next(network.network.parameters()).device))
            attention = attention_map(network, outputs.feats, stage)[0].cpu()
            size = image.shape[-1]
            axes.imshow(image.float().mean(0), cmap="gray", vmin=0, vmax=255, extent=(0, size, size, 0))
            drawn = axes.imshow(
                attention / attention.max().clamp_min(1e-12), cmap="viridis", vmin=0, vmax=1, alpha=0.65,
                extent=(0, size, size, 0), interpolation="bicubic",
            )  # fmt: skip
            axes.set_title(head + _prediction(outputs.logits, lineup.classes), fontsize=10)
    for axes in all_axes.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.colorbar(drawn, ax=all_axes.ravel().tolist(), label="attention, relative to the map's highest", shrink=0.6)
    return figure


def attention_map(network: Classifier, feats: Sequence[Tensor] | None, stage: int = -1) -> Tensor:
    """The spatial attention (N, H, W) of a network's feature map: the mean over the channels of its squares.

    Zagoruyko and Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928, with p = 2.

    Raises:
        DataError: the network has no feature maps.
        ConfigError: not so many.
    """
    if not feats:
        raise DataError(f"{network.label} has no feature maps")
    if not -len(feats) <= stage < len(feats):
        raise ConfigError(f"--stage {stage}: {network.label} has {len(feats)} feature maps, 0 to {len(feats) - 1}")
    return feats[stage].float().square().mean(1)


def _prediction(logits: Tensor | None, classes: Sequence[str]) -> str:
    if logits is None or logits.shape[1] != len(classes):
        return ""
    probability, number = torch.softmax(logits[0].float(), 0).max(0)
    return f"predicts {classes[number]}, {probability:.0%}"
