"""What the models of this package share."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs


class FeatureClassifier(nn.Module):
    """A classifier that hands out its inner tensors. Subclasses write :meth:`outputs`.

    Attributes:
        classifier_name: path of the last layer, which turns ``pooled`` into logits.
    """

    classifier_name = "fc"

    def outputs(self, images: Tensor) -> Outputs:
        """Logits, stage maps, pre-activations and pooled vector of normalized images (N, 3, H, W)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalized images to (N, num_classes) logits."""
        return self.outputs(images).logits

    @property
    def classifier_layer(self) -> nn.Module:
        """The last layer as a module from ``pooled`` to logits; its parameters are the network's own."""
        return on_vectors(self.get_submodule(self.classifier_name))

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d] | None:
        """The last batch norm of each of ``feats[1:]``, or None where a family has no such layer.

        OFD takes its margins from them (Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019).
        """
        return None


def on_vectors(layer: nn.Module) -> nn.Module:
    """A linear layer as it is; a 1x1 convolution between reshapes, so that it too maps (N, D) to (N, C)."""
    if isinstance(layer, nn.Conv2d):
        return nn.Sequential(nn.Unflatten(1, (layer.in_channels, 1, 1)), layer, nn.Flatten())
    return layer


def global_pool(x: Tensor) -> Tensor:
    """Average over all positions, (N, C, H, W) to (N, C).

    The original networks pool with a kernel that covers the whole map at their own image size; a global pool gives
    the same there and takes other sizes too.
    """
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups (Zhang et al., ShuffleNet, CVPR 2018). Keeps the shape."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def conv_bn_act(
    in_channels: int, out_channels: int, kernel: int = 1, act: type = nn.ReLU, bias: bool = False, **conv: int
) -> list[nn.Module]:
    """A convolution, its batch norm and an in-place activation; 3x3 kernels and larger are padded to keep the size."""
    conv = {"padding": kernel // 2, **conv}
    return [
        nn.Conv2d(in_channels, out_channels, kernel, bias=bias, **conv),
        nn.BatchNorm2d(out_channels),
        act(inplace=True),
    ]


def kaiming_init_(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out) (He et al., ICCV 2015) without bias; batch norms are 1 and 0 already.

    The original code of the CIFAR ResNets, WRN, VGG and MobileNetV2 draws its convolutions so; the families that do
    not call this function were published with PyTorch's default initialization.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
