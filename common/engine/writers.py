"""Log writers of a run folder, on Detectron2's, that take up a log where a restarted run takes up the work."""

import json
from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from common.engine.checkpoint import write_atomically

__all__ = ["build_writers", "drop_lines_from", "read_metrics"]

METRICS = "metrics.json"


def build_writers(output_dir: str, start_iter: int, max_iter: int) -> list[EventWriter]:
    """Console (with ETA), metrics.json and TensorBoard; what they hold of steps not kept is dropped first."""
    path = Path(output_dir, METRICS)
    drop_lines_from(path, start_iter)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(path)),
        TensorboardXWriter(output_dir, purge_step=start_iter if start_iter else None),
    ]


def read_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.json; a last line that is still being written is left out."""
    path = Path(output_dir, METRICS)
    return _parse(path.read_text()) if path.exists() else []


def drop_lines_from(path: Path, step: int) -> None:
    """Remove the lines of steps at or after `step`, and a line that a kill cut in two."""
    if path.exists():
        text = path.read_text()
        kept = "".join(json.dumps(line, sort_keys=True) + "\n" for line in _parse(text) if line["iteration"] < step)
        if kept != text:
            write_atomically(path, lambda file: file.write(kept.encode()))


def _parse(text: str) -> list[dict[str, float]]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
