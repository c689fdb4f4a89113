#!/usr/bin/env python3
"""Measure a training step: the loop that everybody writes, ours as configured, and the least that a step takes.

    d2distill-benchmark --config-file cls/cifar100_r32x4_r8x4_dkd.yaml [KEY VALUE ...]
    d2distill-benchmark --config-file FILE --with "bf16: SOLVER.AMP bf16" --again "known: MODEL.TEACHER.CACHE {tmp}"
    d2distill-benchmark --suite cpu --output cpu.json   # or gpu: fixed cases, classification and detection
    d2distill-benchmark --losses                        # loss functions alone, against the formulas as usually written

Of classification: `plain` (torchvision transforms on PIL images, eager fp32, the teacher under no_grad, .item() in each
step), `ours` (the trainer as configured), `compute` (student, methods and teacher on one batch on the device), `limit`
(the same where the teacher's outputs are known), and the images alone. Each is a process of its own; they run by turns,
and times are medians over the rounds. Where the data set is not on the machine its place is taken by random images of
the same shape, and the result says so.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.errors import ConfigError, require_detectron2
from d2distill.configs import find_config

SUITES = Path(__file__).with_name("benchmark_suites.yaml")


def main() -> None:
    """``d2distill-benchmark``."""
    run_cli(_main)


def _main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--config-file", default="", metavar="FILE", help="a classifier's YAML file, or one of ours")
    parser.add_argument("--suite", choices=["cpu", "gpu"], help="the fixed cases of such a machine")
    parser.add_argument("--losses", action="store_true", help="the loss functions alone")
    several = {"action": "append", "default": [], "metavar": '"NAME: KEY VALUE ..."'}
    what = "a variant of ours with these settings; {tmp} is an empty folder of its own"
    parser.add_argument("--with", dest="others", help=what, **several)
    parser.add_argument("--again", help="the same, timed in its second pass over the same batches", **several)
    parser.add_argument("--synthetic", action="store_true", help="random images, also where the data set is there")
    parser.add_argument(
        "--rounds", type=int, default=0, metavar="N", help="of all variants (default: 7; a suite's own)"
    )
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="in a round (default: about 3 seconds)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="torch's, on the CPU (default: its own)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases of the suite whose name has it")
    parser.add_argument("--quick", action="store_true", help="a few of everything, to try it out")
    parser.add_argument("--output", default="", metavar="FILE", help="write all results there, as JSON")
    parser.add_settings()
    args = parser.parse_args()
    if bool(args.config_file) + bool(args.suite) + args.losses != 1:
        raise ConfigError("name one of --config-file, --suite and --losses")
    if args.suite and (args.opts or args.others or args.again):
        raise ConfigError("a suite is a fixed list: settings and variants are for --config-file")
    require_detectron2()
    from d2distill.tools.benchmark_runs import machine

    report: dict[str, Any] = {"machine": machine(args.threads), "cases": {}, "losses": []}
    if args.losses:
        report["losses"] = _losses(args.quick)
    for name, case in _cases(args).items():
        print(name, flush=True)
        report["cases"][name] = _measure(case, args)
        _write(args.output, report)
    _write(args.output, report)
    failed = [f"{name}: {of}" for name, case in report["cases"].items() for of in case["failed"]]
    if failed:
        raise ConfigError(f"not measured: {'; '.join(failed)}")


def _write(path: str, report: dict[str, Any]) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def _cases(args: Any) -> dict[str, dict[str, Any]]:
    """By name ``task``, ``config``, ``settings`` and what the suites' file has besides."""
    import yaml

    if args.suite:
        cases = yaml.safe_load(SUITES.read_text())[args.suite]
        chosen = {name: case for name, case in cases.items() if args.only in name}
        if not chosen:
            raise ConfigError(f"--only {args.only}: none of the cases has it: {'; '.join(cases)}")
        return chosen
    if not args.config_file:
        return {}
    from d2distill.classification.config import load_cfg

    load_cfg(find_config(args.config_file), args.opts)  # once, before all variants do, and fail
    given = {"config": args.config_file, "settings": args.opts, "synthetic": args.synthetic}
    step = {"task": "classification", "with": args.others, "again": args.again}
    return {"a step": {**given, **step}, "images alone": {**given, "task": "data"}}


def _measure(case: dict[str, Any], args: Any) -> dict[str, Any]:
    from tabulate import tabulate

    from d2distill.tools.benchmark_runs import Variant, measure, parse_variants

    task = case["task"]
    kinds = {
        "classification": {"plain": "plain", "ours": "ours", "compute": "compute", "limit": "limit"},
        "data": {"plain": "plain_data", "ours": "ours_data"},
        "detection": {"plain": "plain", "ours": "ours", "student": "student", "teacher": "teacher"},
    }
    variants = {name: Variant(kind) for name, kind in kinds[task].items()}
    variants |= parse_variants(case.get("with", []), again=False) | parse_variants(case.get("again", []), again=True)
    settings = case["settings"]
    opts = shlex.split(settings) if isinstance(settings, str) else list(settings)
    arguments: dict[str, Any] = {"config": find_config(case["config"]), "opts": opts}
    if task == "detection":
        arguments["shape"] = case["shape"]
    else:
        arguments["synthetic"] = bool(args.suite) or case.get("synthetic", False)
    module = f"d2distill.tools.benchmark_{'detection' if task == 'detection' else 'classification'}"
    rounds, steps = (2, 2) if args.quick else (args.rounds or case.get("rounds", 7), args.steps)
    result = measure(module, variants, arguments, rounds, steps, args.threads)
    rows, timed = [], {name: row for name, row in result["variants"].items() if "rounds" in row}
    for name, row in timed.items():
        line = {"": name, "ms/step": 1000 * row["seconds_per_step"], "images/s": row["images_per_second"]}
        pairs = {pair.rpartition("/"): value for pair, value in result["ratios"].items()}
        times = {f"x {other}": value for (own, _, other), value in pairs.items() if own == name}
        rows.append({**line, "peak MB": row["peak_mb"], **times})
    print(tabulate(rows, "keys", tablefmt="github", floatfmt=".4g"), flush=True)
    if task == "detection" and {"ours", "student", "teacher"} <= set(timed):
        ours, student, teacher = (timed[name]["seconds_per_step"] for name in ("ours", "student", "teacher"))
        result["added/teacher"] = (ours - student) / teacher
        print(f"what the methods add to the student's step, over the teacher's forward: {result['added/teacher']:.2f}")
    failed = [f"{name} ({row['failed']})" for name, row in result["variants"].items() if "failed" in row]
    return {**{key: case[key] for key in ("task", "config")}, "settings": opts, **result, "failed": failed}


def _losses(quick: bool) -> list[dict[str, Any]]:
    import torch
    from tabulate import tabulate

    from d2distill.tools.benchmark_losses import measure_losses

    rows = measure_losses("cuda" if torch.cuda.is_available() else "cpu", quick)
    print(tabulate(rows, "keys", tablefmt="github", floatfmt=".2f"))
    return rows


if __name__ == "__main__":
    main()
