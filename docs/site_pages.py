"""Hook of mkdocs: a card for each method, made from its docstrings, settings, configurations and measured row.

`card(name)` is the page's Markdown. It is made when the site is built, so that it cannot differ from the code.
"""

import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from d2distill.common.distillers import DISTILLERS, Distiller

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "digits_methods_cpu.md"


def setting_comments(method: type[Distiller]) -> dict[str, str]:
    """The comment before each setting in `defaults()` and `common_defaults()` of the class and its bases."""
    comments = {}
    for cls in reversed(method.__mro__):
        for name in ("common_defaults", "defaults"):
            lines = []
            for line in inspect.getsource(vars(cls)[name]).splitlines() if name in vars(cls) else ():
                key = re.match(r'\s*"([A-Z_]+)": ', line)
                if key and lines:
                    comments[key[1]] = " ".join(lines)
                comment = re.match(r"\s*# (.*)", line)
                lines = [*lines, comment[1]] if comment else []
    return comments


def settings_table(method: type[Distiller]) -> str:
    """The node DISTILL.<NAME>: key, default, meaning."""
    values, comments = {**method.common_defaults(), **method.defaults()}, setting_comments(method)
    rows = [f"| `{key}` | `{value}` | {comments[key]} |" for key, value in values.items()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def needs_table(name: str, method: type[Distiller]) -> str:
    parts = {"logits": "class logits", "feats": "feature maps", "pooled": "pooled vector"}
    looks = ", ".join(parts[part] for part in method.needs)
    page = (ROOT / "docs" / "detection.md").read_text()
    table = page[page.index("## Which methods") :].split("\n\n")[1]
    columns = {"R-CNN": 2, "RetinaNet": 3}
    works = []
    for row in table.splitlines()[2:]:
        cells = [cell.strip() for cell in row.split("|")]
        if "not in" not in cells[1]:
            works += [d for d, i in columns.items() if f"`{name}`" in (cells[2] if "same" in cells[i] else cells[i])]
    softmax = "logits" in method.needs and not method.takes_sigmoid
    rows = {
        "looks at": looks if method.needs_teacher else f"{looks}, of the student alone",
        "teacher": "needed" if method.needs_teacher else "none",
        "mixup, cutmix": "yes" if method.takes_soft_target else "refused: it needs the one class of an image",
        "several labels per image": "refused: softmax" if softmax else "yes",
        "in detectors": ", ".join(works) or "no",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def configs(name: str) -> list[str]:
    """Published configurations, and those of the digits, that train with the method."""
    pattern = re.compile(rf"METHODS: \[[^\]]*\b{name}\b")
    return [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("configs/*/*.yaml")) if pattern.search(p.read_text())]


def measured_rows(text: str | None = None) -> dict[str, list[str]]:
    """The rows of the table of all methods on digits by their labels: last and best top-1, parameters, FLOPs, time."""
    rows = [line.split("|")[1:-1] for line in (text or RESULTS.read_text()).splitlines() if line.startswith("|")][2:]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def when_to_use() -> dict[str, dict[str, str]]:
    return yaml.safe_load((ROOT / "docs" / "methods" / "when_to_use.yaml").read_text())


def card(name: str) -> str:
    """The page of a method, as Markdown with mkdocstrings' `:::` blocks."""
    method = DISTILLERS.get(name)
    module = sys.modules[method.__module__]
    measured, advice = measured_rows(), when_to_use()[name]
    losses = [f"::: {module.__name__}.{item}" for item in module.__all__ if item != name]
    row, alone, teacher = (measured[key][0] for key in (name.lower(), "student alone", "teacher alone"))
    baseline = advice.get("baseline", f"student alone {alone}, teacher {teacher}")
    files = configs(name)
    return "\n\n".join(
        [
            f"# {name}",
            module.__doc__.strip(),
            f"**Use it** {advice['use']}",
            f"**Not** {advice['not']}",
            f"```yaml\nDISTILL:\n  METHODS: [{name}]\n```",
            "## Settings",
            f"`DISTILL.{name.upper()}`:",
            settings_table(method),
            "## What it needs",
            needs_table(name, method),
            "## Measured",
            f"Top-1 of a ResNet-8 on 100 real digits, three seeds, default settings (DKD's BETA aside): **{row}** "
            f"({baseline}). Nothing was tuned: see [Results](../results.md#all-methods-on-"
            "digits) for what this says, and what not.",
            f"```\npython tools/benchmark_methods.py --only {name.lower()}\n```",
            "\n".join([f'??? note "Configurations ({len(files)})"', *(f"    * `{path}`" for path in files)]),
            "## The loss",
            *losses,
            "## The method",
            f"::: {method.__module__}.{name}\n    options: {{members: false}}",
            "",
        ]
    )


def on_startup(command: str, dirty: bool) -> None:
    """Lay out the packages as an installation has them. mkdocstrings looks for the folder before `on_config`."""
    package = ROOT / "build" / "docs" / "d2distill"
    shutil.rmtree(package, ignore_errors=True)
    for source in (ROOT / "d2distill", *(ROOT / name for name in ("common", "classification", "detection"))):
        copy = package if source.name == "d2distill" else package / source.name
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def on_config(config: Any) -> Any:
    """List the cards below the pages on methods."""
    (methods,) = (entry["Methods"] for entry in config.nav if "Methods" in entry)
    methods += [{name: f"methods/{name.lower()}.md"} for name, _ in DISTILLERS]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, _ in DISTILLERS:
        files.append(File.generated(config, f"methods/{name.lower()}.md", content=card(name)))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Roles of docstrings, :func:`~package.name`, are names."""
    return re.sub(r":(?:func|class|meth|attr|mod):<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)
