#!/usr/bin/env python3
"""What distillation adds to a detector's training step, against the teacher's own forward pass, on random images.

    python tools/detection_step.py --config-file configs/det/dkd_r101_r18.yaml --images 2 --size 800 1216
    python tools/detection_step.py --config-file configs/det/dkd_r101_r18.yaml --repeats 50 SOLVER.AMP.ENABLED True

All weights are random, so that nothing is downloaded; such a teacher proposes fewer boxes than a trained one, and its
forward pass takes less. Student, distilled student and teacher take turns; times are medians of forward and backward
pass, without the update.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import require_detectron2

if TYPE_CHECKING:
    from d2distill.detection.config import CfgNode

__all__ = ["added_share", "build_steps", "median_times", "random_batch"]


def random_batch(cfg: "CfgNode", images: int, size: Sequence[int], boxes: int = 8, seed: int = 0) -> list[dict]:
    """Inputs of a training step as Detectron2's mapper gives them: noise of (height, width), with boxes and masks."""
    import torch
    from detectron2.structures import Boxes, Instances, PolygonMasks

    from d2distill.detection.config import num_classes

    generator, (height, width), batch = torch.Generator().manual_seed(seed), size, []
    for _ in range(images):
        corners = torch.rand(boxes, 2, 2, generator=generator).sort(dim=1).values  # of x, y: the lower, the upper
        corners = (corners * torch.tensor([width - 8.0, height - 8.0])).add(torch.tensor([[0.0], [8.0]]))
        instances = Instances((height, width), gt_boxes=Boxes(corners.flatten(1)))
        instances.gt_classes = torch.randint(num_classes(cfg)[1], (boxes,), generator=generator)
        if cfg.MODEL.MASK_ON:
            outlines = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in corners.flatten(1).tolist()]
            instances.gt_masks = PolygonMasks(outlines)
        pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": pixels, "instances": instances, "height": height, "width": width})
    return batch


def build_steps(cfg: "CfgNode", batch: list[dict[str, Any]]) -> dict[str, Callable[[], object]]:
    """What is timed, each a call without arguments on `batch`.

    ``plain`` and ``distilled`` are forward and backward pass of the student without and with the methods of the
    configuration, ``teacher`` is the teacher's forward pass as a detector, and ``teacher_backbone`` the part of it
    that a step needs of any teacher.
    """
    import torch
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = cfg.TEACHER.MODEL.WEIGHTS = ""
    plain_cfg = cfg.clone()
    plain_cfg.DISTILL.METHODS = []
    models = {}
    for name, settings in (("plain", plain_cfg), ("distilled", cfg)):
        torch.manual_seed(cfg.SEED)
        models[name] = build_model(settings).train()
    device = torch.device(cfg.MODEL.DEVICE)
    precision = torch.float16 if device.type == "cuda" else torch.bfloat16
    adapter = models["distilled"].teacher_adapter

    def autocast() -> Any:
        return torch.autocast(device.type, precision, enabled=cfg.SOLVER.AMP.ENABLED)

    def train(model: torch.nn.Module) -> None:
        torch.manual_seed(cfg.SEED)  # which proposals are sampled
        with EventStorage(), autocast():
            losses = model(batch)
        sum(losses.values()).backward()
        model.zero_grad()

    @torch.no_grad()
    def run(forward: Callable[[], object]) -> None:
        with autocast():
            forward()

    return {
        **{name: lambda model=model: train(model) for name, model in models.items()},
        "teacher": lambda: run(lambda: adapter.detect(batch)),
        "teacher_backbone": lambda: run(lambda: adapter.network.backbone(adapter.images(batch))),
    }


def median_times(steps: dict[str, Callable[[], object]], repeats: int, warm_up: int = 2) -> dict[str, float]:
    """Median milliseconds of each call; they take turns, so that a slower moment of the machine meets all of them."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= warm_up:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def added_share(ms: dict[str, float]) -> dict[str, float]:
    """What the methods add to a step, of the times of :func:`build_steps`.

    Returns:
        ``added_ms``; as a ratio to the plain step and to the teacher's forward pass ``added_per_plain`` and
        ``added_per_teacher``; and what is left of it without the teacher's backbone, ``beyond_backbone_ms``.
    """
    added = ms["distilled"] - ms["plain"]
    return {
        "added_ms": added,
        "added_per_plain": added / ms["plain"],
        "added_per_teacher": added / ms["teacher"],
        "beyond_backbone_ms": added - ms["teacher_backbone"],
    }


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of a student with a teacher and methods")
    parser.add_argument("--images", type=int, default=2, metavar="N", help="in a batch (default: %(default)s)")
    size = {"nargs": 2, "type": int, "default": [800, 1216], "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("--size", **size, help="of the images, in pixels (default: 800 1216)")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="of each call (default: %(default)s)")
    parser.add_settings()
    args = parser.parse_args()
    require_detectron2()
    from d2distill.detection.config import load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    ms = median_times(build_steps(cfg, random_batch(cfg, args.images, args.size)), args.repeats)
    report = {"config": args.config_file, "images": args.images, "size": args.size, "device": cfg.MODEL.DEVICE}
    print(json.dumps({**report, "ms": ms, **added_share(ms)}, indent=2))


if __name__ == "__main__":
    run_cli(main)
