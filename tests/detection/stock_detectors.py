"""Detectors that stock Detectron2 builds too, and their files, for the tests of weights."""

import json
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import d2distill.detection.backbone  # noqa: F401

#: A ResNet-50 of 0.5 M parameters, for tests that need any detector.
NARROW = {
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 8,
    "MODEL__RESNETS__WIDTH_PER_GROUP": 8,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 16,
}
FPN = ["res2", "res3", "res4", "res5"]
KEYS = json.loads((Path(__file__).parents[1] / "goldens" / "detector_keys.json").read_text())


def detector_cfg(backbone="build_resnet_fpn_backbone", depth=18, classes=5, **settings):
    """Detectron2's faster_rcnn_R_50_FPN settings (RetinaNet's if `backbone` is one of its) with narrow heads."""
    cfg = get_cfg()
    retinanet = "retinanet" in backbone
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet" if retinanet else "GeneralizedRCNN"
    opts = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": backbone,
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.OUT_FEATURES": FPN[retinanet:],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FPN.IN_FEATURES": FPN[retinanet:],
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.RETINANET.NUM_CLASSES": classes,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    cfg.merge_from_list([item for pair in opts.items() for item in pair])
    return cfg


def detector(*args, seed=0, **settings):
    """A detector in eval mode whose every tensor, frozen batch norms' too, is drawn from `seed`."""
    return drawn(build_model(detector_cfg(*args, **settings)), seed).eval()


def narrow_detector(depth=50, **settings):
    """As :func:`detector`, with a narrow ResNet."""
    return detector(depth=depth, **NARROW, **settings)


def drawn(model, seed):
    """`model` with every floating tensor drawn from `seed`; batch norms stay near the identity."""
    generator = torch.Generator().manual_seed(seed)
    norms = ("running_var", "norm.weight", "bn1.weight", "bn2.weight", "bn3.weight", "downsample.1.weight")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dtype.is_floating_point:
                noise = torch.randn(value.shape, generator=generator)
                if name.endswith(norms):
                    value.copy_(1 + 0.1 * noise.clamp(-3, 3))
                else:
                    value.copy_(noise * (0.1 if value.ndim < 2 else value[0].numel() ** -0.5))
    return model


def save(path, state, **beside):
    torch.save({"model": state, **beside} if beside else state, path)
    return str(path)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
