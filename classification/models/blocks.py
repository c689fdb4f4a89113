"""Residual blocks and stages: torchvision's, with the sum before a block's last ReLU accessible."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as tv

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, global_pool


class _OpenBlock:
    """Splits a torchvision block's forward at its last ReLU. No ReLU works in place, as the sum is handed out."""

    shortcut_name = "downsample"

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, *args, **kwargs
    ):
        super().__init__(inplanes, planes, stride, None, *args, **kwargs)
        setattr(self, self.shortcut_name, downsample)

    def preact(self, x: Tensor) -> Tensor:
        """The sum that enters the block's last ReLU."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(F.relu(out)))
        shortcut = getattr(self, self.shortcut_name)
        return out + (x if shortcut is None else shortcut(x))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preact(x))

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3 if hasattr(self, "conv3") else self.bn2


class BasicBlock(_OpenBlock, tv.BasicBlock):
    """Two 3x3 convolutions (He et al., CVPR 2016)."""


class Bottleneck(_OpenBlock, tv.Bottleneck):
    """1x1, 3x3 (with the stride), 1x1 convolutions; four times wider at the end."""


def make_stage(block: type, in_channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    """``depth`` blocks, the first one with the stride and, where the shape changes, a 1x1 convolution and
    batch norm as its shortcut. (N, in_channels, H, W) to (N, planes * block.expansion, H / stride, W / stride)."""
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
    first = block(in_channels, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(depth - 1)))


def run_stages(stages: list[nn.Sequential], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The stages' maps after and before their last ReLU."""
    feats, preacts = [], []
    for stage in stages:
        *body, last = stage
        for block in body:
            x = block(x)
        preacts.append(last.preact(x))
        x = F.relu(preacts[-1])
        feats.append(x)
    return feats, preacts


class StagedClassifier(FeatureClassifier):
    """``conv1``, ``bn1``, ReLU, stages ``layer1``, ``layer2`` ... of blocks with ``preact``, pool, linear layer."""

    @property
    def stages(self) -> list[nn.Sequential]:
        return [stage for name, stage in self.named_children() if name.startswith("layer")]

    def outputs(self, images: Tensor) -> Outputs:
        stem = F.relu(self.bn1(self.conv1(images)))
        feats, preacts = run_stages(self.stages, stem)
        pooled = global_pool(feats[-1])
        logits = self.get_submodule(self.classifier_name)(pooled)
        return Outputs(logits, [stem, *feats], [stem, *preacts], pooled)


class StagedResNet(StagedClassifier):
    """The same with residual blocks, whose sums follow a batch norm."""

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].last_bn for stage in self.stages]
