"""Log writers of a run folder, on Detectron2's, that take up a log where a restarted run takes up the work."""

import json
from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from d2distill.common.engine.checkpoint import write_atomically
from d2distill.common.errors import DataError

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
    """The lines of a run's metrics.json; a last line that is still being written is left out.

    Raises:
        DataError: a line before others is none of a log.
    """
    path = Path(output_dir, METRICS)
    return _parse(path) if path.exists() else []


def drop_lines_from(path: Path, step: int) -> None:
    """Remove the lines of steps at or after `step`, and what a kill left behind the last whole one.

    Raises:
        DataError: as :func:`read_metrics`.
    """
    if path.exists():
        kept = "".join(json.dumps(line, sort_keys=True) + "\n" for line in _parse(path) if line["iteration"] < step)
        if kept.encode() != path.read_bytes():
            write_atomically(path, lambda file: file.write(kept.encode()))


def _parse(path: Path) -> list[dict[str, float]]:
    lines = [_line(text) for text in path.read_bytes().splitlines()]
    while lines and lines[-1] is None:
        lines.pop()
    if None in lines:
        # Dropping what comes after it as well would lose a log.
        raise DataError(f"{path}, line {lines.index(None) + 1} is no line of a log (JSON with an iteration): remove it")
    return lines


def _line(text: bytes) -> dict[str, float] | None:
    try:
        line = json.loads(text)
    except ValueError:  # also of bytes that are no text
        return None
    return line if isinstance(line, dict) and isinstance(line.get("iteration"), int) else None
