"""The page, and how a training writes it."""

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from d2distill.common.engine.report import figures, tables
from d2distill.common.engine.report.run import PARTS, Run
from d2distill.common.engine.report.style import STYLE
from d2distill.common.engine.run_folder import RESULTS, write_text
from d2distill.common.engine.settings import flat_settings
from d2distill.common.engine.task import Task

logger = logging.getLogger("detectron2.d2distill")
REPORT = "report.html"


def write_run_report(cfg: CfgNode, task: Task) -> None:
    """Write ``report.html`` at the end of a training, if REPORT.ENABLED. A failure is a warning: the run is done."""
    if not cfg.REPORT.ENABLED:
        return
    try:
        if parts := task.report_parts():
            write_text(Path(cfg.OUTPUT_DIR, PARTS), json.dumps(parts, ensure_ascii=False))
        path = write_report(cfg.OUTPUT_DIR, flat_settings(task.default_settings()), cfg.REPORT.BASELINE)
        logger.info(f"The run on one page: {path}")
    except Exception as error:
        logger.warning(
            f"{REPORT} is not written ({type(error).__name__}: {error}); `d2distill-report --debug {cfg.OUTPUT_DIR}` "
            "shows where"
        )


def write_report(folder: str | Path, defaults: Mapping[str, Any], baseline: str | Path = "") -> Path:
    """Write ``report.html`` of a run that has ended into its folder, and return its path; see :func:`build_report`."""
    path = Path(folder, REPORT)
    write_text(path, build_report(folder, defaults, baseline))
    return path


def build_report(folder: str | Path, defaults: Mapping[str, Any], baseline: str | Path = "") -> str:
    """The page of a run, as HTML.

    Args:
        folder: a run folder with results.json.
        defaults: the task's settings where nothing is set, as ``{"NODE.KEY": value}``.
        baseline: the folder of a run without a teacher to compare with. One that has no results yet is passed over
            with a warning.

    Raises:
        FileNotFoundError: the run has not ended.
    """
    run = Run(folder)
    other = None
    if baseline:
        if Path(baseline, RESULTS).is_file():
            other = Run(baseline)
        else:
            logger.warning(f"The report of {folder} has no baseline: {baseline} has no {RESULTS}")
    sections = {
        "Results": tables.results(run, other),
        "Curves": figures.curves(run, other),
        "Classes": figures.classes(run),
        "Test images of the highest loss": figures.worst(run),
        "What differs from the defaults": tables.settings(run, defaults),
        "Cost": tables.cost(run, other),
        "Run it again": tables.command(run),
        "Environment": tables.environment(run),
    }
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections.items() if text)
    ended = datetime.fromtimestamp(run.path(RESULTS).stat().st_mtime)
    facts = [run.task, run.network, run.methods, f"on {run.data}", f"ended {ended:%Y-%m-%d %H:%M}"]
    version = f"d2distill {run.student.get('d2distill', '')}".strip()
    name = escape(run.folder.name)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        'style-src \'unsafe-inline\'"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style></head><body><header><h1>{name}</h1>"
        f"<p>{escape(' · '.join(facts))}</p></header>{tables.tiles(run, other)}{body}"
        f"<footer>{escape(version)}, from {escape(str(run.folder))}</footer></body></html>\n"
    )
