"""ShuffleNet with three groups for CIFAR (Zhang et al., CVPR 2018): a 1x1 stem and no max pool."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import channel_shuffle
from .blocks import StagedClassifier
from .registry import register


class ShuffleBlock(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1. With stride 2 the pooled input is concatenated, else added.

    Args:
        in_channels, out_channels: of the whole block.
        stride: 1 or 2.
        groups: of the last 1x1 convolution, and of the first unless it sees the stem.
        first_groups: groups of the first 1x1 convolution and of the shuffle after it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        self.stride = stride
        self.first_groups = first_groups
        conv_channels = out_channels - in_channels if stride == 2 else out_channels
        mid = conv_channels // 4
        self.conv1 = nn.Conv2d(in_channels, mid, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, conv_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(conv_channels)

    def preact(self, x: Tensor) -> Tensor:
        """The sum or concatenation that enters the block's last ReLU."""
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.first_groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return out + x
        return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preact(x))


def _stage(in_channels: int, out_channels: int, depth: int, groups: int, first_groups: int) -> nn.Sequential:
    first = ShuffleBlock(in_channels, out_channels, 2, groups, first_groups)
    return nn.Sequential(
        first, *(ShuffleBlock(out_channels, out_channels, 1, groups, groups) for _ in range(depth - 1))
    )


@register("cifar/ShuffleV1")
class ShuffleV1(StagedClassifier):
    """ShuffleNet, stages of 4, 8 and 4 blocks, 240, 480 and 960 channels wide.

    Args:
        num_classes: width of the classifier.
        groups: of the 1x1 convolutions.
    """

    classifier_name = "linear"

    def __init__(self, num_classes: int, groups: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 240, depth=4, groups=groups, first_groups=1)
        self.layer2 = _stage(240, 480, depth=8, groups=groups, first_groups=groups)
        self.layer3 = _stage(480, 960, depth=4, groups=groups, first_groups=groups)
        self.linear = nn.Linear(960, num_classes)
