"""MobileNetV2 of half width for CIFAR (Sandler et al., CVPR 2018), with ReLU in the place of ReLU6."""

from torch import Tensor, nn

from d2distill.common.outputs import Outputs

from .base import ZooModel, global_pool, kaiming_init_
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

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


@register("cifar/MobileNetV2")
class MobileNetV2(ZooModel):
    """The stages end in linear projections, so there are no ``preacts``.

    Args:
        num_classes: width of the classifier.
        width: factor of all channels but the last layer's 1280.
    """

    feat_stages = (1, 2, 4, 6)

    def __init__(self, num_classes: int, width: float = 0.5):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _conv_bn_relu(3, channels, kernel=3, stride=2)
        self.blocks = nn.Sequential()
        for expansion, full_channels, depth, stride in _SETTINGS:
            stage = nn.Sequential()
            for i in range(depth):
                out_channels = int(full_channels * width)
                stage.append(InvertedResidual(channels, out_channels, stride if i == 0 else 1, expansion))
                channels = out_channels
            self.blocks.append(stage)
        self.conv2 = _conv_bn_relu(channels, 1280, kernel=1, stride=1)
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
