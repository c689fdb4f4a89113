"""MobileNetV2 for Tiny-ImageNet (Sandler et al., CVPR 2018): biased convolutions, a 1x1 stem, a 1x1 classifier."""

from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import ZooModel, global_pool
from .registry import register


def _conv_bn_relu6(in_channels: int, out_channels: int, kernel: int = 1, **conv) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, **conv),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    ]


class LinearBottleneck(nn.Module):
    """Expansion, depthwise convolution, linear projection; the input is added where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.add_input = stride == 1 and in_channels == out_channels
        self.residual = nn.Sequential(
            *_conv_bn_relu6(in_channels, hidden),
            *_conv_bn_relu6(hidden, hidden, 3, stride=stride, padding=1, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) if self.add_input else self.residual(x)


def _stage(in_channels: int, out_channels: int, depth: int, stride: int) -> nn.Sequential:
    first = LinearBottleneck(in_channels, out_channels, stride, 6)
    return nn.Sequential(first, *(LinearBottleneck(out_channels, out_channels, 1, 6) for _ in range(depth - 1)))


@register("tiny_imagenet/MobileNetV2")
class TinyMobileNetV2(ZooModel):
    """``feats`` are the stem, stages 2-4 and the last 1x1 convolution's map; there are no ``preacts``.

    Args:
        num_classes: width of the classifier.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        # Padding a 1x1 convolution is odd (64x64 images become 66x66 maps), but published weights were trained so.
        self.pre = nn.Sequential(*_conv_bn_relu6(3, 32, padding=1))
        self.stage1 = LinearBottleneck(32, 16, 1, 1)
        self.stage2 = _stage(16, 24, depth=2, stride=2)
        self.stage3 = _stage(24, 32, depth=3, stride=2)
        self.stage4 = _stage(32, 64, depth=4, stride=2)
        self.stage5 = _stage(64, 96, depth=3, stride=1)
        self.stage6 = _stage(96, 160, depth=3, stride=1)
        self.stage7 = LinearBottleneck(160, 320, 1, 6)
        self.conv1 = nn.Sequential(*_conv_bn_relu6(320, 1280))
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
