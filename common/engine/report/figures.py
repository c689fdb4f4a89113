"""The sections of the report that are drawn: curves, classes, the worst pictures."""

import csv
import io
from collections.abc import Sequence
from html import escape

from d2distill.common.engine.report.run import NAMES, Run, number, table
from d2distill.common.engine.report.svg import COLORS, Series, line_chart

#: The most classes whose confusion matrix is shown whole, and how many of more are listed.
_MATRIX, _LISTED = 30, 15


def curves(run: Run, other: Run | None) -> str:
    """Charts of the deciding metric, of the losses, of the learning rate and of the speed."""
    x_label = "epoch" if any("epoch" in line for line in run.lines) else "iteration"
    names = list(dict.fromkeys(name for line in run.lines for name in line))
    charts = []
    if run.metrics:
        metric = run.metrics[0]
        shown = {metric: "student", f"ema_{metric}": "its average (EMA)", f"train_{metric}": "student, training images"}
        series = [Series(shown[n], run.curve(n), c) for n, c in zip(shown, COLORS, strict=False) if n in names]
        if other:
            series.append(Series("baseline", other.curve(metric), "#555", "6 3"))
        if (teacher := run.results.get(f"teacher_{metric}")) is not None:
            series.append(Series("teacher", [(0, teacher)], "#000", "2 3"))
        charts.append(line_chart(series, x_label, NAMES.get(metric, metric), may_be_log=False))
    # The sum of one term is that term.
    losses = [name for name in names if "loss" in name and not name.startswith(("best_", "ema_"))]
    losses = [name for name in losses if name != "total_loss" or sum(n.startswith("loss_") for n in losses) > 1]
    heights = {name: max((value for _, value in run.curve(name)), default=0) for name in losses}
    losses = sorted(losses, key=heights.get, reverse=True)[: len(COLORS)]
    charts.append(
        line_chart([Series(n, run.curve(n), c) for n, c in zip(losses, COLORS, strict=False)], x_label, "losses")
    )
    for name, label in (("lr", "learning rate"), ("images_per_second", "images per second")):
        charts.append(line_chart([Series("student", run.curve(name), COLORS[0])], x_label, label))
    return f'<div class="charts">{"".join(charts)}</div>'


def classes(run: Run) -> str:
    """The confusion matrix of up to 30 classes; else each class's metric, of many the lowest, and what is confused."""
    per_class = run.results.get("per_class") or {}
    sets = per_class if any(isinstance(value, dict) for value in per_class.values()) else {"": per_class}
    confusion = run.path("confusion.csv")
    matrix = list(csv.reader(io.StringIO(confusion.read_text(encoding="utf-8")))) if confusion.is_file() else []
    if 1 < len(matrix) <= _MATRIX + 1:
        return _confusion(matrix)
    metric = (run.metrics or [""])[0]
    text = ""
    for name, values in sets.items():
        known = sorted(((value, label) for label, value in values.items() if value is not None))
        if not known:
            continue
        shown = known if len(known) <= _MATRIX else known[:_LISTED]
        what = f"{_LISTED} of {len(known)} classes" if len(known) > len(shown) else "all classes"
        rows = [
            [escape(label), f'<span class="bar" style="width:{value:.1f}px"></span>{number(value)}']
            for value, label in shown
        ]
        text += f"<div><p>{escape(f'{name}: ' if name else '')}{what}, from the lowest</p>"
        text += f"{table(['class', escape(NAMES.get(metric, metric))], rows, 'bars')}</div>"
    if matrix:
        labels = matrix[0][1:]
        found = [
            (int(count), row[0], labels[j])
            for i, row in enumerate(matrix[1:])
            for j, count in enumerate(row[1:])
            if i != j and count != "0"
        ]
        rows = [
            [escape(true), escape(label), str(count)] for count, true, label in sorted(found, reverse=True)[:_LISTED]
        ]
        text += f"<div><p>The most frequent confusions</p>{table(['class', 'predicted as', 'images'], rows)}</div>"
    return f'<div class="columns">{text}</div>' if text else ""


def _confusion(matrix: Sequence[Sequence[str]]) -> str:
    labels, rows = matrix[0][1:], []
    for i, (label, *counts) in enumerate(matrix[1:]):
        total, cells = max(sum(map(int, counts)), 1), []
        for j, count in enumerate(map(int, counts)):
            share, what = count / total, f"{label} as {labels[j]}: {count} of {total}"
            color = "0,114,178" if i == j else "213,94,0"
            style = f"background:rgba({color},{share:.2f});color:{'#fff' if share > 0.55 else '#222'}"
            cells.append(f'<td style="{style}" title="{escape(what, quote=True)}">{count or ""}</td>')
        right = f'<td class="sum">{100 * int(counts[i]) / total:.1f} %</td>'
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{"".join(cells)}{right}</tr>')
    kind = "confusion long" if max(map(len, labels)) > 3 else "confusion"
    head = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in labels)
    content = f"<thead><tr><th></th>{head}<th></th></tr></thead><tbody>{''.join(rows)}</tbody>"
    return (
        "<p>Test images of each class (row) by predicted class (column): right in blue, wrong in orange, stronger with "
        f'their share of the row. Last, the share that is right.</p><div class="scroll"><table class="{kind}">'
        f"{content}</table></div>"
    )


def worst(run: Run) -> str:
    """The test images of the highest loss, with their class and what was predicted."""
    cards = [
        f'<figure><img src="{row["picture"]}" alt="test image {row["index"]}"><figcaption>{escape(row["true"])} '
        f"<b>→ {escape(row['predicted'])}</b><br><small>loss {row['loss']:.2f}, image {row['index']}</small>"
        "</figcaption></figure>"
        for row in run.parts.get("worst", ())
    ]
    note = "<p>As the student sees them: class → predicted class, after the last step.</p>"
    return f'{note}<div class="worst">{"".join(cards)}</div>' if cards else ""
