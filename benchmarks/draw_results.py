#!/usr/bin/env python3
"""Draw a table of results, as `make demo` and tools/benchmark_methods.py write them: a row each, mean and deviation.

    python benchmarks/draw_results.py benchmarks/results/digits_demo_cpu.md docs/images/demo.png --title "..."
    python benchmarks/draw_results.py output/demo/results.md demo.svg

The first row is the teacher, the one that is called "student alone" the baseline. Further rows are sorted with --sort.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

# Okabe and Ito's colors, which the color-blind tell apart; rows differ in shape as well.
TEACHER, ALONE, DISTILLED, WORSE = "#555555", "#E69F00", "#0072B2", "#D55E00"


def read_table(path: Path) -> list[tuple[str, float, float]]:
    """Label, mean and deviation (0 for a single run) of each row's second column."""
    rows = [line.split("|")[1:3] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    found = []
    for label, cell in rows[2:]:
        mean, _, deviation = cell.partition("±")
        found.append((label.strip(), float(mean), float(deviation or 0)))
    return found


def draw(rows: list[tuple[str, float, float]], title: str, axis: str) -> Figure:
    """A dot with its deviation per row, from the top down, and a line through the teacher's and the baseline's."""
    figure = Figure(figsize=(8, 0.9 + 0.34 * max(len(rows), 5)), dpi=150, layout="constrained")
    axes = figure.subplots()
    (_, teacher, _), *students = rows
    alone = next(mean for label, mean, _ in students if label.startswith("student alone"))
    axes.axvline(teacher, color=TEACHER, linewidth=1, linestyle="--", zorder=0)
    axes.axvline(alone, color=ALONE, linewidth=1, linestyle=":", zorder=0)
    lowest = min(mean - deviation for _, mean, deviation in rows)
    for place, (label, mean, deviation) in enumerate(rows):
        color, marker = (DISTILLED, "o") if mean >= alone else (WORSE, "v")
        if place == 0:
            color, marker = TEACHER, "s"
        elif label.startswith("student alone"):
            color, marker = ALONE, "D"
        axes.errorbar(mean, place, xerr=deviation or None, fmt=marker, color=color, capsize=4, linewidth=2)
        text = f"{mean:.2f} ± {deviation:.2f}" if deviation else f"{mean:.2f}"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(lowest - 1.5, max(mean + deviation for _, mean, deviation in rows) + 1)
    axes.set_xlabel(axis)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a Markdown table")
    parser.add_argument("picture", type=Path, help="where to draw it: .png or .svg")
    parser.add_argument("--title", default="")
    parser.add_argument("--axis", default="top-1 (%) on test images, mean and standard deviation over seeds")
    parser.add_argument("--sort", action="store_true", help="students from the highest mean to the lowest")
    args = parser.parse_args()
    teacher, *students = read_table(args.results)
    if args.sort:
        students.sort(key=lambda row: -row[1])
    draw([teacher, *students], args.title, args.axis).savefig(args.picture)
    print(f"Drew {args.picture}: {len(students) + 1} rows of {args.results}")


if __name__ == "__main__":
    main()
