"""What the models of this package share."""

import torch.nn.functional as F
from torch import Tensor, nn

from d2distill.common.outputs import Outputs


class FeatureClassifier(nn.Module):
    """A classifier that hands out its inner tensors. Subclasses write :meth:`outputs`.

    Attributes:
        classifier_name: path of the last layer, which turns ``pooled`` into logits.
        bn_before_relu: the last batch norm of each of ``feats[1:]``, or None where a family has no such layer. OFD
            takes its margins from them (Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019).
    """

    classifier_name = "fc"
    bn_before_relu: list[nn.BatchNorm2d] | None = None

    def outputs(self, images: Tensor) -> Outputs:
        """Logits, stage maps, pre-activations and pooled vector of normalized images (N, 3, H, W)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalized images to (N, num_classes) logits."""
        return self.outputs(images).logits

    @property
    def classifiers(self) -> list[str]:
        """Names of the layers that make the logits: here one."""
        return [self.classifier_name]

    @property
    def classifier_layer(self) -> nn.Module:
        """The last layer as a module from ``pooled`` to logits; its parameters are the network's own."""
        return on_vectors(self.get_submodule(self.classifier_name))


class SplitBlock(nn.Module):
    """A block that hands out the tensor before its last ReLU, which works on a copy. Subclasses write ``preact``."""

    def before_and_after_relu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        preact = self.preact(x)
        return preact, F.relu(preact)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.preact(x))


class StagedClassifier(FeatureClassifier):
    """``conv1``, ``bn1``, ReLU, stages ``layer1``, ``layer2`` ... of :class:`SplitBlock`, pool, linear layer."""

    @property
    def stages(self) -> list[nn.Sequential]:
        return [stage for name, stage in self.named_children() if name.startswith("layer")]

    def run_stages(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The stages' maps after and before their last ReLU."""
        feats, preacts = [], []
        for stage in self.stages:
            *body, last = stage
            for block in body:
                x = block(x)
            preact, x = last.before_and_after_relu(x)
            preacts.append(preact)
            feats.append(x)
        return feats, preacts

    def head(self, x: Tensor) -> Tensor:
        """What lies between the last stage and the pool."""
        return x

    def outputs(self, images: Tensor) -> Outputs:
        stem = F.relu(self.bn1(self.conv1(images)))
        feats, preacts = self.run_stages(stem)
        pooled = global_pool(self.head(feats[-1]))
        logits = self.get_submodule(self.classifier_name)(pooled)
        return Outputs(logits, [stem, *feats], [stem, *preacts], pooled)


def on_vectors(layer: nn.Module) -> nn.Module:
    """A linear layer as it is; a 1x1 convolution between reshapes, so that it too maps (N, D) to (N, C)."""
    if isinstance(layer, nn.Conv2d):
        return nn.Sequential(nn.Unflatten(1, (layer.in_channels, 1, 1)), layer, nn.Flatten())
    return layer


def global_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C). The original networks' kernels cover the map at one image size; this takes any size."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def conv_bn_act(
    in_channels: int, out_channels: int, kernel: int = 1, act: type = nn.ReLU, bias: bool = False, **conv: int
) -> list[nn.Module]:
    """A convolution, its batch norm and an in-place activation; 3x3 kernels and larger are padded to keep the size."""
    conv = {"padding": kernel // 2, **conv}
    return [
        nn.Conv2d(in_channels, out_channels, kernel, bias=bias, **conv),
        nn.BatchNorm2d(out_channels),
        act(inplace=True),
    ]


def stack(block: type, in_channels: int, out_channels: int, depth: int, stride: int, *more: int) -> nn.Sequential:
    """A stage of ``block(in_channels, out_channels, stride, *more)``; only the first one has the stride."""
    first = block(in_channels, out_channels, stride, *more)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1, *more) for _ in range(depth - 1)))


def kaiming_init_(model: nn.Module) -> None:
    """Convolutions from N(0, 2 / fan_out) (He et al., ICCV 2015), biases 0; other families keep PyTorch's defaults."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_init_(layer: nn.Linear) -> None:
    """A classifier that begins near zero."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
