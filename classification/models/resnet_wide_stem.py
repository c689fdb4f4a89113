"""ResNet18 and ResNet50 for CIFAR and Tiny-ImageNet: ImageNet's four stages on a 3x3 stem of 64 channels
with neither stride nor pooling (He et al., CVPR 2016, as the CRD and later code bases adapt it)."""

from functools import partial

from torch import nn

from . import blocks
from .base import kaiming_init_
from .blocks import StagedResNet, make_stage
from .registry import register


class BasicBlock(blocks.BasicBlock):
    shortcut_name = "shortcut"


class Bottleneck(blocks.Bottleneck):
    shortcut_name = "shortcut"


class WideStemResNet(StagedResNet):
    """ResNet whose stem keeps the image's resolution.

    Args:
        num_classes: width of the classifier.
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        depths: blocks per stage.
    """

    classifier_name = "linear"

    def __init__(self, num_classes: int, block: type, depths: tuple[int, int, int, int]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = make_stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = make_stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = make_stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = make_stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.linear = nn.Linear(512 * block.expansion, num_classes)
        kaiming_init_(self)


for _family in ("cifar", "tiny_imagenet"):
    register(f"{_family}/ResNet18")(partial(WideStemResNet, block=BasicBlock, depths=(2, 2, 2, 2)))
register("cifar/ResNet50")(partial(WideStemResNet, block=Bottleneck, depths=(3, 4, 6, 3)))
