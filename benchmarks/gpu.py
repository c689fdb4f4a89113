#!/usr/bin/env python3
"""Measure on a device: losses against the CPU, step times with and without mixed precision, the cases of
`d2distill-benchmark --suite gpu`, a table of trainings.

    bash benchmarks/gpu.sh [detection]                  # on a GPU; again, until it says that all is done
    python benchmarks/gpu.py detection --device cpu --quick --runs /tmp/runs --output /tmp/out

What is done is kept in the folder of the runs: the next call continues where --minutes ended this one. Networks have
random weights, but for those of the table. Times are medians, and nothing is asserted on them.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from detectron2.layers import batched_nms
from detectron2.modeling import build_model as build_detector
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from d2distill.classification.config import get_cfg
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model, model_names
from d2distill.common.data.locate import ROOT_VARIABLE
from d2distill.common.distillers import DISTILLERS
from d2distill.common.errors import ConfigError, UserError
from d2distill.detection.config import load_cfg
from d2distill.detection.data.digits_coco import ensure_generated, generate_split
from d2distill.tools.comparison import CLASSIFICATION, DETECTION, ROOT, Comparison, Entry

CLS, DET = ROOT / "configs" / "cls", ROOT / "configs" / "det"
LARGE = sorted(DET.glob("large_digits_r50_r18_*.yaml"))
# So few channels and proposals that the script itself can be tried on a CPU.
SMALL = {
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RETINANET.NUM_CONVS": 1,
}


def settings(values: dict[str, Any], both: dict[str, Any]) -> list[Any]:
    """KEY VALUE pairs; those of `both` for the teacher as well."""
    pairs = {**values, **both, **{f"TEACHER.{key}": value for key, value in both.items()}}
    return [item for pair in pairs.items() for item in pair]


def images_of(n: int) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    negatives = torch.arange(n)[:, None] + torch.arange(33)[None]
    return {"image": image, "label": torch.arange(n) % 100, "index": torch.arange(n), "contrast_index": negatives}


def scenes_of(n: int, height: int, width: int) -> list[dict[str, Any]]:
    """Noise with six boxes on each image."""
    generator, scale, batch = torch.Generator().manual_seed(0), torch.tensor([width, height]), []
    for image in torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8):
        corner = torch.rand(6, 2, generator=generator) * scale * 0.6
        size = (0.1 + 0.3 * torch.rand(6, 2, generator=generator)) * scale
        truth = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + size], 1)))
        truth.gt_classes = torch.randint(0, 10, (6,), generator=generator)
        batch.append({"image": image, "instances": truth, "height": height, "width": width})
    return batch


def classifier(device: str, methods: list[str], student: str, teacher: str) -> nn.Module:
    cfg = get_cfg()
    networks = ["MODEL.STUDENT.NAME", student, "MODEL.TEACHER.NAME", teacher]
    cfg.merge_from_list(["MODEL.DEVICE", device, "DISTILL.METHODS", methods, "DISTILL.CRD.K", 256, *networks])
    torch.manual_seed(0)
    return build_distiller(cfg, num_samples=512).train()


def detector(config_file: Path, own: dict[str, Any], both: dict[str, Any]) -> nn.Module:
    cfg = load_cfg(str(config_file), settings(own, both))
    torch.manual_seed(0)
    return build_detector(cfg).train()


@contextmanager
def drawn_on_cpu() -> Iterator[None]:
    """Within the block random masks and samples of proposals are the same on all devices, and fp64 detectors run."""

    def on_cpu(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *size, device=None, **more: draw(*size, **more).to(device or "cpu")

    def nms(boxes: torch.Tensor, scores: torch.Tensor, *more: Any) -> torch.Tensor:
        return batched_nms(boxes, scores.float(), *more)  # it makes the boxes fp32 itself

    with (
        mock.patch.multiple(torch, rand=on_cpu(torch.rand), randperm=on_cpu(torch.randperm)),
        mock.patch.object(proposal_utils, "batched_nms", nms),
    ):
        yield


def difference(on_cpu: nn.Module, device: str, batch: Any) -> dict[str, float]:
    """Relative difference of every loss, and of the student's gradient (of its norm), on the device from the CPU's."""
    losses, gradients = [], []
    for model in (copy.deepcopy(on_cpu).to(device), on_cpu):
        torch.manual_seed(2)
        with EventStorage(30), drawn_on_cpu():
            losses.append(model(batch))
        sum(losses[-1].values()).backward()
        # The teacher and frozen batch norms have none.
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(
            torch.cat([g.flatten().cpu() for name, g in named.items() if not name.startswith("distillers.")])
        )
    values = {name: (losses[0][name].item(), value.item()) for name, value in losses[1].items()}
    found = {name: abs(a - b) / max(abs(b), 1e-12) for name, (a, b) in values.items()}
    return {**found, "gradient": ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()}


def against_cpu(args: argparse.Namespace) -> dict[str, Any]:
    """Relative differences from the CPU after the same weights and batch, for every method (and every classifier)."""
    names = ["KD", "PKD"] if args.quick else [name for name, method in DISTILLERS if method.needs_teacher]
    result: dict[str, dict[str, float]] = {}
    if args.task == "classification":
        for name in names:
            result[name] = difference(classifier("cpu", [name], "resnet8", "resnet14"), args.device, images_of(16))
        for name in model_names()[: 3 if args.quick else None]:
            size = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}[name.split("/")[0]]
            torch.manual_seed(0)
            model, images = build_model(name, 100).eval(), torch.randn(2, 3, size, size)
            with torch.no_grad():
                expected, found = model(images), model.to(args.device)(images.to(args.device)).cpu()
            result[name] = {"logits": ((found - expected).abs().max() / expected.std()).item()}
    else:
        batch = scenes_of(2, 128, 160) if args.quick else scenes_of(2, 192, 256)
        resnet18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.WEIGHTS": ""}
        for kind, student, teacher, both in (
            ("DistillRCNN", "large_digits_r18", "large_digits_r50", {}),
            ("DistillRetinaNet", "retinanet_r50", "retinanet_r50", resnet18),
        ):
            for name in names:
                own = {"MODEL.META_ARCHITECTURE": kind, "DISTILL.METHODS": [name], "MODEL.DEVICE": "cpu"}
                own["TEACHER.CONFIG_FILE"] = str(DET / f"{teacher}.yaml")
                try:
                    model = detector(DET / f"{student}.yaml", own, {**both, **(SMALL if args.quick else {})})
                except ConfigError:  # not for this kind of detector
                    continue
                # In fp64: the last digits decide which proposals are kept.
                result[f"{kind} {name}"] = difference(model.double(), args.device, batch)
    return {"largest": max(value for row in result.values() for value in row.values()), **result}


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Plain steps of SGD on one batch: seconds (median), whether all stays finite, and how many steps were taken."""
    torch.backends.cudnn.allow_tf32 = True  # as torch has it, and so a training
    cuda, result = args.device == "cuda", {}
    precisions = {"fp32": None, "bf16": torch.bfloat16, **({"fp16": torch.float16} if cuda else {})}
    models: dict[str, Callable[[], nn.Module]]
    if args.task == "detection":
        sizes = [(1, 96, 96)] if args.quick else [(16, 192, 192), (4, 800, 1088)]
        batches = {f"batch {n}, {height}x{width}": scenes_of(n, height, width) for n, height, width in sizes}
        own, both = {"MODEL.DEVICE": args.device}, SMALL if args.quick else {}
        files = [DET / "large_digits_r18.yaml", *LARGE[: 1 if args.quick else None]]
        models = {file.stem: partial(detector, file, own, both) for file in files}
    else:
        batches = {f"batch {n}": images_of(n) for n in ([8] if args.quick else [64, 256])}
        models = {
            "+".join(methods) or "plain": partial(classifier, args.device, methods, "resnet8x4", "resnet32x4")
            for methods in ([], ["DKD"], ["ReviewKD"])
        }
    for (size, batch), (precision, dtype), (name, build) in product(
        batches.items(), precisions.items(), models.items()
    ):
        model, scaler = build(), torch.amp.GradScaler(args.device, enabled=precision == "fp16")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
        seconds, finite, taken = [], True, 0
        for _ in range(2 if args.quick else 30):
            start, scale = time.perf_counter(), scaler.get_scale()
            with EventStorage(), torch.autocast(args.device, dtype, enabled=dtype is not None):
                losses = model(batch)
            optimizer.zero_grad()
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            finite &= all(bool(value.isfinite()) for value in losses.values())
            taken += scaler.get_scale() >= scale
        finite &= all(bool(p.isfinite().all()) for p in model.parameters())
        facts = {"seconds": statistics.median(seconds[len(seconds) // 3 :]), "finite": finite, "steps": taken}
        result[f"{size}, {precision}, {name}"] = facts
    return result


def suite(args: argparse.Namespace) -> dict[str, Any]:
    """The cases of this task in `d2distill-benchmark --suite`, until the deadline; those of earlier calls are kept."""
    name, folder = "gpu" if args.device == "cuda" else "cpu", args.runs / "suite"
    cases = yaml.safe_load((ROOT / "tools" / "benchmark_suites.yaml").read_text())[name]
    tasks = ["data"] if args.quick else ["classification", "data"]
    chosen = [
        case for case in cases if cases[case]["task"] in (tasks if args.task == "classification" else [args.task])
    ]
    done: dict[str, Any] = {}
    for case in [] if args.quick and args.task == "detection" else chosen:
        output = folder / f"{case}.json"
        if not output.is_file() and time.monotonic() < args.deadline:
            line = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "--suite", name, "--only", case]
            subprocess.run([*line, "--output", str(output), *(["--quick"] if args.quick else [])])
        done[case] = json.loads(output.read_text()) if output.is_file() else None
    return {"cases to do": sum(found is None for found in done.values()), **done}


def table(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Train until the deadline: the table as far as it has come, and what is missing."""
    os.environ.setdefault(ROOT_VARIABLE, str(args.runs / "datasets"))
    opts, seeds = ["MODEL.DEVICE", args.device], args.seeds[: 1 if args.quick else None]
    if args.task == "classification":
        task, first = CLASSIFICATION, [CLS / "digits_vgg8.yaml", CLS / "digits_r8.yaml"]
        methods = [CLS / f"digits_vgg8_r8_{name}.yaml" for name in ("kd", "dkd", "reviewkd", "crd", "dot")]
        few = {"SOLVER.EPOCHS": 1, "SOLVER.STEPS": [], "DATASETS.TRAIN_SIZE": 64, "DATALOADER.NUM_WORKERS": 0}
        opts += settings(few, {}) if args.quick else []
    else:
        task, first, methods = DETECTION, [DET / "large_digits_r50.yaml", DET / "large_digits_r18.yaml"], LARGE
        opts += ["DATALOADER.NUM_WORKERS", 2]
        if not args.quick:
            ensure_generated("digits_coco_large")
        else:
            few = {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": (1,), "SOLVER.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": 0}
            few |= {"DATASETS.TRAIN": ("tiny_train",), "DATASETS.TEST": ("tiny_val",), "DATASETS.REGISTER": {}}
            for split, number in (("train", 4), ("val", 2)):
                generate_split(args.runs / "tiny", split, number, seed=0)
                paths = {"JSON": f"{args.runs}/tiny/annotations/{split}.json", "IMAGES": f"{args.runs}/tiny/{split}"}
                few["DATASETS.REGISTER"][f"tiny_{split}"] = paths
            opts += settings(few, SMALL)
    opts = [str(item) for item in opts]
    teacher, student = (Entry(file.stem, str(file), seeds, opts) for file in first)
    teacher = replace(teacher, seeds=seeds[:1])
    students = [Entry(file.stem, str(file), seeds, opts, teacher) for file in methods[: 1 if args.quick else None]]
    alone = [] if args.quick else [student]
    comparison, failed = Comparison(task, [teacher, *alone, *students], args.runs), ""
    try:
        comparison.run(args.processes, args.deadline)
    except UserError as error:
        failed = str(error)
    missing = sum(len(row.seeds) - len(comparison.results(row)) for row in comparison.entries)
    return comparison.table(), {"runs to do": missing, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=["classification", "detection"], default="classification")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--runs", type=Path, default=ROOT / "output" / "gpu", help="what is kept between calls")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="trainings at a time (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few of everything, tiny")
    args = parser.parse_args()
    args.deadline, args.runs = time.monotonic() + 60 * args.minutes, args.runs.absolute()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    stem = f"{args.task}_{name.replace(' ', '-')}"
    kept = args.runs / f"{stem}.json"
    report = json.loads(kept.read_text()) if kept.is_file() else {}
    report |= {"device": name, "torch": torch.__version__}
    for folder in (args.runs, args.output):
        folder.mkdir(parents=True, exist_ok=True)
    for part in (against_cpu, steps, suite, table):
        part_name = part.__name__
        # What failed is tried again, and the suite and the table continue.
        if part in (against_cpu, steps) and isinstance(report.get(part_name), dict):
            continue
        # TF32 would hide a difference of three digits.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        try:
            report[part_name] = part(args)
        except Exception as error:
            report[part_name] = f"failed: {type(error).__name__}: {error}"
        if part is table and not isinstance(report[part_name], str):
            text, report[part_name] = report[part_name]
            head = f"`bash benchmarks/gpu.sh {args.task}`, seeds {args.seeds}; {name}, {args.processes} runs at a time."
            (args.output / f"{stem}.md").write_text(f"{head}\n\n{text}\n")
            print(text)
        for file in (kept, args.output / kept.name):
            file.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{part_name}: {json.dumps(report[part_name], indent=1)}", flush=True)
    left = [report["suite"], report["table"]]
    ended = all(isinstance(part, dict) and not part.get("runs to do") and not part.get("cases to do") for part in left)
    print("all is done" if ended else "the same command continues")


if __name__ == "__main__":
    main()
