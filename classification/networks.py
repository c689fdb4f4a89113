"""Networks as a configuration names them: built, loaded, normalized, measured."""

import copy
import logging

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from d2distill.classification.config import image_size
from d2distill.classification.data import DatasetInfo, dataset_info
from d2distill.classification.models import build_model, is_without_classes
from d2distill.common.building import building, extension_line
from d2distill.common.config import CfgNode
from d2distill.common.engine.weight_loading import class_count, load_state, weights_for
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import NetworkInfo

__all__ = ["Normalize", "build_network", "model_stats", "network_info"]

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
        key: ``MODEL.STUDENT`` or ``MODEL.TEACHER``, for errors.
        node: NAME, WEIGHTS and USE_EMA. A student's classifier stays fresh where the weights are of other classes; a
            teacher has the classes of its weights.

    Raises:
        ConfigError: unknown model name, or a network that does not take images of the configured size.
        CheckpointError: weights that are missing or of another network.
    """
    network = _build(cfg, key, node.NAME, num_classes)
    weights = weights_for(network, node.WEIGHTS, f"{key}.WEIGHTS", node.USE_EMA) if node.WEIGHTS else {}
    if key == "MODEL.STUDENT":
        if weights:
            load_state(network, weights, node.WEIGHTS, f"{key}.WEIGHTS", getattr(network, "classifiers", ()))
        return network
    classes = class_count(network, weights) if weights else 0 if is_without_classes(node.NAME) else num_classes
    if classes not in (num_classes, None):
        logger.info(
            f"{key}.NAME {node.NAME} has {classes or 'no'} classes, the data {num_classes}: it is a teacher for "
            "methods on features only"
        )
        network = _build(cfg, key, node.NAME, classes)
    if weights:
        load_state(network, weights, node.WEIGHTS, f"{key}.WEIGHTS")
    else:
        logger.warning(f"{key}.WEIGHTS is empty: the teacher has random weights, which is of use in tests only")
    return network


def _build(cfg: CfgNode, key: str, name: str, num_classes: int) -> nn.Module:
    size, family = image_size(cfg), dataset_info(cfg.DATASETS.NAME).model_family
    with building(f"{key}.NAME", cfg):
        try:
            network = build_model(name, num_classes, model_family=family, image_size=size)
            network_info(network, size)
            return network
        except (ArithmeticError, AssertionError, IndexError, RuntimeError) as error:
            if extension_line(error):
                raise
            # Patches that do not divide the size, maps that vanish.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"{key}.NAME {name} does not take images of INPUT.SIZE {size} ({reason}): choose another size"
            ) from error


@torch.no_grad()
def network_info(network: nn.Module, size: int) -> NetworkInfo:
    """What methods may know of a network, from one forward pass of an image of `size` x `size` pixels.

    The network and the generators stay as they are.
    """
    was_training = network.training
    parameter = next(network.parameters())
    with torch.random.fork_rng(devices=[]):
        outputs = network.eval().outputs(torch.zeros(1, 3, size, size, device=parameter.device))
    network.train(was_training)
    return outputs.info(classifier=getattr(network, "classifier_layer", None), module=network)


def model_stats(network: nn.Module, size: int) -> dict[str, int]:
    """``parameters``, and ``flops`` (multiply-adds, as fvcore counts them) for one image of `size` x `size`."""
    plain = copy.deepcopy(network).cpu().eval()
    with torch.no_grad():
        flops = FlopCountAnalysis(plain, torch.zeros(1, 3, size, size))
        flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return {"parameters": sum(p.numel() for p in network.parameters()), "flops": int(flops.total())}
