"""The teacher detector: built from its own configuration, fed with its own pixel statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from d2distill.common.building import building
from d2distill.common.errors import CheckpointError, ConfigError
from d2distill.detection.config import teacher_cfg, zoo_weights
from d2distill.detection.weights import has_teacher, load_teacher

__all__ = ["TeacherAdapter", "build_teacher"]


@dataclass(frozen=True)
class TeacherAdapter:
    """A frozen detector, and what must be known to feed it with a student's images.

    Attributes:
        cfg: the teacher's own configuration, and `network`, built from it.
        weights: to be loaded; empty leaves random ones. `key` is the setting that named them.
        swap_rgb_bgr: whether the student's images have the other order of channels.
    """

    cfg: CfgNode
    network: nn.Module
    weights: str
    key: str
    swap_rgb_bgr: bool

    def load_weights(self) -> Sequence[str]:
        """Load the weights, every one of them, and return their classes where the file names them."""
        return load_teacher(self.network, self.weights, self.key) if self.weights else ()

    def prepares_like(self, student: nn.Module) -> bool:
        """Whether :meth:`images` would give what the student's own ``preprocess_image`` does, to the bit."""
        if self.swap_rgb_bgr or type(student).preprocess_image is not type(self.network).preprocess_image:
            return False
        facts = [
            (
                network.pixel_mean.tolist(),
                network.pixel_std.tolist(),
                network.backbone.size_divisibility,
                network.backbone.padding_constraints,
            )
            for network in (student, self.network)
        ]
        return facts[0] == facts[1]

    def inputs(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batch in the teacher's channel order."""
        return [{**x, "image": x["image"].flip(0) if self.swap_rgb_bgr else x["image"]} for x in batched_inputs]

    def images(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """The batch in the teacher's channel order, then its mean, deviation and padding: (N, 3, H, W)."""
        return self.network.preprocess_image(self.inputs(batched_inputs)).tensor

    def detect(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detectron2's results on the batch."""
        return self.network(self.inputs(batched_inputs))


def build_teacher(cfg: CfgNode) -> TeacherAdapter:
    """The detector of ``cfg.TEACHER``, without its weights.

    They are those of TEACHER.MODEL.WEIGHTS. Where it is empty, or only what TEACHER.CONFIG_FILE brought from the zoo, a
    merged file under MODEL.WEIGHTS goes before it with its ``teacher.*``. Where none is there they stay random.

    Raises:
        ConfigError: a configuration that no detector can be built from.
    """
    own = teacher_cfg(cfg)
    # It may be the configuration of a student that is the teacher now.
    students = {"DistillRetinaNet": "RetinaNet", "DistillRCNN": "GeneralizedRCNN"}
    own.MODEL.META_ARCHITECTURE = students.get(own.MODEL.META_ARCHITECTURE, own.MODEL.META_ARCHITECTURE)
    formats = {cfg.INPUT.FORMAT, own.INPUT.FORMAT}
    if len(formats) > 1 and formats != {"RGB", "BGR"}:
        raise ConfigError(
            f"TEACHER.INPUT.FORMAT is {own.INPUT.FORMAT}, but the student's images are {cfg.INPUT.FORMAT}: only RGB "
            "and BGR can be made into each other"
        )
    weights, key = own.MODEL.WEIGHTS, "TEACHER.MODEL.WEIGHTS"
    if weights in ("", zoo_weights(own.CONFIG_FILE)) and _is_merged(cfg.MODEL.WEIGHTS):
        weights, key = cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS"
    with torch.random.fork_rng(devices=[]), building("TEACHER.MODEL", cfg):
        # What is drawn here is thrown away or random anyway: methods that follow begin alike with any teacher.
        network = build_model(own)
    return TeacherAdapter(own, network.requires_grad_(False).eval(), weights, key, formats == {"RGB", "BGR"})


def _is_merged(source: str) -> bool:
    try:
        return has_teacher(source)
    except CheckpointError:
        return False  # the student's loading will tell
