"""Networks as a configuration names them: built, loaded, normalised, measured."""

import copy
import logging
from dataclasses import replace

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from classification.config import image_size
from classification.data import DatasetInfo, dataset_info
from classification.models import build_model
from common.config import CfgNode
from common.engine.weights import load_weights
from common.errors import ConfigError
from common.outputs import OutputSpec

__all__ = ["Normalize", "build_network", "describe", "model_cost"]

logger = logging.getLogger("detectron2.d2distill")


class Normalize(nn.Module):
    """(images - mean) / std for images in 0..255, (N, 3, H, W), to float. Not part of any checkpoint."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    @classmethod
    def of(cls, node: CfgNode, info: DatasetInfo) -> "Normalize":
        """From PIXEL_MEAN and PIXEL_STD of a network's node; where they are empty, the data set's."""
        return cls(list(node.PIXEL_MEAN or info.pixel_mean), list(node.PIXEL_STD or info.pixel_std))

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.device, non_blocking=True) - self.mean) / self.std


def build_network(cfg: CfgNode, key: str, node: CfgNode, num_classes: int) -> nn.Module:
    """A network with its weights, if any are named.

    Args:
        cfg: the whole configuration.
        key: ``MODEL.STUDENT`` or ``MODEL.TEACHER``, for errors.
        node: NAME and WEIGHTS.
        num_classes: of its classifier.

    Raises:
        ConfigError: unknown model name.
        CheckpointError: weights that are missing or of another network.
    """
    try:
        zoo = dataset_info(cfg.DATASETS.NAME).zoo
        network = build_model(node.NAME, num_classes, zoo=zoo, image_size=image_size(cfg))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}.NAME: {error}") from error
    if node.WEIGHTS:
        load_weights(network, node.WEIGHTS, f"{key}.WEIGHTS")
    elif key == "MODEL.TEACHER":
        logger.warning("MODEL.TEACHER.WEIGHTS is empty: the teacher has random weights and teaches nothing")
    return network


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
