"""MobileNetV1 (Howard et al., 2017) for ImageNet."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import ZooModel, global_pool
from .registry import register

# Output channels and stride of the depthwise separable blocks, model.1 to model.13.
_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


@register("imagenet/MobileNetV1")
class MobileNetV1(ZooModel):
    """``feats`` are the last blocks of four resolutions. There is no stem entry, so methods that take
    ``feats[1:]`` do without the first of them; published results were made so.

    Args:
        num_classes: width of the classifier.
    """

    feat_blocks = (3, 5, 11, 13)

    def __init__(self, num_classes: int):
        super().__init__()
        channels = 32
        self.model = nn.Sequential(nn.Sequential(*_conv_bn_relu(3, channels, 3, 2)))
        for out_channels, stride in _BLOCKS:
            depthwise = _conv_bn_relu(channels, channels, 3, stride, groups=channels)
            self.model.append(nn.Sequential(*depthwise, *_conv_bn_relu(channels, out_channels, 1, 1)))
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
