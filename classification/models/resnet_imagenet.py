"""ImageNet ResNets: torchvision's own class (He et al., CVPR 2016), opened before its last ReLUs."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

from d2distill.common.outputs import Outputs

from .base import ZooModel
from .blocks import BasicBlock, Bottleneck, run_stages
from .registry import register


class ImageNetResNet(ZooModel, ResNet):
    """torchvision's ResNet, names, initialisation and all; only how it is run differs.

    ``feats`` are the stem before the max pool and the four stages.
    """

    @property
    def _stages(self) -> list[nn.Sequential]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def outputs(self, images: Tensor) -> Outputs:
        stem = self.bn1(self.conv1(images))
        relu_stem = F.relu(stem)
        feats, preacts = run_stages(self._stages, self.maxpool(relu_stem))
        pooled = self.avgpool(feats[-1]).flatten(1)
        return Outputs(self.fc(pooled), [relu_stem, *feats], [stem, *preacts], pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [stage[-1].last_bn for stage in self._stages]


def _build(num_classes: int, block: type, depths: list[int]) -> ImageNetResNet:
    return ImageNetResNet(block, depths, num_classes=num_classes)


register("imagenet/ResNet18")(partial(_build, block=BasicBlock, depths=[2, 2, 2, 2]))
register("imagenet/ResNet34")(partial(_build, block=BasicBlock, depths=[3, 4, 6, 3]))
register("imagenet/ResNet50")(partial(_build, block=Bottleneck, depths=[3, 4, 6, 3]))
register("imagenet/ResNet101")(partial(_build, block=Bottleneck, depths=[3, 4, 23, 3]))
