"""How the figures look: 1200 pixels wide, in colors that color-blind readers can tell apart."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

__all__ = ["COLORS", "grid", "new_figure", "save_figure", "square_row", "styled", "text_color", "tick_classes", "wrap"]

#: Okabe and Ito: Color Universal Design, without its black, which is the teacher's. The pale yellow comes last.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
#: More classes than these are not named in a figure.
MOST_NAMES = 20
_WIDTH, _DPI = 12.0, 100
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "figure.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    # The same figure is the same file.
    "svg.hashsalt": "d2distill",
}
#: Decorates a function that draws.
styled = matplotlib.rc_context(_STYLE)


def new_figure(title: str, height: float) -> Figure:
    """An empty figure, `height` in inches of 100 pixels, with a title that is broken where it is long."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    figure.suptitle(wrap(title, _WIDTH))
    return figure


def wrap(text: str, inches: float) -> str:
    """Break the lines of a title that are wider than so many inches."""
    return "\n".join(fill(line, max(int(9 * inches), 10)) for line in text.splitlines())


def grid(title: str, panels: int, row_height: float, wide: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with `panels` axes, at most three in a row of `row_height` inches.

    Args:
        wide: the first takes the room that is left; otherwise the last row is shorter.
    """
    columns = 2 if panels == 4 else min(panels, 3)
    rows = -(-panels // columns)
    figure = new_figure(title, rows * row_height + 0.4 * (wrap(title, _WIDTH).count("\n") + 1))
    cells, left = figure.add_gridspec(rows, columns), rows * columns - panels if wide else 0
    first = figure.add_subplot(cells[0, : 1 + left])
    others = (divmod(number, columns) for number in range(1 + left, panels + left))
    return figure, [first, *(figure.add_subplot(cells[row, column]) for row, column in others)]


def square_row(panels: int) -> float:
    """Height in inches of a row of square panels with a color bar beside them."""
    return {1: 6.4, 2: 4.9, 4: 4.9}.get(panels, 4.0)


def tick_classes(axes: Axes, classes: Sequence[str], which: str = "xy") -> None:
    """Name the rows and columns of a matrix of classes; of more than :data:`MOST_NAMES` matplotlib numbers some."""
    if len(classes) > MOST_NAMES:
        return
    if "x" in which:
        long = max(map(len, classes)) > 2
        axes.set_xticks(range(len(classes)), classes, rotation=90 if long else 0, fontsize=9)
    if "y" in which:
        axes.set_yticks(range(len(classes)), classes, fontsize=9)


def text_color(background: object) -> str:
    """Black or white, whichever is read better on a color."""
    red, green, blue = to_rgb(background)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"


@styled
def save_figure(figure: Figure, path: str | Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write ``path.png`` and whatever other formats; returns the files."""
    files = [Path(f"{path}.{form}") for form in formats]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
