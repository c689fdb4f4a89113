"""VGG with batch norm for small images (Simonyan & Zisserman, ICLR 2015); one linear layer as classifier."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, conv_bn_act, global_pool, kaiming_init_, small_init_
from .registry import register


class VGG(FeatureClassifier):
    """Five blocks of `depths` 3x3 convolutions.

    Maps of 32x32 images have sides 32, 16, 8, 4, 4; of 64x64: 64, 32, 16, 8, 4.
    """

    classifier_name = "classifier"

    def __init__(self, num_classes: int, depths: tuple[int, int, int, int, int]):
        super().__init__()
        channels = 3
        for i, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += conv_bn_act(channels, width, 3, bias=True)
                channels = width
            # The last ReLU is left to `outputs`.
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))
        self.classifier = nn.Linear(channels, num_classes)
        kaiming_init_(self)
        small_init_(self.classifier)

    @property
    def _blocks(self) -> list[nn.Sequential]:
        return [self.block0, self.block1, self.block2, self.block3, self.block4]

    def outputs(self, images: Tensor) -> Outputs:
        # Published weights for 32x32 were trained without this pool, those for 64x64 with it.
        pooled_after = (0, 1, 2, 3) if images.shape[2] == 64 else (0, 1, 2)
        x, feats, preacts = images, [], []
        for i, block in enumerate(self._blocks):
            preacts.append(block(x))
            feats.append(F.relu(preacts[-1]))
            x = F.max_pool2d(feats[-1], 2) if i in pooled_after else feats[-1]
        pooled = global_pool(x)
        return Outputs(self.classifier(pooled), feats, [feats[0], *preacts[1:]], pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [block[-1] for block in self._blocks[1:]]


for _depth, _depths in (
    (8, (1, 1, 1, 1, 1)),
    (11, (1, 1, 2, 2, 2)),
    (13, (2, 2, 2, 2, 2)),
    (16, (2, 2, 3, 3, 3)),
    (19, (2, 2, 4, 4, 4)),
):
    register(f"cifar/vgg{_depth}")(partial(VGG, depths=_depths))
