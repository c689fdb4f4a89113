"""Evaluations on the test split within a training: of the student, and of its teachers before it begins."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import inference_context, inference_on_dataset
from detectron2.utils import comm
from torch import nn

from d2distill.classification.config import teacher_nodes
from d2distill.classification.data import ImageDataset
from d2distill.classification.data.augment import CenterFit
from d2distill.classification.data.loader import build_test_loader
from d2distill.classification.data.splits import read_options
from d2distill.classification.data.unreadable import UnreadableImages
from d2distill.classification.evaluation import build_evaluator, report_classes
from d2distill.classification.modeling import DistillModel
from d2distill.classification.networks import network_info
from d2distill.classification.worst import draw_worst, worst_images
from d2distill.common.config import CfgNode
from d2distill.common.engine.distributed import broadcast_buffers, run_on_main_process
from d2distill.common.engine.task import Interruptible
from d2distill.common.engine.teacher_check import measured
from d2distill.common.engine.weight_files import weights_digest
from d2distill.common.errors import CheckpointError, DivergedError

__all__ = ["Testing", "center_fit"]

logger = logging.getLogger("detectron2.d2distill")


def center_fit(cfg: CfgNode) -> CenterFit:
    """How test images are brought to the networks' size."""
    return CenterFit(cfg.INPUT.SIZE, cfg.INPUT.RESIZE, cfg.INPUT.INTERPOLATION)


class Testing:
    """The test images of a training, and its networks on them.

    Args:
        cfg: a configuration with its inputs resolved.

    Attributes:
        best_metric: the metric that decides which student is the best one.
        per_class: of the last student that :meth:`evaluate_student` reported, by class name.
    """

    def __init__(self, cfg: CfgNode, dataset: ImageDataset, unreadable: UnreadableImages | None = None) -> None:
        self.cfg, self.dataset, self.unreadable = cfg, dataset, unreadable
        self.fit, self._evaluator = center_fit(cfg), build_evaluator(dataset.info)
        self.loader = build_test_loader(
            dataset, cfg.TEST.IMS_PER_BATCH, self.fit, cfg.DATALOADER.NUM_WORKERS, unreadable
        )
        self.best_metric = self._evaluator.best_metric
        self.per_class: dict[str, float | None] = {}
        self._worst: dict[str, list] = {}

    def evaluate_student(
        self, network: nn.Module, norm: nn.Module, interruptible: Interruptible, report: bool = True
    ) -> dict[str, float]:
        """Metrics of a student whose images are normalized by `norm`; with `report` its classes are logged and kept."""
        if comm.get_world_size() > 1:
            # Running statistics differ between the processes after a step; the main one's are those that are saved.
            broadcast_buffers(network)
        results = self._evaluate(network, norm, interruptible(self.loader))
        if self.unreadable is not None:
            self.unreadable.summarize()
        if report:
            confusion = Path(self.cfg.OUTPUT_DIR, "confusion.csv")
            self.per_class.update(run_on_main_process(lambda: report_classes(self._evaluator, self.dataset, confusion)))
            self._worst = worst_images(self._evaluator)
        return results

    def _evaluate(self, network: nn.Module, norm: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        with inference_context(network):
            return inference_on_dataset(lambda batch: network(norm(batch["image"])), batches, self._evaluator) or {}

    def worst(self) -> dict[str, Any]:
        """The part of the report with the images that the last student got most wrong."""
        return {"worst": draw_worst(self._worst, self.dataset, self.fit)} if self._worst else {}

    def measure_teachers(self, model: DistillModel) -> dict[str, float]:
        """Metrics of each teacher with trained weights on the test images as the student sees them."""
        results, shares = {}, np.array(self.dataset.samples_per_class())
        # Of guesses alike for all images: accuracy is the largest class's share, average precision each class's own.
        shares = 100 * shares[shares > 0] / len(self.dataset)
        chance, metric = shares.mean() if self.dataset.info.multi_label else shares.max(), self.best_metric
        for number, (node, norm) in enumerate(zip(teacher_nodes(self.cfg), model.teacher_norms, strict=False)):
            several = isinstance(model.teacher, nn.ModuleList)
            network, name = (model.teacher[number], f"teacher_{number}_") if several else (model.teacher, "teacher_")
            classes = network_info(network, self.cfg.INPUT.SIZE).num_classes
            if not node.WEIGHTS or classes != self.cfg.MODEL.NUM_CLASSES:
                continue
            data = (self.dataset.fingerprint(), read_options(self.cfg))
            facts = (weights_digest(network), *data, self.fit, node.PIXEL_MEAN, node.PIXEL_STD)
            try:
                found = measured(
                    repr(facts), lambda network=network, norm=norm: self._evaluate(network, norm, self.loader)
                )
            except DivergedError as error:
                raise CheckpointError(f"MODEL.TEACHER.WEIGHTS {node.WEIGHTS}: its logits are not finite") from error
            logger.info(f"The teacher {node.NAME}: {', '.join(f'{key} {value:.2f}' for key, value in found.items())}")
            if found[metric] < chance + (100 - chance) / 10:
                logger.warning(
                    f"MODEL.TEACHER.WEIGHTS {node.WEIGHTS}: {metric} {found[metric]:.2f} is near chance "
                    f"({chance:.2f}): are the classes in another order, or PIXEL_MEAN and PIXEL_STD others than in its "
                    "training?"
                )
            results |= {f"{name}{metric}": value for metric, value in found.items()}
        return results
