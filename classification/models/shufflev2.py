"""ShuffleNetV2 of width 1 for CIFAR and Tiny-ImageNet (Ma et al., ECCV 2018): a 1x1 stem and no max pool."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, channel_shuffle, global_pool
from .registry import register


def _conv1x1(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, bias=False)


def _depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class DownBlock(nn.Module):
    """Both branches see the whole input and halve its resolution."""

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


class SplitBlock(nn.Module):
    """Keeps the first half of the channels and transforms the second."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = _conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = _depthwise(half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = _conv1x1(half, half), nn.BatchNorm2d(half)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept half and the transformed one before its last ReLU."""
        kept, changed = x.chunk(2, dim=1)
        changed = F.relu(self.bn1(self.conv1(changed)))
        return kept, self.bn3(self.conv3(self.bn2(self.conv2(changed))))

    def forward(self, x: Tensor) -> Tensor:
        return join(*self.halves(x))


def join(kept: Tensor, changed: Tensor) -> Tensor:
    """A block's output from its halves before the ReLU."""
    return channel_shuffle(torch.cat([kept, F.relu(changed)], dim=1), 2)


def _stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    return nn.Sequential(DownBlock(in_channels, out_channels), *(SplitBlock(out_channels) for _ in range(depth)))


class ShuffleV2(FeatureClassifier):
    """``feats`` are shuffled; ``preacts`` are the last block's halves concatenated, before ReLU and shuffle.

    Args:
        num_classes: width of the classifier.
    """

    classifier_name = "linear"

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = _conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, depth=3)
        self.layer2 = _stage(116, 232, depth=7)
        self.layer3 = _stage(232, 464, depth=3)
        self.conv2 = _conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def outputs(self, images: Tensor, with_preacts: bool = True) -> Outputs:
        x = F.relu(self.bn1(self.conv1(images)))
        feats, preacts = [x], [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            *body, last = stage
            for block in body:
                x = block(x)
            kept, changed = last.halves(x)
            x = join(kept, changed)
            feats.append(x)
            if with_preacts:
                preacts.append(torch.cat([kept, changed], dim=1))
        pooled = global_pool(F.relu(self.bn2(self.conv2(x))))
        return Outputs(self.linear(pooled), feats, preacts if with_preacts else None, pooled)

    def forward(self, images: Tensor) -> Tensor:
        # Only here do pre-activations cost a copy of their own.
        return self.outputs(images, with_preacts=False).logits


for _family in ("cifar", "tiny_imagenet"):
    register(f"{_family}/ShuffleV2")(ShuffleV2)
