"""ResNets (He et al., Deep Residual Learning, CVPR 2016): torchvision's blocks, opened before their last ReLU."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as tv

from d2distill.common.outputs import Outputs

from .base import SplitBlock, StagedClassifier, kaiming_init_
from .registry import register


class _OpenBlock(SplitBlock):
    """Splits a torchvision block's forward at its last ReLU. No ReLU works in place, as the sum is handed out."""

    shortcut_name = "downsample"

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, *args, **kw):
        super().__init__(inplanes, planes, stride, None, *args, **kw)
        setattr(self, self.shortcut_name, downsample)

    def preact(self, x: Tensor) -> Tensor:
        """The sum that enters the block's last ReLU."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(F.relu(out)))
        shortcut = getattr(self, self.shortcut_name)
        return out + (x if shortcut is None else shortcut(x))


class BasicBlock(_OpenBlock, tv.BasicBlock):
    """Two 3x3 convolutions."""


class Bottleneck(_OpenBlock, tv.Bottleneck):
    """1x1, 3x3 (with the stride), 1x1 convolutions; four times wider at the end."""


class _StagedResNet(StagedClassifier):
    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [getattr(stage[-1], "bn3", stage[-1].bn2) for stage in self.stages]


class ImageNetResNet(_StagedResNet, tv.ResNet):
    """torchvision's ResNet with its names and initialization; only the way it is run differs.

    ``feats`` are the stem before the max pool and the four stages.
    """

    def outputs(self, images: Tensor) -> Outputs:
        stem = self.bn1(self.conv1(images))
        relu_stem = F.relu(stem)
        feats, preacts = self.run_stages(self.maxpool(relu_stem))
        pooled = self.avgpool(feats[-1]).flatten(1)
        return Outputs(self.fc(pooled), [relu_stem, *feats], [stem, *preacts], pooled)


class CifarResNet(_StagedResNet):
    """Stages on a 3x3 stem with neither stride nor pooling, for small images (section 4.2).

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks per stage.
        widths: channels of the stem and of the stages' 3x3 convolutions.
    """

    def __init__(self, num_classes: int, block: type, depths: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for i, (planes, depth) in enumerate(zip(widths[1:], depths, strict=True), start=1):
            setattr(self, f"layer{i}", _stage(block, channels, planes, depth, stride=1 if i == 1 else 2))
            channels = planes * block.expansion
        setattr(self, self.classifier_name, nn.Linear(channels, num_classes))
        kaiming_init_(self)


def _stage(block: type, in_channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    """The first block has the stride and, where the shape changes, a 1x1 convolution and batch norm as shortcut."""
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
    first = block(in_channels, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(depth - 1)))


class WideStemResNet(CifarResNet):
    """ImageNet's four stages on a stem of 64 channels, as the CRD and later code bases name its layers."""

    classifier_name = "linear"


class _ShortcutBasicBlock(BasicBlock):
    shortcut_name = "shortcut"


class _ShortcutBottleneck(Bottleneck):
    shortcut_name = "shortcut"


# resnet8x4 and resnet32x4 are four times as wide (Tian et al., CRD, ICLR 2020).
for _name, _depth, _widths in (
    *((f"resnet{depth}", depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)),
    *((f"resnet{depth}x4", depth, (32, 64, 128, 256)) for depth in (8, 32)),
):
    _depths = ((_depth - 2) // 6,) * 3
    register(f"cifar/{_name}")(partial(CifarResNet, block=BasicBlock, depths=_depths, widths=_widths))
for _name, _block, _depths in (
    ("cifar/ResNet18", _ShortcutBasicBlock, (2, 2, 2, 2)),
    ("tiny_imagenet/ResNet18", _ShortcutBasicBlock, (2, 2, 2, 2)),
    ("cifar/ResNet50", _ShortcutBottleneck, (3, 4, 6, 3)),
):
    register(_name)(partial(WideStemResNet, block=_block, depths=_depths, widths=(64, 64, 128, 256, 512)))
for _depth, _block, _depths in (
    (18, BasicBlock, (2, 2, 2, 2)),
    (34, BasicBlock, (3, 4, 6, 3)),
    (50, Bottleneck, (3, 4, 6, 3)),
    (101, Bottleneck, (3, 4, 23, 3)),
):
    # torchvision takes the number of classes by name only.
    register(f"imagenet/ResNet{_depth}")(
        lambda num_classes, block=_block, depths=_depths: ImageNetResNet(block, depths, num_classes)
    )
