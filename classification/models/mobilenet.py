"""MobileNetV1 (Howard et al., 2017) for ImageNet, and MobileNetV2 (Sandler et al., CVPR 2018) for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import FeatureClassifier, conv_bn_act, global_pool, kaiming_init_, small_init_, stack
from .registry import register

# Output channels and stride of the depthwise separable blocks, model.1 to model.13.
_V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# Channels at full width, blocks, stride of the first block, expansion.
_V2_STAGES = ((16, 1, 1, 1), (24, 2, 1, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6))


@register("imagenet/MobileNetV1")
class MobileNetV1(FeatureClassifier):
    """``feats`` are the last blocks of four resolutions. There is no stem entry, so methods that take
    ``feats[1:]`` do without the first of them; published results were made so."""

    feat_blocks = (3, 5, 11, 13)

    def __init__(self, num_classes: int):
        super().__init__()
        channels = 32
        self.model = nn.Sequential(nn.Sequential(*conv_bn_act(3, channels, 3, stride=2)))
        for out_channels, stride in _V1_BLOCKS:
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
            preacts.append(block[:-1](x))
            # Not the block's own ReLU: that one works in place and would overwrite the pre-activation.
            x = F.relu(preacts[-1])
            feats.append(x)
        pooled = global_pool(x)
        return Outputs(self.fc(pooled), feats, preacts, pooled)

    @property
    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        return [self.model[i][-2] for i in self.feat_blocks[1:]]


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


@register("cifar/MobileNetV2")
class MobileNetV2(FeatureClassifier):
    """Half as wide as the paper's, with ReLU in place of ReLU6. Stages end linearly, so there are no ``preacts``."""

    classifier_name = "classifier"
    feat_stages = (1, 2, 4, 6)

    def __init__(self, num_classes: int):
        super().__init__()
        channels = 16
        self.conv1 = nn.Sequential(*conv_bn_act(3, channels, 3, stride=2))
        self.blocks = nn.Sequential()
        for full_channels, *stage in _V2_STAGES:
            self.blocks.append(stack(InvertedResidual, channels, full_channels // 2, *stage))
            channels = full_channels // 2
        self.conv2 = nn.Sequential(*conv_bn_act(channels, 1280))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        kaiming_init_(self)
        small_init_(self.classifier[0])

    def outputs(self, images: Tensor) -> Outputs:
        feats = [self.conv1(images)]
        x = feats[0]
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
    """Biased convolutions, 1x1 stem and classifier. ``feats``: stem, stages 2-4, the last 1x1 convolution's map."""

    classifier_name = "conv2"

    def __init__(self, num_classes: int):
        super().__init__()
        block, settings = LinearBottleneck, LinearBottleneck.settings
        # Padding a 1x1 convolution is odd (64x64 images become 66x66 maps), but published weights were trained so.
        self.pre = nn.Sequential(*conv_bn_act(3, 32, padding=1, **settings))
        self.stage1 = block(32, 16, 1, 1)
        self.stage2 = stack(block, 16, 24, 2, 2, 6)
        self.stage3 = stack(block, 24, 32, 3, 2, 6)
        self.stage4 = stack(block, 32, 64, 4, 2, 6)
        self.stage5 = stack(block, 64, 96, 3, 1, 6)
        self.stage6 = stack(block, 96, 160, 3, 1, 6)
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
