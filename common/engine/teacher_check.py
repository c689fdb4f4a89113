"""Evaluate the teacher before the training, so that a wrong one is seen now and not in the student's accuracy."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from detectron2.utils import comm

from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.run_folder import write_text
from d2distill.common.errors import OutputError

logger = logging.getLogger("detectron2.d2distill")


def measured(key: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `measure` returns on the main process, in all processes; kept, so that a sweep measures each teacher once.

    The results are files of ``$XDG_CACHE_HOME/d2distill/teachers``, else of ``~/.cache/d2distill/teachers``.

    Args:
        key: everything that the result depends on: the teacher's weights, the data and the images' preparation.
        measure: metrics in percent; all processes call it.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "d2distill", "teachers")
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    known = run_on_main_process(lambda: json.loads(path.read_text()) if path.is_file() else None)
    if known is not None:
        return known
    (results, *_) = comm.all_gather(measure())

    def keep() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(results))
        except (OSError, OutputError) as error:
            logger.info(f"The teacher's results are not kept for other runs: {error}")

    run_on_main_process(keep)
    return results
