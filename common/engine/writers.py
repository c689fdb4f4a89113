"""Log writers of a run folder, on Detectron2's, that continue a log from the step at which a run is resumed."""

import json
from pathlib import Path

from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from d2distill.common.engine.checkpoint import write_atomically

METRICS = "metrics.json"


def build_writers(output_dir: str, start_iter: int, max_iter: int) -> list[EventWriter]:
    """Console (with ETA), metrics.json and TensorBoard; what they hold of steps that are repeated is dropped first."""
    path = Path(output_dir, METRICS)
    drop_lines_from(path, start_iter)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(path)),
        TensorboardXWriter(output_dir, purge_step=start_iter if start_iter else None),
    ]


def read_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.json, without a last one that is still being written."""
    path, lines = Path(output_dir, METRICS), []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # of a run that was killed while it wrote
            continue
    return lines


def drop_lines_from(path: Path, step: int) -> None:
    """Remove the lines of steps at or after `step`, and what a kill left behind the last whole one."""
    if path.exists():
        lines = [line for line in read_metrics(path.parent) if line["iteration"] < step]
        kept = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        if kept.encode() != path.read_bytes():
            write_atomically(path, lambda file: file.write(kept.encode()))
