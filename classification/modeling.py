"""The student with a teacher at its side: what the trainer calls."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.nn import functional as F

from classification.config import resolve_device
from classification.data import DatasetInfo, dataset_info
from classification.models import build_model
from common.config import CfgNode
from common.distillers import DISTILLERS, Context
from common.engine.weights import load_weights
from common.errors import ConfigError
from common.outputs import OutputSpec

__all__ = ["DistillModel", "build_distiller", "build_network", "describe", "image_size", "model_cost"]

logger = logging.getLogger("detectron2.d2distill")


class Normalize(nn.Module):
    """(images - mean) / std for images in 0..255, (N, 3, H, W), to float. Not part of any checkpoint."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.device, non_blocking=True) - self.mean) / self.std


class DistillModel(nn.Module):
    """Turns a batch into losses in training mode and into the student's logits in eval mode.

    The teacher is always in eval mode, never in a gradient and never in the state dict.

    Args:
        student, teacher: networks with ``outputs()``; teacher None for plain training.
        distillers: methods by lower-case name.
        student_norm, teacher_norm: each network's normalisation.
        ce_weight: weight of the cross-entropy.

    Attributes:
        student, teacher, distillers: as given.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        distillers: dict[str, nn.Module],
        student_norm: Normalize,
        teacher_norm: Normalize,
        ce_weight: float,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.distillers = nn.ModuleDict(distillers)
        self.student_norm = student_norm
        self.teacher_norm = teacher_norm
        self.ce_weight = ce_weight
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_drop_teacher)
        self.register_load_state_dict_post_hook(_expect_no_teacher)

    def train(self, mode: bool = True) -> "DistillModel":
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor], epoch: float = 1) -> dict[str, Tensor] | Tensor:
        """Losses of a batch, or its logits.

        Args:
            batch: ``image`` (N, 3, H, W), uint8 or float in 0..255, not normalised; in training mode also
                ``label`` (N,) and, where a method asks for them, ``index`` (N,) and ``contrast_index`` (N, 1 + K).
            epoch: counted from 1; warm-ups depend on it.

        Returns:
            In training mode ``loss_ce`` and one ``loss_<method>`` each, 0-d, weighted; else logits (N, C).
        """
        images = self.student_norm(batch["image"])
        if not self.training:
            return self.student(images)
        target = batch["label"].to(images.device, non_blocking=True)
        student = self.student.outputs(images)
        # The sum over an empty batch is 0; its mean would be NaN.
        cross_entropy = F.cross_entropy(student.logits, target, reduction="sum") / max(len(target), 1)
        losses = {"loss_ce": self.ce_weight * cross_entropy}
        if self.distillers:
            with torch.no_grad():
                teacher = self.teacher.outputs(self.teacher_norm(batch["image"]))
            ctx = Context(epoch, batch.get("index"), batch.get("contrast_index"))
            for distiller in self.distillers.values():
                losses.update(distiller(student, teacher, target, ctx))
        return losses


def _drop_teacher(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}teacher.")]:
        del state[name]


def _expect_no_teacher(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [
        n for n in incompatible.missing_keys if "teacher." not in n.partition("student.")[0]
    ]


def build_network(cfg: CfgNode, side: str, num_classes: int) -> nn.Module:
    """The network of ``cfg.MODEL.<side>`` with its WEIGHTS, if it names any.

    Raises:
        ConfigError: unknown model name.
        CheckpointError: weights that are missing or of another network.
    """
    node, info = cfg.MODEL[side], dataset_info(cfg.DATASETS.NAME)
    try:
        network = build_model(node.NAME, num_classes, zoo=info.zoo, image_size=image_size(cfg))
    except ValueError as error:
        raise ConfigError(f"MODEL.{side}.NAME: {error}") from error
    if node.WEIGHTS:
        load_weights(network, node.WEIGHTS, f"MODEL.{side}.WEIGHTS")
    elif side == "TEACHER":
        logger.warning("MODEL.TEACHER.WEIGHTS is empty: the teacher has random weights and teaches nothing")
    return network


def image_size(cfg: CfgNode) -> int:
    """Side in pixels of the images the networks see."""
    return cfg.INPUT.SIZE or dataset_info(cfg.DATASETS.NAME).image_size


def build_distiller(
    cfg: CfgNode,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    num_samples: int | None = None,
) -> DistillModel:
    """Student, teacher and the methods of ``cfg.DISTILL.METHODS``, on the device of ``cfg.MODEL.DEVICE``.

    Args:
        cfg: from :func:`classification.config.get_cfg`.
        student, teacher: networks to take instead of those that `cfg` names.
        num_samples: size of the training set, for methods that remember samples.

    Raises:
        ConfigError: a network, method or class count that does not fit.
        CheckpointError: weights that are missing or of another network.
    """
    info = dataset_info(cfg.DATASETS.NAME)
    num_classes = cfg.MODEL.NUM_CLASSES or info.num_classes
    if num_classes is None:
        raise ConfigError(f"MODEL.NUM_CLASSES: data set {info.name} has no fixed number of classes; set it")
    student = student or build_network(cfg, "STUDENT", num_classes)
    methods = list(cfg.DISTILL.METHODS)
    if methods and teacher is None:
        if not cfg.MODEL.TEACHER.NAME:
            raise ConfigError(f"DISTILL.METHODS {methods} need a teacher, but MODEL.TEACHER.NAME is empty")
        teacher = build_network(cfg, "TEACHER", num_classes)
    distillers = {}
    if methods:
        student_spec, teacher_spec = (describe(network, image_size(cfg)) for network in (student, teacher))
        for name in methods:
            try:
                distillers[name.lower()] = DISTILLERS.get(name)(
                    cfg.DISTILL[name.upper()], student_spec, teacher_spec, num_samples
                )
            except ValueError as error:
                raise ConfigError(f"DISTILL.METHODS: {error}") from error
    norms = [_normalize(cfg, side, info) for side in ("STUDENT", "TEACHER")]
    model = DistillModel(student, teacher if methods else None, distillers, *norms, cfg.DISTILL.CE_WEIGHT)
    return model.to(resolve_device(cfg))


@torch.no_grad()
def describe(network: nn.Module, size: int) -> OutputSpec:
    """Shapes of a network's outputs, from one forward pass of one image."""
    was_training = network.training
    parameter = next(network.parameters())
    spec = network.eval().outputs(torch.zeros(1, 3, size, size, device=parameter.device)).spec()
    network.train(was_training)
    norms = getattr(network, "bn_before_relu", None)
    return replace(spec, bn_before_relu=None if norms is None else tuple(norms))


def model_cost(network: nn.Module, size: int) -> dict[str, int]:
    """``parameters``, and ``flops`` (multiply-adds, as fvcore counts them) for one image of `size` x `size`."""
    plain = copy.deepcopy(network).cpu().eval()
    with torch.no_grad():
        flops = FlopCountAnalysis(plain, torch.zeros(1, 3, size, size))
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return {"parameters": sum(p.numel() for p in network.parameters()), "flops": int(flops.total())}


def _normalize(cfg: CfgNode, side: str, info: DatasetInfo) -> Normalize:
    node = cfg.MODEL[side]
    return Normalize(list(node.PIXEL_MEAN or info.pixel_mean), list(node.PIXEL_STD or info.pixel_std))
