"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016), without dropout."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, global_pool, kaiming_init_, stack
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


class WideResNet(FeatureClassifier):
    """WRN-depth-width. ``feats`` end before a batch norm, so they carry no ReLU; ``preacts`` are that norm's outputs.

    Args:
        depth: 6 n + 4 layers, n blocks per stage.
        width: the widening factor.
    """

    def __init__(self, num_classes: int, depth: int, width: int):
        super().__init__()
        channels = 16
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i, (planes, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            stage = stack(WideBlock, channels, planes * width, (depth - 4) // 6, stride)
            # Published state dicts call the blocks block1.layer.0 and so on.
            setattr(self, f"block{i}", nn.ModuleDict({"layer": stage}))
            channels = planes * width
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        kaiming_init_(self)
        nn.init.zeros_(self.fc.bias)

    @property
    def _stages(self) -> list[nn.Sequential]:
        return [block["layer"] for block in (self.block1, self.block2, self.block3)]

    def outputs(self, images: Tensor) -> Outputs:
        x = self.conv1(images)
        feats, preacts = [x], []
        for first, *rest in self._stages:
            # A stage's first norm makes the pre-activation of the stage before; a second call of it would update its
            # running statistics twice.
            preacts.append(first.bn1(x))
            x = first.after_bn1(x, preacts[-1])
            for block in rest:
                x = block(x)
            feats.append(x)
        preacts.append(self.bn1(x))
        pooled = global_pool(F.relu(preacts[-1]))
        return Outputs(self.fc(pooled), feats, [feats[0], *preacts[1:]], pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [*(stage[0].bn1 for stage in self._stages[1:]), self.bn1]


for _depth, _width in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(f"cifar/wrn_{_depth}_{_width}")(partial(WideResNet, depth=_depth, width=_width))
