"""The rows of a comparison, best first, with a paired test against one of them: Markdown, CSV and HTML."""

import csv
import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from d2distill.tools.comparison import Comparison, Entry, mean_std

__all__ = ["Standing", "paired_test", "standings", "write_leaderboard"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } th, td { padding: .35rem .7rem; text-align: right }
th { border-bottom: 2px solid #222 } td { border-bottom: 1px solid #ddd } th:first-child, td:first-child { text-align: left }
tr.baseline { background: #f3f1e7 } p { color: #555 }
"""  # noqa: E501


@dataclass
class Standing:
    """One row: what its runs that have ended say.

    Attributes:
        last, best: of the metric that ranks, one value per seed, in percent; None where it is not defined.
        difference: mean over the seeds that the baseline has too, this row's last value minus the baseline's.
        p: of a paired t-test of those, or why there is none.
    """

    entry: Entry
    metric: str
    last: list[float | None]
    best: list[float | None]
    parameters: float | None
    seconds: float | None
    difference: float | None
    p: float | str

    @property
    def mean(self) -> float | None:
        return None if not self.last or None in self.last else statistics.mean(self.last)


def standings(comparison: Comparison, baseline: Entry) -> list[Standing]:
    """The rows sorted by the mean of their last metric, best first; those without results are the last."""
    results = {entry.label: comparison.results(entry) for entry in comparison.entries}
    ended = [run for runs in results.values() for run in runs.values()]
    metric = next((name for name in comparison.task.metrics if any(name in run for run in ended)), "")
    rows = []
    for entry in comparison.entries:
        runs = results[entry.label]
        pairs = [(run[metric], results[baseline.label][seed][metric]) for seed, run in runs.items()
                 if seed in results[baseline.label]]  # fmt: skip
        difference, p = (None, "") if entry is baseline else paired_test([pair for pair in pairs if None not in pair])
        last, best = ([run[f"{prefix}{metric}"] for run in runs.values()] for prefix in ("", "best_"))
        first = next(iter(runs.values()), {})
        seconds = statistics.mean(run["seconds"] for run in runs.values()) if runs else None
        rows.append(Standing(entry, metric, last, best, first.get("parameters"), seconds, difference, p))
    return sorted(rows, key=lambda row: -math.inf if row.mean is None else row.mean, reverse=True)


def paired_test(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | str]:
    """Mean difference, and p of a two-sided paired t-test, or in words why there is none."""
    differences = [first - second for first, second in pairs]
    mean = statistics.mean(differences) if differences else None
    if len(pairs) < 3:
        return mean, "too few seeds"
    if math.isclose(min(differences), max(differences), abs_tol=1e-9):
        return mean, "all seeds alike"
    try:
        from scipy.stats import ttest_rel
    except ImportError:
        return mean, "needs scipy"
    return mean, float(ttest_rel(*zip(*pairs, strict=True)).pvalue)


def write_leaderboard(comparison: Comparison, baseline: Entry, command: str) -> str:
    """Write ``leaderboard.md``, ``.csv`` and ``.html`` into the folder of the runs; returns the table as Markdown.

    Args:
        command: that makes the table.
    """
    from d2distill.common.engine.run_folder import write_text

    rows = standings(comparison, baseline)
    notes = (
        f"Sorted by the last evaluation. ± is the sample standard deviation over the seeds. Against {baseline.label}: "
        "the mean difference of last values over equal seeds, and p of a paired t-test, not corrected for the number "
        "of rows."
    )
    cells = [_cells(row, row.entry is baseline) for row in rows]
    table = tabulate(cells, "keys", tablefmt="github", disable_numparse=True)
    folder = comparison.output_dir
    write_text(folder / "leaderboard.md", f"`{command}`\n\n{table}\n\n{notes}\n")
    write_text(folder / "leaderboard.html", _page(cells, baseline.label, command, notes))
    with open(Path(folder, "leaderboard.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_numbers(rows[0])))
        writer.writeheader()
        writer.writerows(map(_numbers, rows))
    return table


def _cells(row: Standing, is_baseline: bool) -> dict[str, str]:
    done, wanted = len(row.last), len(row.entry.seeds)
    return {
        "": row.entry.label,
        f"last {row.metric}": mean_std(row.last) if row.last else "-",
        f"best {row.metric}": mean_std(row.best) if row.best else "-",
        "parameters": "-" if row.parameters is None else f"{row.parameters / 1e6:.3f} M",
        "time per run": "-" if row.seconds is None else f"{row.seconds:.0f} s",
        "seeds": f"{done}" if done == wanted else f"{done} of {wanted}",
        "difference": "baseline" if is_baseline else "-" if row.difference is None else f"{row.difference:+.2f}",
        "p": row.p if isinstance(row.p, str) else f"{row.p:.2g}",
    }


def _numbers(row: Standing) -> dict[str, object]:
    """The row for a spreadsheet; empty where there is no value."""
    spread = {
        name: statistics.stdev(values) if len(values) > 1 and None not in values else None
        for name, values in (("last", row.last), ("best", row.best))
    }
    best = statistics.mean(row.best) if row.best and None not in row.best else None
    return {
        "run": row.entry.label, "config": row.entry.config_file, "metric": row.metric,
        "last": row.mean, "last_std": spread["last"], "best": best, "best_std": spread["best"],
        "parameters": row.parameters, "seconds": row.seconds, "seeds": len(row.last),
        "difference": row.difference, "p": row.p,
    }  # fmt: skip


def _page(cells: Sequence[dict[str, str]], baseline: str, command: str, notes: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in cells[0])
    body = []
    for row in cells:
        mark = ' class="baseline"' if row[""] == baseline else ""
        body.append(f"<tr{mark}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.values())}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{chr(10).join(body)}\n</tbody></table>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>'
        f"<style>{_STYLE}</style></head><body><h1>Leaderboard</h1>\n{table}\n<p>{html.escape(notes)}</p>\n"
        f"<p><code>{html.escape(command)}</code></p></body></html>\n"
    )
