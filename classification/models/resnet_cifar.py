"""CIFAR ResNets: three stages on a 3x3 stem (He et al., Deep Residual Learning, CVPR 2016, section 4.2).

``resnet8x4`` and ``resnet32x4`` have depth 8 and 32 and four times the width (Tian et al., CRD, ICLR 2020).
"""

from functools import partial

from torch import nn

from .base import kaiming_init_
from .blocks import BasicBlock, StagedResNet, make_stage
from .registry import register


class CifarResNet(StagedResNet):
    """ResNet of basic blocks for small images.

    Args:
        num_classes: width of the classifier.
        depth: 6 n + 2 layers, n blocks per stage.
        widths: channels of the stem and of the three stages.
    """

    def __init__(self, num_classes: int, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = make_stage(BasicBlock, widths[0], widths[1], blocks, stride=1)
        self.layer2 = make_stage(BasicBlock, widths[1], widths[2], blocks, stride=2)
        self.layer3 = make_stage(BasicBlock, widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        kaiming_init_(self)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    register(f"cifar/resnet{_depth}")(partial(CifarResNet, depth=_depth))
for _depth in (8, 32):
    register(f"cifar/resnet{_depth}x4")(partial(CifarResNet, depth=_depth, widths=(32, 64, 128, 256)))
