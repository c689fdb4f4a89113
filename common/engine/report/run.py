"""What the report reads of a run folder, and how it writes numbers and tables."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from d2distill.common.engine.run_folder import RESULTS, read_metrics

#: What the report shows and no other file has: the worst test images.
PARTS = "report.json"
#: Points of a curve; of more every n-th is drawn.
POINTS = 300
#: For a number that is not known.
NONE = "&ndash;"
NAMES = {"top1": "top-1 %", "top5": "top-5 %", "mAP": "mAP %", "test_loss": "test loss"}


class Run:
    """What a run folder holds."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.results = json.loads(self.path(RESULTS).read_text())
        self.lines = read_metrics(folder)
        self.student, self.parts = (self._json(name) for name in ("student.json", PARTS))
        self.config = yaml.safe_load(self.path("config.yaml").read_text())
        self.settings = flatten(self.config)
        detector = "META_ARCHITECTURE" in self.config["MODEL"]
        self.task = "detection" if detector else "classification"
        self.network = self.student.get("network") or self.settings.get("MODEL.STUDENT.NAME", "")
        teacher = "TEACHER.MODEL" if detector else "MODEL.TEACHER"
        self.teacher_weights = self.settings.get(f"{teacher}.WEIGHTS", "")
        name = self.settings.get("TEACHER.CONFIG_FILE" if detector else f"{teacher}.NAME")
        if detector:
            name = Path(name).stem if name else self.settings.get(f"{teacher}.META_ARCHITECTURE")
        names = [name] if isinstance(name, str) else name or []
        #: Their names; empty where nothing is taught.
        self.teachers = [each for each in names if each and self.settings["DISTILL.METHODS"]]
        # With one per metric there is a best; the first is the one that decides.
        self.metrics = [name for name in self.results if f"best_{name}" in self.results and name[:4] != "ema_"]

    @property
    def methods(self) -> str:
        methods = self.settings["DISTILL.METHODS"]
        return f"distilled by {', '.join(methods)}" if methods else "plain training"

    @property
    def data(self) -> str:
        return self.settings.get("DATASETS.NAME") or ", ".join(self.settings["DATASETS.TRAIN"])

    def path(self, name: str) -> Path:
        """Of a file in the folder."""
        return self.folder / name

    def _json(self, name: str) -> dict[str, Any]:
        return json.loads(self.path(name).read_text()) if self.path(name).is_file() else {}

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(epoch, value), or (step, value) where there are no epochs."""
        points = [(line.get("epoch", line["iteration"] + 1), line[name]) for line in self.lines if name in line]
        every = -(-len(points) // POINTS) or 1
        return points[::-every][::-1]  # the last one is among them


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"NODE.KEY": value}``; own data sets stay one value."""
    flat = {}
    for key, value in node.items():
        nested = isinstance(value, dict) and key != "REGISTER"
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def number(value: float | None, digits: int = 2) -> str:
    """A metric; one that is not defined, or not known, is a dash."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML; the first column names the row. `kind` is a class of the style."""
    head_row = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    content = f"<thead><tr>{head_row}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{content}</table></div>'


def short(value: float | None) -> str:
    """1234567 as ``1.23 M``."""
    if value is None:
        return NONE
    power = min(int(math.log10(max(value, 1))) // 3, 4)
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".strip()


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    return NONE if seconds is None else str(timedelta(seconds=round(seconds)))
