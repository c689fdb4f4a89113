"""MobileNetV1 (Howard et al., 2017) for ImageNet."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, conv_bn_act, global_pool
from .registry import register

# Output channels and stride of the depthwise separable blocks, model.1 to model.13.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


@register("imagenet/MobileNetV1")
class MobileNetV1(FeatureClassifier):
    """``feats`` are the last blocks of four resolutions. There is no stem entry, so methods that take
    ``feats[1:]`` do without the first of them; published results were made so.

    Args:
        num_classes: width of the classifier.
    """

    feat_blocks = (3, 5, 11, 13)

    def __init__(self, num_classes: int):
        super().__init__()
        channels = 32
        self.model = nn.Sequential(nn.Sequential(*conv_bn_act(3, channels, 3, stride=2)))
        for out_channels, stride in _BLOCKS:
            depthwise = conv_bn_act(channels, channels, 3, stride=stride, groups=channels)
            self.model.append(nn.Sequential(*depthwise, *conv_bn_act(channels, out_channels)))
            channels = out_channels
        self.fc = nn.Linear(channels, num_classes)

    def outputs(self, images: Tensor) -> Outputs:
        x, feats, preacts = images, [], []
        for i, block in enumerate(self.model):
            if i not in self.feat_blocks:
                x = block(x)
                continue
            for layer in list(block)[:-1]:
                x = layer(x)
            preacts.append(x)
            # Not the block's own ReLU: that one works in place and would overwrite the pre-activation.
            x = F.relu(x)
            feats.append(x)
        pooled = global_pool(x)
        return Outputs(self.fc(pooled), feats, preacts, pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.model[i][-2] for i in self.feat_blocks[1:]]
