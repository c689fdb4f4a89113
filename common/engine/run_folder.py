"""A run folder (OUTPUT_DIR): made, described, and its log started."""

import json
import logging
from pathlib import Path
from tempfile import TemporaryFile

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger
from fvcore.common.config import CfgNode

from d2distill.common.config import import_extensions
from d2distill.common.engine.checkpoint import write_atomically
from d2distill.common.engine.distributed import check_processes, run_on_main_process
from d2distill.common.errors import ConfigError
from d2distill.common.text import make_printable

RESULTS = "results.json"
METRICS = "metrics.json"
#: Facts of the run in results.json, which are no metrics of the student; so is what begins with one of the prefixes.
_FACTS, _PREFIXES = ("parameters", "flops", "seconds", "steps"), ("teacher_", "per_class")
logger = logging.getLogger("detectron2.d2distill")


def prepare_run(cfg: CfgNode, resume: bool) -> None:
    """What comes before data and networks: own modules, checks of the run folder, the batch size and the device."""
    # Processes that Detectron2 started have imported nothing yet.
    import_extensions(cfg.IMPORTS)
    check_processes(cfg)
    run_on_main_process(lambda: _make_folder(cfg.OUTPUT_DIR))
    if not resume and any(Path(cfg.OUTPUT_DIR).glob("model_*.pth")):
        raise ConfigError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run: continue it with --resume, or choose another")
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def _make_folder(folder: str) -> None:
    """Before anything is read, which may take long: that it can be written to is seen by writing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_DIR {folder} cannot be used as a run folder: {error.strerror}; choose one that can be written to"
        ) from error


def start_logs(output_dir: str | None) -> None:
    """Send Detectron2's and our logs to the console and, in a run folder, to log.txt."""
    setup_logger.cache_clear()  # one process may start several runs, one by one
    for name in ("fvcore", "detectron2"):
        logging.getLogger(name).handlers.clear()
        setup_logger(output_dir, distributed_rank=comm.get_rank(), name=name)
    logging.getLogger("detectron2.evaluation.evaluator").addFilter(_says_how_far)
    for handler in (*logging.getLogger("fvcore").handlers, *logging.getLogger("detectron2").handlers):
        handler.addFilter(make_printable)


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
    """The metrics in results.json of a run that has ended after that many steps; None where it has not."""
    path = Path(folder, RESULTS)
    content = json.loads(path.read_text()) if path.is_file() else {}
    if content.get("steps") != steps:
        return None
    metrics = {n: value for n, value in content.items() if n not in _FACTS and not n.startswith(_PREFIXES)}
    # A metric that is not defined on the data is null there.
    return {n: float("nan") if value is None else value for n, value in metrics.items()}
