#!/usr/bin/env python3
"""Measures detectors on a device: losses against the CPU, mixed precision, step times, a table of average precisions.

    bash benchmarks/gpu.sh detection                  # on a GPU; again, until it says that all is done
    python benchmarks/gpu_detection.py --device cpu --quick --runs /tmp/runs --output /tmp/out

What is done is kept in the folder of the runs: a call of --minutes at most continues where the last one stopped.
Networks have the widths of COCO's detectors (R50-FPN -> R18-FPN) and random weights, but for those of the table.
"""

import argparse
import copy
import json
import os
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from gpu import measure
from torch import nn

from d2distill.common.data.locate import ROOT_VARIABLE
from d2distill.common.distillers import DISTILLERS
from d2distill.common.errors import ConfigError, UserError
from d2distill.detection.config import load_cfg
from d2distill.detection.data.digits_coco import ensure_generated, generate_split
from d2distill.tools.comparison import DETECTION, ROOT, Comparison, Entry

CONFIGS = ROOT / "configs" / "det"
TEACHER, STUDENT, METHODS = "large_digits_r50", "large_digits_r18", "large_digits_r50_r18_"
# So few channels and proposals that the script itself can be tried on a CPU.
SMALL = {
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RETINANET.NUM_CONVS": 1,
}


def settings(values: dict[str, Any], both: dict[str, Any] | None = None) -> list[Any]:
    """KEY VALUE pairs; those of `both` for the teacher as well."""
    both = both or {}
    pairs = {**values, **both, **{f"TEACHER.{key}": value for key, value in both.items()}}
    return [item for pair in pairs.items() for item in pair]


def batch_of(n: int, height: int, width: int) -> list[dict[str, Any]]:
    """Noise with six boxes on each image."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(n):
        corner = torch.rand(6, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        size = (0.1 + 0.3 * torch.rand(6, 2, generator=generator)) * torch.tensor([width, height])
        truth = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + size], 1)))
        truth.gt_classes = torch.randint(0, 10, (6,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


class FixedProposals(nn.Module):
    """An RPN's losses, but the truth and boxes near it for proposals: top-k and NMS decide by the last digit."""

    def __init__(self, rpn: nn.Module) -> None:
        super().__init__()
        self.rpn = rpn

    def forward(self, images: Any, features: Any, truth: list[Instances]) -> tuple[list[Instances], dict]:
        _, losses = self.rpn(images, features, truth)
        generator, proposals = torch.Generator().manual_seed(1), []
        for one in truth:
            boxes = one.gt_boxes.tensor.repeat(8, 1)
            boxes = boxes + 8 * torch.randn(boxes.shape, generator=generator).to(boxes)
            boxes = Boxes(
                torch.cat([boxes.minimum(boxes.roll(2, 1))[:, :2], boxes.maximum(boxes.roll(2, 1))[:, 2:]], 1)
            )
            boxes.clip(one.image_size)
            scores = torch.zeros(len(boxes), device=boxes.device)
            proposals.append(Instances(one.image_size, proposal_boxes=boxes, objectness_logits=scores))
        return proposals, losses


@contextmanager
def drawn_on_cpu():
    """Within the block random masks are the same on all devices."""
    draw = torch.rand
    with mock.patch.object(torch, "rand", lambda *size, device=None, **more: draw(*size, **more).to(device or "cpu")):
        yield


def one_step(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[dict[str, float], torch.Tensor]:
    """Losses, and the student's whole gradient."""
    torch.manual_seed(2)
    with EventStorage(), drawn_on_cpu():
        losses = model.train()(batch)
    sum(losses.values()).backward()
    student = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("distillers.")]
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().cpu() for p in student])
    return {name: value.item() for name, value in losses.items()}, gradient


def losses_against_cpu(device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Relative differences between the device and the CPU after the same weights and batch, for every method.

    Of the method's loss, of the detector's own (the largest), and of the student's gradient (of its norm).
    """
    # Samplers draw on the device: with room for all they have no choice.
    every = {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 10**6, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 4096}
    every["MODEL.ROI_HEADS.POSITIVE_FRACTION"] = 1.0
    resnet18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
    kinds = {
        "DistillRCNN": (STUDENT, TEACHER, every),
        "DistillRetinaNet": ("retinanet_r50", "retinanet_r50", {**resnet18, "MODEL.WEIGHTS": ""}),
    }
    result = {}
    for kind, (student, teacher, more) in kinds.items():
        names = [name for name, method in DISTILLERS if method.needs_teacher]
        for name in names[:2] if quick else names:
            own = {"MODEL.META_ARCHITECTURE": kind, "DISTILL.METHODS": [name], "MODEL.DEVICE": "cpu"}
            own["TEACHER.CONFIG_FILE"] = str(CONFIGS / f"{teacher}.yaml")
            cfg = load_cfg(
                str(CONFIGS / f"{student}.yaml"), settings({**own, **more}, SMALL if quick else {}) + settings(more)
            )
            torch.manual_seed(0)
            try:
                on_cpu = build_model(cfg)
            except ConfigError:  # not for this kind of detector
                continue
            if hasattr(on_cpu, "proposal_generator"):
                on_cpu.proposal_generator = FixedProposals(on_cpu.proposal_generator)
            on_device = copy.deepcopy(on_cpu).to(device)
            batch = batch_of(2, 128, 160) if quick else batch_of(2, 192, 256)
            (expected, gradient), (found, other) = one_step(on_cpu, batch), one_step(on_device, batch)
            differences = {key: abs(found[key] - value) / max(abs(value), 1e-12) for key, value in expected.items()}
            result[f"{kind} {name}"] = {
                "loss": differences.pop(f"loss_{name.lower()}"),
                "the detector's own": max(differences.values()),
                "gradient": ((other - gradient).norm() / gradient.norm()).item(),
            }
    numbers = [value for row in result.values() for value in row.values()]
    return {"largest": {"of all": max(numbers)}, **result}


def students(device: str, quick: bool) -> dict[str, nn.Module]:
    """The table's plain student and those with methods, in training mode."""
    configs = [CONFIGS / f"{STUDENT}.yaml", *sorted(CONFIGS.glob(f"{METHODS}*.yaml"))[: 1 if quick else None]]
    models = {}
    for path in configs:
        torch.manual_seed(0)
        cfg = load_cfg(str(path), settings({"MODEL.DEVICE": device}, SMALL if quick else {}))
        models[path.stem.removeprefix(METHODS).replace(STUDENT, "plain")] = build_model(cfg).train()
    return models


class Loop:
    """Plain steps of SGD on one batch, as short as they can be written."""

    def __init__(self, model: nn.Module, device: str, precision: torch.dtype | None) -> None:
        self.model, self.device, self.precision = model, device, precision
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
        self.scaler = torch.amp.GradScaler(device, enabled=precision is torch.float16)

    def step(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with EventStorage(), torch.autocast(self.device, self.precision, enabled=self.precision is not None):
            losses = self.model(batch)
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return losses


def mixed_precision(device: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Steps under autocast (fp16 on a GPU): whether losses and weights are finite, and how many steps were taken."""
    precision, result = torch.float16 if device == "cuda" else torch.bfloat16, {}
    for name, model in students(device, quick).items():
        loop, batch, taken, finite = Loop(model, device, precision), batch_of(2, 160, 192), 0, True
        for _ in range(1 if quick else 20):
            before = loop.scaler.get_scale()
            losses = loop.step(batch)
            finite &= all(bool(torch.isfinite(value)) for value in losses.values())
            taken += loop.scaler.get_scale() >= before
        weights = all(bool(torch.isfinite(p).all()) for p in model.parameters())
        result[name] = {"precision": str(precision), "losses finite": finite, "weights finite": weights, "steps": taken}
    return result


def step_times(device: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Seconds a step (median) of the plain student and of those with methods, taken in turns, and their ratios."""
    # As torch has it, and so a training.
    torch.backends.cudnn.allow_tf32 = True
    sizes = {"batch 16, 192x192": (16, 192, 192), "batch 4, 800x1088": (4, 800, 1088)}
    precisions = {"fp32, TF32 convolutions": None, "autocast fp16": torch.float16}
    if quick:
        sizes, precisions = {"batch 1, 96x96": (1, 96, 96)}, {"fp32": None}
    result = {}
    for size, shape in sizes.items():
        for precision, dtype in precisions.items():
            loops = {name: Loop(model, device, dtype) for name, model in students(device, quick).items()}
            seconds, batch = {name: [] for name in loops}, batch_of(*shape)
            for _ in range(2 if quick else 5):
                for name, loop in loops.items():
                    for _ in range(1 if quick else 6):
                        start = time.perf_counter()
                        loop.step(batch)
                        if device == "cuda":
                            torch.cuda.synchronize()
                        seconds[name].append(time.perf_counter() - start)
            times = {name: statistics.median(values[len(values) // 3 :]) for name, values in seconds.items()}
            ratios = {f"{name} / plain": value / times["plain"] for name, value in times.items() if name != "plain"}
            result[f"{size}, {precision}"] = {**times, **ratios}
    return result


def training_table(args: argparse.Namespace, deadline: float) -> tuple[str, dict[str, Any]]:
    """The table as far as it has come, and all its numbers; trains until `deadline`."""
    runs = args.runs.absolute()
    os.environ.setdefault(ROOT_VARIABLE, str(runs / "datasets"))
    opts, seeds = ["MODEL.DEVICE", args.device, "DATALOADER.NUM_WORKERS", "2"], args.seeds
    if args.quick:
        registered = {}
        for split, number in (("train", 4), ("val", 2)):
            generate_split(runs / "tiny", split, number, seed=0)
            paths = {"JSON": str(runs / "tiny" / "annotations" / f"{split}.json"), "IMAGES": str(runs / "tiny" / split)}
            registered[f"tiny_{split}"] = paths
        few = {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": (1,), "SOLVER.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": 0}
        few |= {"DATASETS.REGISTER": registered, "DATASETS.TRAIN": ("tiny_train",), "DATASETS.TEST": ("tiny_val",)}
        opts += map(str, settings(few, SMALL))
        seeds = seeds[:1]
    else:
        ensure_generated("digits_coco_large")
    teacher = Entry("teacher alone", str(CONFIGS / f"{TEACHER}.yaml"), seeds[:1], opts)
    rows = [teacher, Entry("student alone", str(CONFIGS / f"{STUDENT}.yaml"), seeds, opts)]
    for path in sorted(CONFIGS.glob(f"{METHODS}*.yaml"))[: 1 if args.quick else None]:
        rows.append(Entry(path.stem.removeprefix(METHODS), str(path), seeds, opts, teacher))
    comparison, failed = Comparison(DETECTION, rows, runs), ""
    try:
        comparison.run(args.processes, deadline)
    except UserError as error:
        failed = str(error)
    numbers = {row.label: comparison.results(row) for row in rows}
    missing = sum(len(row.seeds) - len(numbers[row.label]) for row in rows)
    return comparison.table(), {"runs": numbers, "runs to do": missing, "failed": failed, "at a time": args.processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--runs", type=Path, default=ROOT / "output" / "gpu", help="what is kept between calls")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", metavar="PART", help="losses_against_cpu mixed_precision step_times table")
    parser.add_argument("--quick", action="store_true", help="a few of everything, tiny")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    device = name.replace(" ", "-")
    args.runs.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.runs / f"detection_{device}.json"
    report = json.loads(kept.read_text()) if kept.is_file() else {}
    report |= {"device": name, "torch": torch.__version__}

    files = [kept, args.output / kept.name]
    parts = [losses_against_cpu, mixed_precision, step_times]
    if args.only is not None:
        parts = [part for part in parts if part.__name__ in args.only]
    # What failed is tried again.
    measure([p for p in parts if str(report.get(p.__name__, "failed")).startswith("failed")], args, report, files)
    if args.only is not None and "table" not in args.only:
        return
    if args.device == "cuda":
        torch.cuda.empty_cache()
    text, report["table"] = training_table(args, deadline)
    for file in files:
        file.write_text(json.dumps(report, indent=2) + "\n")
    head = (
        f"`bash benchmarks/gpu.sh detection`, seeds {args.seeds}, {TEACHER} -> {STUDENT}, digits_coco_large_val; "
        f"{name}, {args.processes} runs at a time.\n\n"
    )
    (args.output / f"digits_detection_{device}.md").write_text(head + text + "\n")
    print(text)
    if report["table"]["failed"]:
        print(f"failed: {report['table']['failed']}")
    left = report["table"]["runs to do"]
    print(f"{left} runs to do: the same command continues" if left else "all is done")


if __name__ == "__main__":
    main()
