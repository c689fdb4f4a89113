"""torchvision's MobileNetV2 (Sandler et al., CVPR 2018) as Detectron2 backbones."""

from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from d2distill.common.errors import ConfigError

__all__ = ["MobileNetV2", "build_mobilenetv2_fpn_backbone", "build_retinanet_mobilenetv2_fpn_backbone"]

# The last block at each of the strides 4, 8, 16 and 32.
_LAST_BLOCKS = {"res2": 3, "res3": 6, "res4": 13, "res5": 17}
_NORMS = ("FrozenBN", "BN", "SyncBN")


class MobileNetV2(Backbone):
    """torchvision's ``features`` without the last, 1280 channels wide convolution, which only a classifier needs.

    The state dict has torchvision's names, so its weights load under the prefix of this module.

    Args:
        norm: ``"FrozenBN"`` (statistics and affine parameters fixed, as detectors are trained), ``"BN"`` or
            ``"SyncBN"``.

    Raises:
        ConfigError: another `norm`.
    """

    def __init__(self, norm: str = "FrozenBN") -> None:
        super().__init__()
        if norm not in _NORMS:
            raise ConfigError(f"MobileNetV2 has batch norms: MODEL.RESNETS.NORM is {norm!r}, not one of {_NORMS}")
        self.features = mobilenet_v2(norm_layer=lambda channels: get_norm(norm, channels)).features[:-1]
        self._out_features = list(_LAST_BLOCKS)
        self._out_feature_strides = dict(zip(_LAST_BLOCKS, (4, 8, 16, 32), strict=True))
        self._out_feature_channels = dict(zip(_LAST_BLOCKS, (24, 32, 96, 320), strict=True))

    @property
    def size_divisibility(self) -> int:
        """The largest stride: with it every map is exactly half the size of the one before."""
        return 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps of `images` (N, 3, H, W).

        Returns:
            ``res2`` (N, 24, H/4, W/4), ``res3`` (N, 32, H/8, W/8), ``res4`` (N, 96, H/16, W/16) and ``res5``
            (N, 320, H/32, W/32), sizes rounded up.
        """
        names = {index: name for name, index in _LAST_BLOCKS.items()}
        outputs = {}
        for index, block in enumerate(self.features):
            images = block(images)
            if index in names:
                outputs[names[index]] = images
        return outputs


def _with_fpn(cfg, input_shape: ShapeSpec, top_block: nn.Module) -> FPN:
    if input_shape.channels != 3:
        raise ConfigError(f"MobileNetV2 takes images of 3 channels, but MODEL.PIXEL_MEAN has {input_shape.channels}")
    return FPN(
        bottom_up=MobileNetV2(cfg.MODEL.RESNETS.NORM),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with FPN for two-stage detectors: ``p2`` .. ``p5`` (strides 4 .. 32) and ``p6`` (a max-pool of p5).

    Reads MODEL.FPN (IN_FEATURES out of res2 .. res5) and MODEL.RESNETS.NORM. MODEL.BACKBONE.FREEZE_AT is not read:
    but for the batch norms everything is trained.

    Raises:
        ConfigError: images have not 3 channels, or MODEL.RESNETS.NORM is no batch norm.
    """
    return _with_fpn(cfg, input_shape, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with FPN for RetinaNet: ``p3`` .. ``p5``, and ``p6``, ``p7`` by convolutions from res5.

    Settings and errors as of :func:`build_mobilenetv2_fpn_backbone`.
    """
    return _with_fpn(cfg, input_shape, LastLevelP6P7(320, cfg.MODEL.FPN.OUT_CHANNELS))
