"""Top-1 and top-5 accuracy, as a Detectron2 evaluator."""

from collections.abc import Mapping

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from d2distill.common.errors import DivergedError

__all__ = ["AccuracyEvaluator"]


class AccuracyEvaluator(DatasetEvaluator):
    """Percentage of images whose class is among the k highest logits, k = 1 and 5, over all processes.

    With fewer than k classes k is their number. Counts stay on the device until :meth:`evaluate`.
    """

    TOPK = (1, 5)

    def reset(self) -> None:
        self._total, self._counts = 0, 0.0

    def process(self, inputs: Mapping[str, Tensor], outputs: Tensor) -> None:
        """`inputs` has ``label`` (N,); `outputs` are logits (N, C)."""
        target = inputs["label"].to(outputs.device)
        ranked = outputs.topk(min(max(self.TOPK), outputs.shape[1]), dim=1).indices
        hits = ranked == target[:, None]
        broken = ~outputs.isfinite().all(1)
        # Hits for each k, then images with a logit that is not finite.
        counts = [*(hits[:, :k].any(1).sum() for k in self.TOPK), broken.sum()]
        self._counts = self._counts + torch.stack(counts).double()
        self._total += len(target)

    def evaluate(self) -> dict[str, float] | None:
        """``{"top1": ..., "top5": ...}`` in percent on the main process, None elsewhere.

        A DivergedError on all ranks where logits are not finite: an accuracy of them means nothing.
        """
        gathered = comm.all_gather((torch.as_tensor(self._counts).cpu(), self._total))
        total = sum(count for _, count in gathered)
        *correct, broken = sum(counts for counts, _ in gathered).tolist()
        if broken:
            raise DivergedError(f"The student's logits of {int(broken)} of {total} test images are not finite.")
        if not comm.is_main_process():
            return None
        return {f"top{k}": 100.0 * value / total for k, value in zip(self.TOPK, correct, strict=True)}
