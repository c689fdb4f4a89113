"""MobileNetV2 (Sandler et al., CVPR 2018) for CIFAR and Tiny-ImageNet.

Their stages end in linear projections, so there are no ``preacts``.
"""

from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, conv_bn_act, global_pool, kaiming_init_
from .registry import register

# Expansion, channels at full width, blocks, stride of the first block.
_SETTINGS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection; the input is added where the shape stays."""

    branch = "conv"
    settings = {"act": nn.ReLU, "bias": False}

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.add_input = stride == 1 and in_channels == out_channels
        layers = nn.Sequential(
            *conv_bn_act(in_channels, hidden, **self.settings),
            *conv_bn_act(hidden, hidden, 3, stride=stride, groups=hidden, **self.settings),
            nn.Conv2d(hidden, out_channels, 1, bias=self.settings["bias"]),
            nn.BatchNorm2d(out_channels),
        )
        setattr(self, self.branch, layers)

    def forward(self, x: Tensor) -> Tensor:
        out = getattr(self, self.branch)(x)
        return x + out if self.add_input else out


def _stage(block: type, in_channels: int, out_channels: int, depth: int, stride: int, expansion: int) -> nn.Sequential:
    first = block(in_channels, out_channels, stride, expansion)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1, expansion) for _ in range(depth - 1)))


@register("cifar/MobileNetV2")
class MobileNetV2(FeatureClassifier):
    """Half as wide as the paper's, with ReLU in place of ReLU6.

    Args:
        num_classes: width of the classifier.
        width: factor of all channels but the last layer's 1280.
    """

    classifier_name = "classifier"
    feat_stages = (1, 2, 4, 6)

    def __init__(self, num_classes: int, width: float = 0.5):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_act(3, channels, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full_channels, depth, stride in _SETTINGS:
            out_channels = int(full_channels * width)
            self.blocks.append(_stage(InvertedResidual, channels, out_channels, depth, stride, expansion))
            channels = out_channels
        self.conv2 = nn.Sequential(*conv_bn_act(channels, 1280))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        kaiming_init_(self)
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def outputs(self, images: Tensor) -> Outputs:
        x = self.conv1(images)
        feats = [x]
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in self.feat_stages:
                feats.append(x)
        pooled = global_pool(self.conv2(x))
        return Outputs(self.classifier(pooled), feats, None, pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.blocks[i][-1].conv[-1] for i in self.feat_stages]


class LinearBottleneck(InvertedResidual):
    branch = "residual"
    settings = {"act": nn.ReLU6, "bias": True}


@register("tiny_imagenet/MobileNetV2")
class TinyMobileNetV2(FeatureClassifier):
    """Biased convolutions, a 1x1 stem, a 1x1 classifier.

    ``feats`` are the stem, stages 2-4 and the last 1x1 convolution's map.

    Args:
        num_classes: width of the classifier.
    """

    classifier_name = "conv2"

    def __init__(self, num_classes: int):
        super().__init__()
        block, settings = LinearBottleneck, LinearBottleneck.settings
        # Padding a 1x1 convolution is odd (64x64 images become 66x66 maps), but published weights were trained so.
        self.pre = nn.Sequential(*conv_bn_act(3, 32, padding=1, **settings))
        self.stage1 = block(32, 16, 1, 1)
        self.stage2 = _stage(block, 16, 24, 2, 2, 6)
        self.stage3 = _stage(block, 24, 32, 3, 2, 6)
        self.stage4 = _stage(block, 32, 64, 4, 2, 6)
        self.stage5 = _stage(block, 64, 96, 3, 1, 6)
        self.stage6 = _stage(block, 96, 160, 3, 1, 6)
        self.stage7 = block(160, 320, 1, 6)
        self.conv1 = nn.Sequential(*conv_bn_act(320, 1280, **settings))
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def outputs(self, images: Tensor) -> Outputs:
        stem = self.pre(images)
        feat2 = self.stage2(self.stage1(stem))
        feat3 = self.stage3(feat2)
        feat4 = self.stage4(feat3)
        last = self.conv1(self.stage7(self.stage6(self.stage5(feat4))))
        pooled = global_pool(last)
        logits = self.conv2(pooled[:, :, None, None]).flatten(1)
        return Outputs(logits, [stem, feat2, feat3, feat4, last], None, pooled)
