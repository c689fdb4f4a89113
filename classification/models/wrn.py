"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016), without dropout."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, global_pool, kaiming_init_
from .registry import register


class WideBlock(nn.Module):
    """Pre-activation block of two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.after_bn1(x, self.bn1(x))

    def after_bn1(self, x: Tensor, normed: Tensor) -> Tensor:
        """The block from ``normed = bn1(x)`` on."""
        activated = F.relu(normed)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideStage(nn.Module):
    """Blocks of one width; the first has the stride."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int):
        super().__init__()
        first = WideBlock(in_channels, out_channels, stride)
        self.layer = nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(depth - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first batch norm of ``x``, which is the previous stage's pre-activation, and the stage's output.

        The norm is handed out and not computed again: a second call would update its running statistics twice.
        """
        first, *rest = self.layer
        normed = first.bn1(x)
        x = first.after_bn1(x, normed)
        for block in rest:
            x = block(x)
        return normed, x


class WideResNet(FeatureClassifier):
    """WRN-depth-width. ``feats`` end before a batch norm, so they carry no ReLU; ``preacts`` are that norm's outputs.

    Args:
        num_classes: width of the classifier.
        depth: 6 n + 4 layers, n blocks per stage.
        width: the widening factor.
    """

    def __init__(self, num_classes: int, depth: int, width: int):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = WideStage(16, 16 * width, blocks, stride=1)
        self.block2 = WideStage(16 * width, 32 * width, blocks, stride=2)
        self.block3 = WideStage(32 * width, 64 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        kaiming_init_(self)
        nn.init.zeros_(self.fc.bias)

    def outputs(self, images: Tensor) -> Outputs:
        stem = self.conv1(images)
        _, feat1 = self.block1(stem)
        preact1, feat2 = self.block2(feat1)
        preact2, feat3 = self.block3(feat2)
        preact3 = self.bn1(feat3)
        pooled = global_pool(F.relu(preact3))
        return Outputs(self.fc(pooled), [stem, feat1, feat2, feat3], [stem, preact1, preact2, preact3], pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]


for _depth, _width in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(f"cifar/wrn_{_depth}_{_width}")(partial(WideResNet, depth=_depth, width=_width))
