"""What the zoo's models share."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs


class ZooModel(nn.Module):
    """A classifier whose inner tensors can be looked at. Subclasses write :meth:`outputs`, nothing else."""

    def outputs(self, images: Tensor) -> Outputs:
        """Logits, stage maps, pre-activations and pooled vector of normalised images (N, 3, H, W)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalised images to (N, num_classes) logits."""
        return self.outputs(images).logits

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d] | None:
        """The last batch norm of each of ``feats[1:]``, or None where a family has no such layer.

        OFD takes its margins from them (Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019).
        """
        return None


def global_pool(x: Tensor) -> Tensor:
    """Average over all positions, (N, C, H, W) to (N, C). Pools of a fixed kernel in the original networks
    cover the whole map at their own image size; a global one gives the same there and takes other sizes too."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups (Zhang et al., ShuffleNet, CVPR 2018). Keeps the shape."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def kaiming_init_(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out) (He et al., ICCV 2015) without bias; batch norms are 1 and 0 already.

    The original code of the CIFAR ResNets, WRN, VGG and MobileNetV2 all draw their convolutions so;
    the families that do not call this one were published with PyTorch's default initialisation.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
