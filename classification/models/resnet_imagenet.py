"""ImageNet ResNets: torchvision's own class (He et al., CVPR 2016), opened before its last ReLUs."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet

from d2distill.common.outputs import Outputs

from .blocks import BasicBlock, Bottleneck, StagedResNet, run_stages
from .registry import register


class ImageNetResNet(StagedResNet, ResNet):
    """torchvision's ResNet with its names and initialization; only the way it is run differs.

    ``feats`` are the stem before the max pool and the four stages.
    """

    def outputs(self, images: Tensor) -> Outputs:
        stem = self.bn1(self.conv1(images))
        relu_stem = F.relu(stem)
        feats, preacts = run_stages(self.stages, self.maxpool(relu_stem))
        pooled = self.avgpool(feats[-1]).flatten(1)
        return Outputs(self.fc(pooled), [relu_stem, *feats], [stem, *preacts], pooled)


def _build(num_classes: int, block: type[nn.Module], depths: list[int]) -> ImageNetResNet:
    return ImageNetResNet(block, depths, num_classes=num_classes)


register("imagenet/ResNet18")(partial(_build, block=BasicBlock, depths=[2, 2, 2, 2]))
register("imagenet/ResNet34")(partial(_build, block=BasicBlock, depths=[3, 4, 6, 3]))
register("imagenet/ResNet50")(partial(_build, block=Bottleneck, depths=[3, 4, 6, 3]))
register("imagenet/ResNet101")(partial(_build, block=Bottleneck, depths=[3, 4, 23, 3]))
