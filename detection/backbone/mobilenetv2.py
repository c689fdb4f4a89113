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


class MobileNetV2(Backbone):
    """torchvision's ``features`` without the last convolution (1280 channels), which only a classifier needs.

    The state dict has torchvision's names.

    Args:
        norm: ``"FrozenBN"`` (statistics and affine parameters fixed, as usual in detectors), ``"BN"`` or ``"SyncBN"``.

    Raises:
        ConfigError: another `norm`.
    """

    def __init__(self, norm: str = "FrozenBN") -> None:
        super().__init__()
        if norm not in ("FrozenBN", "BN", "SyncBN"):
            raise ConfigError(f"MODEL.RESNETS.NORM is {norm!r}, but MobileNetV2 needs FrozenBN, BN or SyncBN")
        self.features = mobilenet_v2(norm_layer=lambda channels: get_norm(norm, channels)).features[:-1]
        self._out_features = list(_LAST_BLOCKS)
        self._out_feature_strides = dict(zip(_LAST_BLOCKS, (4, 8, 16, 32), strict=True))
        self._out_feature_channels = dict(zip(_LAST_BLOCKS, (24, 32, 96, 320), strict=True))

    @property
    def size_divisibility(self) -> int:
        """The largest stride, so that each map is exactly half the size of the one before."""
        return 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps ``res2`` .. ``res5`` of `images` (N, 3, H, W); their sizes are rounded up."""
        names = {index: name for name, index in _LAST_BLOCKS.items()}
        outputs = {}
        for index, block in enumerate(self.features):
            images = block(images)
            if index in names:
                outputs[names[index]] = images
        return outputs


def _with_fpn(cfg, top_block: nn.Module) -> FPN:
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

    Reads MODEL.FPN and MODEL.RESNETS.NORM. MODEL.BACKBONE.FREEZE_AT is ignored: everything but frozen batch norms is
    trained.
    """
    return _with_fpn(cfg, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_mobilenetv2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with FPN for RetinaNet: ``p3`` .. ``p5``, and ``p6``, ``p7`` by convolutions from res5."""
    return _with_fpn(cfg, LastLevelP6P7(320, cfg.MODEL.FPN.OUT_CHANNELS))
