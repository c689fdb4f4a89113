"""ShuffleNets for CIFAR and Tiny-ImageNet, with a 1x1 stem and no max pool.

ShuffleV1 has three groups (Zhang et al., CVPR 2018); ShuffleV2 is of width 1 (Ma et al., ECCV 2018).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import SplitBlock, StagedClassifier, stack
from .registry import register


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` groups. Keeps the shape."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def _conv1x1(in_channels: int, out_channels: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)


def _depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class GroupBlock(SplitBlock):
    """V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1. With stride 2 the pooled input is concatenated, else added.

    The convolution that sees the stem, of 24 channels, has no groups.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.groups = 1 if in_channels == 24 else 3
        conv_channels = out_channels - in_channels if stride == 2 else out_channels
        mid = conv_channels // 4
        self.conv1, self.bn1 = _conv1x1(in_channels, mid, self.groups), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = _depthwise(mid, stride), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = _conv1x1(mid, conv_channels, 3), nn.BatchNorm2d(conv_channels)

    def preact(self, x: Tensor) -> Tensor:
        out = channel_shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        out = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return out + x
        return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)


@register("cifar/ShuffleV1")
class ShuffleV1(StagedClassifier):
    """Stages of 4, 8 and 4 blocks, 240, 480 and 960 channels wide."""

    classifier_name = "linear"

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = _conv1x1(3, 24), nn.BatchNorm2d(24)
        self.layer1 = stack(GroupBlock, 24, 240, 4, 2)
        self.layer2 = stack(GroupBlock, 240, 480, 8, 2)
        self.layer3 = stack(GroupBlock, 480, 960, 4, 2)
        self.linear = nn.Linear(960, num_classes)


class DownBlock(nn.Module):
    """V2: both branches see the whole input and halve its resolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1, self.bn1 = _depthwise(in_channels, stride=2), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = _conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = _depthwise(half, stride=2), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = _conv1x1(half, half), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return channel_shuffle(torch.cat([left, right], dim=1), 2)


class KeepBlock(SplitBlock):
    """V2: keeps the first half of the channels and transforms the second."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv1x1(half, half), nn.BatchNorm2d(half)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x.chunk(2, dim=1)
        changed = F.relu(self.bn1(self.conv1(changed)))
        return kept, self.bn3(self.conv3(self.bn2(self.conv2(changed))))

    def before_and_after_relu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves before the ReLU of the second; after it, they are shuffled."""
        kept, changed = self._halves(x)
        return torch.cat([kept, changed], dim=1), channel_shuffle(torch.cat([kept, F.relu(changed)], dim=1), 2)

    def forward(self, x: Tensor) -> Tensor:
        # Without the copy that the pre-activation is.
        kept, changed = self._halves(x)
        return channel_shuffle(torch.cat([kept, F.relu(changed)], dim=1), 2)


@register("tiny_imagenet/ShuffleV2")
@register("cifar/ShuffleV2")
class ShuffleV2(StagedClassifier):
    """Stages of 4, 8 and 4 blocks, 116, 232 and 464 channels wide, and a 1x1 convolution before the pool."""

    classifier_name = "linear"

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = _conv1x1(3, 24), nn.BatchNorm2d(24)
        for i, (before, channels, depth) in enumerate(((24, 116, 3), (116, 232, 7), (232, 464, 3)), start=1):
            blocks = DownBlock(before, channels), *(KeepBlock(channels) for _ in range(depth))
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.conv2, self.bn2 = _conv1x1(464, 1024), nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def head(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))
