"""A run folder (OUTPUT_DIR): made, described, and its log started."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode

from d2distill.common.config import import_extensions
from d2distill.common.engine.checkpoint import write_atomically
from d2distill.common.engine.distributed import check_processes, run_on_main_process
from d2distill.common.engine.folder_lock import lock_folder
from d2distill.common.errors import ConfigError
from d2distill.common.text import make_printable

RESULTS = "results.json"
METRICS = "metrics.json"
#: Facts of the run in results.json, which are no metrics of the student; so is what begins with one of the prefixes.
_FACTS, _PREFIXES = ("parameters", "flops", "seconds", "steps"), ("teacher_", "per_class")
#: The log of the run that this process began last.
_open_logs: list[IO[str]] = []
logger = logging.getLogger("detectron2.d2distill")


@contextmanager
def prepare_run(cfg: CfgNode, resume: bool) -> Iterator[None]:
    """What a training needs before data and networks: own modules, a run folder that is held for the block, the device.

    The batch size is checked as well.
    """
    # Processes that launch() started have imported nothing yet.
    import_extensions(cfg.IMPORTS)
    check_processes(cfg)
    # The log begins before the data, whose warnings belong there.
    with hold_run_folder(cfg.OUTPUT_DIR, logs=cfg.OUTPUT_DIR):
        if not resume and any(Path(cfg.OUTPUT_DIR).glob("model_*.pth")):
            raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run: continue it with --resume, or choose another")
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        yield


@contextmanager
def hold_run_folder(folder: str, logs: str | None) -> Iterator[None]:
    """Hold a folder by :func:`.lock_folder` for this job's main process, and :func:`start_logs`. All call it."""
    with ExitStack() as stack:
        warning = run_on_main_process(lambda: stack.enter_context(lock_folder(folder)))
        start_logs(logs)
        if warning:
            logger.warning(warning)
        yield


def start_logs(output_dir: str | None) -> None:
    """Send Detectron2's and our logs to the console and, in a run folder, to log.txt."""
    setup_logger.cache_clear()  # one process may start several runs, one by one
    while _open_logs:
        with suppress(OSError):
            _open_logs.pop().close()
    file = _open_log(Path(output_dir)) if output_dir else None
    for name in ("fvcore", "detectron2"):
        logging.getLogger(name).handlers.clear()
        setup_logger(distributed_rank=comm.get_rank(), name=name)
        if file is not None:
            logging.getLogger(name).addHandler(file)
    logging.getLogger("detectron2.evaluation.evaluator").addFilter(_says_how_far)
    for handler in (*logging.getLogger("fvcore").handlers, *logging.getLogger("detectron2").handlers):
        handler.addFilter(make_printable)


def _open_log(folder: Path) -> logging.Handler:
    # Detectron2's own file stays open until the process ends, also where its folder was removed and made again, and on
    # a full disk it then prints a traceback. A FileHandler is closed by libraries that configure the logging of all.
    rank = comm.get_rank()
    folder.mkdir(parents=True, exist_ok=True)  # of each node, where they do not share it
    path = folder / (f"log.txt.rank{rank}" if rank else "log.txt")
    _open_logs.append(path.open("a", encoding="utf-8"))
    handler = logging.StreamHandler(_open_logs[-1])
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S"))
    return handler


def _says_how_far(record: logging.LogRecord) -> bool:
    """Of each evaluation Detectron2 logs begin and times; lines on the progress of long ones stay."""
    return not record.getMessage().startswith(("Start inference", "Total inference"))


def write_run_folder(cfg: CfgNode) -> None:
    """Write the settings and the versions of everything."""
    for name, text in (("config.yaml", cfg.dump()), ("environment.txt", collect_env_info() + "\n")):
        write_text(Path(cfg.OUTPUT_DIR, name), text)
    logger.info(f"Run folder {cfg.OUTPUT_DIR}: settings in config.yaml, versions in environment.txt")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically. Bytes of file names that are no UTF-8 are escapes there, as JSON reads them."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.json, without a last one that is still being written."""
    path, lines = Path(folder, METRICS), []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:  # of a run that was killed while it wrote
            continue
    return lines


def read_results(folder: str | Path, steps: int) -> dict[str, float] | None:
    """The metrics in results.json of a run that has ended after that many steps; None where it has not.

    Nor where the file is damaged: it is then written anew.
    """
    path = Path(folder, RESULTS)
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        logger.warning(f"{path} is damaged and written anew: {error}")
        content = None
    if not isinstance(content, dict) or content.get("steps") != steps:
        return None
    metrics = {n: value for n, value in content.items() if n not in _FACTS and not n.startswith(_PREFIXES)}
    # A metric that is not defined on the data is null there.
    return {n: float("nan") if value is None else value for n, value in metrics.items()}
