"""``report.html``: a run on one page, made of the files in its folder alone.

It needs no other file, no network and no script, so that it can be sent and kept.
"""

from d2distill.common.engine.report.page import REPORT, build_report, write_report, write_run_report

__all__ = ["REPORT", "build_report", "write_report", "write_run_report"]
