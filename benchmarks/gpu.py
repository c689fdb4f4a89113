#!/usr/bin/env python3
"""Measures on a device: every method and model against the CPU, step times by precision, a training table.

    bash benchmarks/gpu.sh                            # on a GPU
    python benchmarks/gpu.py --device cpu --quick     # tries the script itself

Times are medians over steps of one run and are given as ratios to fp32; nothing is asserted on them.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from d2distill.classification.config import get_cfg
from d2distill.classification.modeling import build_distiller
from d2distill.classification.models import build_model, model_names
from d2distill.common.distillers import DISTILLERS
from d2distill.common.engine.seeding import seed_step

ROOT = Path(__file__).resolve().parent.parent


def batch_of(n: int, size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(n) % 100, "index": torch.arange(n)}


def make(methods: list[str], student: str, teacher: str, device: str):
    cfg = get_cfg()
    settings = ["MODEL.DEVICE", device, "DISTILL.METHODS", methods, "DISTILL.CRD.K", 256]
    cfg.merge_from_list([*settings, "MODEL.STUDENT.NAME", student, "MODEL.TEACHER.NAME", teacher])
    seed_step(0, 0)
    return build_distiller(cfg, num_samples=512)


def methods_against_cpu(device: str, quick: bool) -> dict[str, float]:
    """Largest relative difference of each method's loss between the device and the CPU, same weights and batch."""
    names = [name for name, method in DISTILLERS if method.needs_teacher][: 3 if quick else None]
    result = {}
    for name in names:
        on_cpu = make([name], "resnet8", "resnet14", "cpu")
        batch = batch_of(16)
        batch["contrast_index"] = torch.arange(16)[:, None] + torch.arange(33)[None]
        on_device = copy.deepcopy(on_cpu).to(device)
        losses = []
        for model in (on_cpu, on_device):
            seed_step(0, 1)
            losses.append(model(batch, 30)[f"loss_{name.lower()}"].item())
        result[name] = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)
    return result


@torch.no_grad()
def models_against_cpu(device: str, quick: bool) -> dict[str, float]:
    """Largest difference of each model's logits between the device and the CPU, over their deviation."""
    result = {}
    for name in model_names()[: 3 if quick else None]:
        size = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}[name.split("/")[0]]
        torch.manual_seed(0)
        model, images = build_model(name, 100).eval(), torch.randn(2, 3, size, size)
        expected = model(images)
        difference = (model.to(device)(images.to(device)).cpu() - expected).abs().max() / expected.std()
        result[name] = difference.item()
    return result


def step_times(device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Seconds a step (median) of two pairs by precision, and the ratio of fp32's to it."""
    result = {}
    for teacher, student, n in (("resnet32x4", "resnet8x4", 64), ("wrn_40_2", "wrn_16_2", 256)):
        times = {}
        for precision in (None, torch.bfloat16, torch.float16):
            if quick and precision is torch.float16:
                continue
            model, batch = make(["DKD"], student, teacher, device), batch_of(8 if quick else n)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
            scaler = torch.amp.GradScaler(device, enabled=precision is torch.float16)
            seconds = []
            for _ in range(3 if quick else 60):
                start = time.perf_counter()
                with torch.autocast(device, precision, enabled=precision is not None):
                    loss = sum(model(batch, 30).values())
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            times[str(precision or torch.float32).removeprefix("torch.")] = statistics.median(
                seconds[len(seconds) // 3 :]
            )
        ratios = {f"float32/{name}": times["float32"] / value for name, value in times.items()}
        result[f"{teacher} -> {student}, batch {n}"] = {**times, **ratios}
    return result


def training_table(device: str, quick: bool) -> str:
    """Runs tools/benchmark_methods.py, which writes its own files."""
    options = ["--only", "kd", "dkd", "reviewkd", "crd", "dot", "--processes", "4"]
    command = [sys.executable, str(ROOT / "tools" / "benchmark_methods.py"), *options]
    return "left out" if quick else subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(parts: Sequence[Callable], args: argparse.Namespace, report: dict[str, Any], files: Sequence[Path]) -> None:
    """Add what each part measures, and how long that took, to `report` and its files; a failed part stops no other."""
    for part in parts:
        # TF32 would hide a difference of three digits.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        start = time.perf_counter()
        try:
            report[part.__name__] = part(args.device, args.quick)
        except Exception as error:
            report[part.__name__] = f"failed: {type(error).__name__}: {error}"
        report[f"{part.__name__} seconds"] = round(time.perf_counter() - start, 1)
        for file in files:
            file.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{part.__name__}: {json.dumps(report[part.__name__], indent=1)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results"))
    parser.add_argument("--quick", action="store_true", help="a few of everything")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    report = {"device": name, "torch": torch.__version__}
    path = Path(args.output, f"device_{name.replace(' ', '-')}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [methods_against_cpu, models_against_cpu, step_times, training_table]
    measure(parts, args, report, [path])


if __name__ == "__main__":
    main()
