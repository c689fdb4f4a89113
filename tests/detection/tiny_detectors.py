"""Small detectors and batches for the tests."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2distill.detection.config import load_cfg

CONFIGS = "configs/det/"
# Two anchors sizes less, few channels, few proposals: one step takes a tenth of a second.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    # All kinds of parameters, and 1 MB of them where a ResNet-18 has 45.
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CONVS": 1,
}
TEACHER = {f"TEACHER.{key}": value for key, value in SMALL.items() if key != "MODEL.DEVICE"}


def small_cfg(name="review_dkd_r101_r18", **settings):
    """The configuration `name` with small networks."""
    opts = {
        **SMALL,
        **TEACHER,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return load_cfg(f"{CONFIGS}{name}.yaml", [item for pair in opts.items() for item in pair])


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


def plain(cfg):
    """The same without methods and teacher, as stock Detectron2 builds it."""
    cfg = cfg.clone()
    cfg.DISTILL.METHODS = []
    cfg.MODEL.META_ARCHITECTURE = {"DistillRCNN": "GeneralizedRCNN", "DistillRetinaNet": "RetinaNet"}[
        cfg.MODEL.META_ARCHITECTURE
    ]
    return cfg


def image(boxes, classes, size=(96, 128), seed=0, masks=False):
    """One element of a batch: noise with the given boxes."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        from detectron2.structures import PolygonMasks

        polygons = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes]
        instances.gt_masks = PolygonMasks(polygons)
    pixels = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": instances, "height": size[0], "width": size[1]}


def batch(masks=False):
    """Two images of different size with two boxes and one."""
    return [
        image([[10.0, 10, 60, 50], [50, 30, 120, 90]], [1, 4], seed=1, masks=masks),
        image([[5.0, 8, 40, 44]], [0], size=(80, 112), seed=2, masks=masks),
    ]


def step(model, inputs, seed=7, iteration=0):
    """The losses of one training step."""
    torch.manual_seed(seed)
    # As the trainer does: what TorchScript has optimized once in a process stays so.
    with EventStorage(iteration), torch.jit.optimized_execution(False):
        return model.train()(inputs)
