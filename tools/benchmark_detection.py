"""The training step of a detector with a teacher, on random images and boxes: as published code has it, and ours."""

from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2distill.common.engine.seeding import seed_step
from d2distill.common.outputs import Batch, Outputs, Progress
from d2distill.detection.config import CfgNode, load_cfg
from d2distill.detection.teacher import build_teacher
from d2distill.detection.trainer import build_trainer
from d2distill.tools.benchmark_losses import use_usual_losses
from d2distill.tools.benchmark_runs import Runner, TrainerSteps

LONG = ["SOLVER.MAX_ITER", "1000000", "SOLVER.CHECKPOINT_PERIOD", "1000000", "TEST.EVAL_PERIOD", "0", "LOGGERS", "[]"]
LONG += ["REPORT.ENABLED", "False", "TEST.TEACHER", "False", "MODEL.WEIGHTS", "", "TEACHER.MODEL.WEIGHTS", ""]
LONG += ["SOLVER.BASE_LR", "0.0001"]


def scenes(n: int, height: int, width: int, classes: int, boxes: int = 6) -> list[dict[str, Any]]:
    """A batch as Detectron2's loaders give it: noise with some boxes on each image."""
    generator, scale, batch = torch.Generator().manual_seed(0), torch.tensor([width, height]), []
    for image in torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8):
        corner = torch.rand(boxes, 2, generator=generator) * scale * 0.6
        size = (0.1 + 0.3 * torch.rand(boxes, 2, generator=generator)) * scale
        truth = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + size], 1)))
        truth.gt_classes = torch.randint(0, classes, (boxes,), generator=generator)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


def prepare(config: str, opts: list[str], folder: str, shape: list[int]) -> tuple[CfgNode, list[dict[str, Any]]]:
    """The configuration and a batch of `shape` (N, H, W); networks have random weights."""
    cfg = load_cfg(config, [*LONG, "SOLVER.IMS_PER_BATCH", str(shape[0]), *opts, "OUTPUT_DIR", folder])
    return cfg, scenes(*shape, cfg.MODEL.ROI_HEADS.NUM_CLASSES)


def _trained(cfg: CfgNode, batch: list[dict[str, Any]], folder: str) -> Runner:
    if cfg.DISTILL.METHODS:
        # The trainer takes no teacher without weights.
        weights = Path(folder, "teacher.pth")
        seed_step(cfg.SEED, 0)
        torch.save({"model": build_teacher(cfg).network.state_dict()}, weights)
        cfg.TEACHER.MODEL.WEIGHTS = str(weights)
    trainer = build_trainer(cfg, batch)
    # The batch itself, as if a loader gave nothing else.
    trainer.task.build_batches = lambda start: repeat(batch)
    notes = [f"random images of {tuple(batch[0]['image'].shape)}, networks of random weights"]
    return TrainerSteps(trainer).runner(len(batch), 0, notes)


def ours(folder: str, **arguments: Any) -> Runner:
    return _trained(*prepare(folder=folder, **arguments), folder)


def student(folder: str, **arguments: Any) -> Runner:
    """The trainer's step of the student alone."""
    cfg, batch = prepare(folder=folder, **arguments)
    cfg.DISTILL.METHODS, cfg.MODEL.META_ARCHITECTURE = [], "GeneralizedRCNN"
    return _trained(cfg, batch, folder)


class TwoHeads:
    """The loop of the published code: a preprocessing and a forward pass of the images for each network, then both box
    heads over the student's proposals, the student's for the second time.
    """

    def __init__(self, cfg: CfgNode, batch: list[dict[str, Any]]) -> None:
        seed_step(cfg.SEED, 0, rank=0)
        self.batch, self.model = batch, build_model(cfg).train()
        self.optimizer = torch.optim.SGD(
            [p for p in self.model.parameters() if p.requires_grad],
            cfg.SOLVER.BASE_LR,
            cfg.SOLVER.MOMENTUM,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        )

    def detector_losses(self) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Instances]]:
        """As GeneralizedRCNN computes them, with the student's maps and its sampled proposals."""
        model = self.model
        images = GeneralizedRCNN.preprocess_image(model, self.batch)
        truth = [x["instances"].to(model.device) for x in self.batch]
        maps = model.backbone(images.tensor)
        proposals, losses = model.proposal_generator(images, maps, truth)
        sampled, of_boxes = model.roi_heads(images, maps, proposals, truth)
        return {**of_boxes, **losses}, maps, sampled

    @torch.no_grad()
    def teacher_logits(self, sampled: list[Instances]) -> Tensor:
        teacher = self.model.teacher
        inputs = self.model.teacher_adapter.inputs(self.batch)
        maps = teacher.backbone(GeneralizedRCNN.preprocess_image(teacher, inputs).tensor)
        return box_logits(teacher, maps, sampled)

    def losses(self) -> dict[str, Tensor]:
        losses, maps, sampled = self.detector_losses()
        teacher, own = self.teacher_logits(sampled), box_logits(self.model, maps, sampled)
        step = Batch(torch.cat([one.gt_classes for one in sampled]), progress=Progress())
        for name, method in self.model.distillers.items():
            term = method(Outputs(own), Outputs(teacher), step)
            losses[f"loss_{name}"] = method.weight(step.progress) * term
        return losses

    def step(self) -> None:
        with EventStorage():
            losses = self.losses()
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        for loss in losses.values():
            loss.item()


def box_logits(detector: nn.Module, maps: dict[str, Tensor], sampled: list[Instances]) -> Tensor:
    heads = detector.roi_heads
    pooled = heads.box_pooler([maps[name] for name in heads.box_in_features], [one.proposal_boxes for one in sampled])
    return heads.box_predictor(heads.box_head(pooled))[0]


def plain(**arguments: Any) -> Runner:
    cfg, batch = prepare(**arguments)
    # For the whole process, which is the plain loop's own.
    usual = use_usual_losses() & {name.lower() for name in cfg.DISTILL.METHODS}
    loop = TwoHeads(cfg, batch)
    notes = [f"{name}: its loss as it is usually written" for name in sorted(usual)]
    return Runner(loop.step, len(batch), loop.model.device.type, notes=notes)


def teacher(**arguments: Any) -> Runner:
    """The teacher's forward pass alone: images to logits of the same proposals in every step."""
    cfg, batch = prepare(**arguments)
    loop = TwoHeads(cfg, batch)
    with EventStorage(), torch.no_grad():
        *_, sampled = loop.detector_losses()
    return Runner(lambda: loop.teacher_logits(sampled), len(batch), loop.model.device.type)
