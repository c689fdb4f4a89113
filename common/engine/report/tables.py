"""The sections of the report that are text and tables."""

import json
import shlex
from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from d2distill.common.engine.report.run import NAMES, NONE, Run, duration, number, short, table
from d2distill.common.engine.run_folder import RESULTS


def tiles(run: Run, other: Run | None) -> str:
    """The numbers that one looks for first."""
    if not run.metrics:
        return ""
    metric = run.metrics[0]
    label, last = escape(NAMES.get(metric, metric)), run.results[metric]
    shown = [(f"student, {label}", number(last))]
    teacher = run.results.get(f"teacher_{metric}")
    if teacher is not None:
        shown.append((f"teacher, {label}", number(teacher)))
    plain = other.results.get(metric) if other else None
    if None not in (plain, last):
        shown.append((f"to the baseline's {number(plain)}", f"{last - plain:+.2f}"))
    shown.append(("parameters", short(run.results.get("parameters"))))
    if "flops" in run.results:
        shown.append(("multiply-adds per image", short(run.results["flops"])))
    shown.append(("training time", duration(run.results.get("seconds"))))
    return '<div class="tiles">' + "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in shown) + "</div>"


def results(run: Run, other: Run | None) -> str:
    """Teachers, student, its average and the baseline, each of their metrics that is known."""
    metrics = [*run.metrics, *(["test_loss"] if "test_loss" in run.results else [])]

    rows = []

    def add(name: str, source: Run, prefix: str = "", suffix: str = "") -> None:
        values = {metric: source.results.get(f"{prefix}{metric}{suffix}") for metric in metrics}
        if any(value is not None for value in values.values()):
            rows.append([name, *(number(value, 3 if key == "test_loss" else 2) for key, value in values.items())])

    for place, name in enumerate(run.teachers):
        several = len(run.teachers) > 1
        add(f"Teacher <small>{escape(name)}</small>", run, f"teacher_{place}_" if several else "teacher_")
    add("<b>Student</b>, last", run)
    add("<b>Student</b>, best", run, "best_")
    add("Its average (EMA), last", run, "ema_")
    add("Its average (EMA), best", run, "best_ema_")
    add("Student, over scales and flips (TTA)", run, suffix="_TTA")
    if other:
        name = f"<small>{escape(other.folder.name)}</small>"
        add(f"Baseline, last {name}", other)
        add(f"Baseline, best {name}", other, "best_")
    head = ["", *(escape(NAMES.get(metric, metric)) for metric in metrics)]
    note = "“best” is the highest value of the run on the images that it is tested on: read “last” as the result."
    return f"{table(head, rows, 'numbers')}<p>{note}</p>"


def settings(run: Run, defaults: Mapping[str, Any]) -> str:
    """Settings that differ from `defaults`, without those of methods that are not chosen."""
    methods = {name.upper() for name in run.settings["DISTILL.METHODS"]}
    own, teacher = [], []
    for key, value in run.settings.items():
        node = key.split(".")
        idle = node[0] == "DISTILL" and len(node) > 2 and node[1] not in methods
        default = defaults.get(key)
        default = list(default) if isinstance(default, tuple) else default
        if idle or key == "OUTPUT_DIR" or value == {} or (key in defaults and value == default):
            continue
        before = _value(default) if key in defaults else NONE
        rows = teacher if key.startswith("TEACHER.") else own
        rows.append([f"<code>{escape(key)}</code>", before, _value(value)])
    head = ["setting", "default", "this run"]
    text = table(head, own) if own else ""
    if teacher:
        text += f"<details><summary>{len(teacher)} of the teacher</summary>{table(head, teacher)}</details>"
    return text


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"<code>{escape(text if len(text) <= 160 else text[:157] + '...')}</code>"


def cost(run: Run, other: Run | None) -> str:
    """Sizes and times of student, teacher (its time, where its weights lie in a run folder) and baseline."""
    rows = [["<b>Student</b>", *_costs(run.results)]]
    if run.teachers:
        weights = run.teacher_weights
        beside = Path(weights).parent / RESULTS if isinstance(weights, str) and weights else None
        trained = json.loads(beside.read_text()).get("seconds") if beside and beside.is_file() else None
        teacher = {name: run.results.get(f"teacher_{name}") for name in ("parameters", "flops")}
        name = f"Teacher <small>{escape(' + '.join(run.teachers))}</small>"
        rows.append([name, *_costs({**teacher, "seconds": trained})])
    if other:
        rows.append([f"Baseline <small>{escape(other.folder.name)}</small>", *_costs(other.results)])
    sizes = table(["", "parameters", "multiply-adds per image", "training time"], rows, "numbers")
    speeds = [line["images_per_second"] for line in run.lines if "images_per_second" in line]
    memory = [line["max_mem"] for line in run.lines if "max_mem" in line]
    facts = [f"{run.results['steps']:,} steps"]
    facts += [f"{median(speeds):,.0f} images per second in training (median)"] if speeds else []
    facts += [f"{max(memory):,.0f} MiB of GPU memory at most"] if memory else []
    return f"{sizes}<p>{', '.join(facts)}. The time is of the whole run with its evaluations, over all restarts.</p>"


def _costs(results: Mapping[str, Any]) -> list[str]:
    whole = [f"{results[key]:,}" if results.get(key) is not None else NONE for key in ("parameters", "flops")]
    return [*whole, duration(results.get("seconds"))]


def command(run: Run) -> str:
    """The command line that makes the same run in another folder."""
    program = "d2distill-train-det" if run.task == "detection" else "d2distill-train-cls"
    config, again = str(run.path("config.yaml")), f"{run.folder}_again"
    text = escape(shlex.join([program, "--config-file", config, "OUTPUT_DIR", again]))
    return f"<pre>{text}</pre><p>config.yaml holds every setting; for several GPUs add <code>--num-gpus N</code>.</p>"


def environment(run: Run) -> str:
    """What environment.txt says of versions and devices, without paths."""
    if not run.path("environment.txt").is_file():
        return ""
    lines = run.path("environment.txt").read_text().splitlines()
    pairs = [line.split("  ", 1) for line in lines[1:] if "  " in line and not line.startswith(("-", " "))]
    known = [(name, value.split(" @")[0].strip()) for name, value in pairs]
    rows = [[escape(name), escape(value)] for name, value in known if value not in ("<not set>", "Not found")]
    return f"<details><summary>{len(rows)} versions and facts of the machine</summary>{table(['', ''], rows)}</details>"
