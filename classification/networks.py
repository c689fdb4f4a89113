"""Networks as a configuration names them: built, loaded, normalised, measured."""

import copy
import logging
from dataclasses import replace

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from d2distill.classification.config import image_size
from d2distill.classification.data import DatasetInfo, dataset_info
from d2distill.classification.models import build_model
from d2distill.common.config import CfgNode
from d2distill.common.engine.weights import load_weights
from d2distill.common.errors import ConfigError
from d2distill.common.outputs import OutputSpec

__all__ = ["Normalize", "build_network", "infer_output_spec", "model_cost", "why_not_one_sample"]

logger = logging.getLogger("detectron2.d2distill")

# What networks raise that cannot take images of a size: patches that do not divide it, maps that vanish.
_SIZE_ERRORS = (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError)
# Proposed in their place, the nearest one that works.
_USUAL_SIZES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 299, 384, 448, 512)


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
        ConfigError: unknown model name, or a network that does not take images of the configured size.
        CheckpointError: weights that are missing or of another network.
    """
    try:
        network = _build_for_size(cfg, node.NAME, num_classes, image_size(cfg))
    except _SizeError as error:
        proposal = _proposal(cfg, node.NAME, num_classes)
        if not proposal:
            raise error.__cause__ from None  # a fault of the network, not of the size
        raise ConfigError(f"{key}.NAME {node.NAME} {error}; INPUT.SIZE {proposal} works") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{key}.NAME: {error}") from error
    if node.WEIGHTS:
        load_weights(network, node.WEIGHTS, f"{key}.WEIGHTS")
    elif key == "MODEL.TEACHER":
        logger.warning("MODEL.TEACHER.WEIGHTS is empty: the teacher has random weights and teaches nothing")
    return network


class _SizeError(Exception):
    """A network and a size of images that do not go together."""

    def __init__(self, size: int, error: Exception) -> None:
        super().__init__(f"does not take images of INPUT.SIZE {size}: {_first_line(error)}")


def _build_for_size(cfg: CfgNode, name: str, num_classes: int, size: int) -> nn.Module:
    """A network with random weights, tried on one image.

    Raises:
        _SizeError: it does not take images of `size` x `size`.
        ValueError, ImportError: as :func:`d2distill.classification.models.build_model`.
    """
    family = dataset_info(cfg.DATASETS.NAME).model_family
    try:
        network = build_model(name, num_classes, model_family=family, image_size=size)
    except _SIZE_ERRORS as error:
        try:
            build_model(name, num_classes, model_family=family)
        except Exception:
            raise error from None  # not because of the size
        raise _SizeError(size, error) from error
    try:
        infer_output_spec(network, size)
    except _SIZE_ERRORS as error:
        raise _SizeError(size, error) from error
    return network


def _proposal(cfg: CfgNode, name: str, num_classes: int) -> int:
    """The usual size nearest to the configured one that a network takes; 0 where it takes none."""
    wrong = image_size(cfg)
    for size in sorted(_USUAL_SIZES, key=lambda size: abs(size - wrong)):
        try:
            _build_for_size(cfg, name, num_classes, size)
        except _SizeError:
            continue
        return size
    return 0


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@torch.no_grad()
def infer_output_spec(network: nn.Module, size: int) -> OutputSpec:
    """Shapes of a network's outputs, from one forward pass of one image. Network and generators stay as they are."""
    was_training = network.training
    parameter = next(network.parameters())
    with torch.random.fork_rng(devices=[]):
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


@torch.no_grad()
def why_not_one_sample(model: nn.Module, size: int) -> str:
    """Why a batch of one image of `size` x `size` cannot be trained on; empty where it can.

    A batch norm, the student's or a method's, has no variance over one image's map of 1 x 1.

    Args:
        model: a :class:`.modeling.DistillModel`; it and the generators stay as they are.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, size, size, dtype=parameter.dtype, device=parameter.device)
    label = torch.zeros(1, dtype=torch.long, device=parameter.device)
    with torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []):
        try:
            copy.deepcopy(model).train()({"image": image, "label": label, "index": label})
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            return _first_line(error)
    return ""
