"""Accuracy of classifiers and average precision of multi-label ones, as Detectron2 evaluators, and both per class."""

import csv
import io
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from d2distill.classification.data import DatasetInfo, ImageDataset
from d2distill.common.engine.run_folder import write_text
from d2distill.common.errors import DataError, DivergedError

__all__ = ["AccuracyEvaluator", "AveragePrecisionEvaluator", "average_precision", "build_evaluator", "report_classes"]

logger = logging.getLogger("detectron2.d2distill")


class AccuracyEvaluator(DatasetEvaluator):
    """Percentage of images whose class is among the k highest logits, k = 1 and 5, and the mean cross-entropy.

    Both are over all processes. With fewer than k classes k is their number. Counts and classes stay on the device
    until :meth:`evaluate`.

    Attributes:
        pairs: (2, n) class and predicted class of each image, on the main process after :meth:`evaluate`.
        losses: (n,) cross-entropy of each image, likewise.
        index: (n,) position of each image in the data set, likewise.
        per_class: (C,) top-1 accuracy of each class's images in percent, NaN where it has none, there as well.
    """

    TOPK = (1, 5)
    best_metric = "top1"

    def reset(self) -> None:
        self._total, self._counts, self._num_classes = 0, 0.0, 0
        self._pairs: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._index: list[Tensor] = []

    def process(self, inputs: Mapping[str, Tensor], outputs: Tensor) -> None:
        """`inputs` has ``label`` (N,) and, of a loader of ours, ``index`` (N,); `outputs` are logits (N, C)."""
        target = inputs["label"].to(outputs.device)
        ranked = outputs.topk(min(max(self.TOPK), outputs.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        broken = ~outputs.isfinite().all(1)
        # Hits for each k, then images with a logit that is not finite.
        counts = [*(hits[:, :k].any(1).sum() for k in self.TOPK), broken.sum()]
        self._counts = self._counts + torch.stack(counts).double()
        self._total += len(target)
        self._num_classes = outputs.shape[1]
        self._pairs.append(torch.stack([target, ranked[:, 0]]))
        self._losses.append(F.cross_entropy(outputs.float(), target, reduction="none"))
        self._index.append(inputs.get("index", torch.full_like(inputs["label"], -1)))

    def evaluate(self) -> dict[str, float] | None:
        """``{"top1": ..., "top5": ..., "test_loss": ...}``, the first in percent, on the main process, None elsewhere.

        Raises:
            DivergedError: on all ranks, where logits are not finite: an accuracy of them means nothing.
            DataError: no image at all.
        """
        own = torch.cat(self._pairs, 1).cpu() if self._pairs else torch.zeros(2, 0, dtype=torch.long)
        images = [torch.cat(part).cpu() if part else torch.zeros(0) for part in (self._losses, self._index)]
        gathered = comm.all_gather((torch.as_tensor(self._counts).cpu(), self._total, own, *images, self._num_classes))
        counts, totals, pairs, losses, index, num_classes = zip(*gathered, strict=True)
        total, (*correct, broken) = _checked(sum(totals)), sum(counts).tolist()
        if broken:
            raise _diverged(int(broken), total)
        if not comm.is_main_process():
            return None
        self.pairs = target, predicted = torch.cat(pairs, 1)
        self.losses, self.index = torch.cat(losses), torch.cat(index).long()
        images, hits = (
            torch.bincount(part, minlength=max(num_classes)) for part in (target, target[target == predicted])
        )
        self.per_class = 100.0 * hits / images
        accuracy = {f"top{k}": 100.0 * value / total for k, value in zip(self.TOPK, correct, strict=True)}
        return {**accuracy, "test_loss": self.losses.double().mean().item()}


class AveragePrecisionEvaluator(DatasetEvaluator):
    """Mean over the classes of the average precision, over all processes, without those that have no positive image.

    Attributes:
        per_class: (C,) average precision in percent, NaN for those without, on the main process after :meth:`evaluate`.
    """

    best_metric = "mAP"

    def reset(self) -> None:
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def process(self, inputs: Mapping[str, Tensor], outputs: Tensor) -> None:
        """`inputs` has ``label`` (N, C), 0 or 1; `outputs` are logits (N, C)."""
        self._scores.append(outputs.float())
        self._targets.append(inputs["label"].to(outputs.device).bool())

    def evaluate(self) -> dict[str, float] | None:
        """``{"mAP": ..., "test_loss": ...}`` on the main process, None elsewhere; errors as of AccuracyEvaluator.

        The first is in percent, the second the mean binary cross-entropy over images and classes.
        """
        own = [torch.cat(parts).cpu() if parts else None for parts in (self._scores, self._targets)]
        gathered = [part for part in comm.all_gather(own) if part[0] is not None]
        scores, targets = (torch.cat(parts) for parts in zip(*gathered, strict=True)) if gathered else ([], [])
        total = _checked(len(scores))
        if broken := int((~scores.isfinite().all(1)).sum()):
            raise _diverged(broken, total)
        if not comm.is_main_process():
            return None
        columns = zip(scores.T, targets.T, strict=True)
        self.per_class = 100.0 * torch.stack([average_precision(score, target) for score, target in columns])
        loss = F.binary_cross_entropy_with_logits(scores.double(), targets.double())
        return {"mAP": self.per_class.nanmean().item(), "test_loss": loss.item()}


Evaluator = AccuracyEvaluator | AveragePrecisionEvaluator


def build_evaluator(info: DatasetInfo) -> Evaluator:
    """The evaluator of a data set's kind."""
    return AveragePrecisionEvaluator() if info.multi_label else AccuracyEvaluator()


def _checked(total: int) -> int:
    if not total:
        raise DataError("no test image can be read")
    return total


def _diverged(broken: int, total: int) -> DivergedError:
    return DivergedError(f"The student's logits of {broken} of {total} test images are not finite.")


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Sum over the distinct scores, from high to low, of (increase of recall) * precision; NaN without a positive.

    Not interpolated, as scikit-learn's average_precision_score. Equal scores are one step.

    Args:
        scores: (N,), in any order-preserving scale.
        targets: (N,) bool.

    Returns:
        A 0-d double in 0..1.
    """
    scores, order = scores.sort(descending=True, stable=True)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    hits = targets[order].cumsum(0)[last].double()
    precision = hits / (last.nonzero()[:, 0] + 1)
    return (precision * hits.diff(prepend=hits.new_zeros(1))).sum() / hits[-1]


def report_classes(
    evaluator: Evaluator, dataset: ImageDataset, confusion: str | Path | None
) -> dict[str, float | None]:
    """The metric of each class in percent, None where it is not defined; the three lowest are logged.

    Args:
        confusion: the CSV file for the confusion matrix, or None; written if its folder can be written to, the images
            have one class each, and there are at most 1000 classes: of many more it would be of gigabytes.
    """
    names, values = dataset.classes, evaluator.per_class.tolist()
    known = isinstance(evaluator, AccuracyEvaluator) and len(names) <= 1000
    if known and confusion is not None and os.access(Path(confusion).parent, os.W_OK):
        _write_confusion(confusion, evaluator.pairs, names)
    per_class = {name: None if math.isnan(value) else value for name, value in zip(names, values, strict=True)}
    worst = sorted((value, name) for name, value in per_class.items() if value is not None)[:3]
    logger.info(
        f"Lowest {evaluator.best_metric} of a class: {', '.join(f'{name} {value:.2f}' for value, name in worst)}"
    )
    return per_class


def _write_confusion(path: str | Path, pairs: Tensor, classes: Sequence[str]) -> None:
    # A row per class, a column per predicted class, both named.
    counts = torch.bincount(pairs[0] * len(classes) + pairs[1], minlength=len(classes) ** 2)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *classes])
    writer.writerows([name, *row] for name, row in zip(classes, counts.view(len(classes), -1).tolist(), strict=True))
    write_text(path, text.getvalue())
