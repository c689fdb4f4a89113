"""Images of several digits on a textured background, with a box and an outline for each digit.

Everything is computed in integers, from a generator whose numbers NumPy guarantees: the pixels are the same on every
machine.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Digit", "draw_scene", "outline"]

SIDES = (128, 192)  # of the image, in pixels
COUNTS = (2, 6)  # digits per image
HEIGHTS = (18, 80)  # of a digit with its margin: the ink is about 14 to 64 pixels high
VISIBLE = 64  # opacity (of 255) from which ink belongs to the digit
MAX_OVERLAP = 0.1  # of two boxes, as a share of the smaller one; ink never touches ink
MIN_CONTRAST = 70  # in luminance, between ink and the background below it
TRIES = 60  # to find a place for a digit, before it is left out


class Digit(NamedTuple):
    """A digit in an image: its index among the digits, its tight box, and outlines of its parts without their holes."""

    position: int
    box: tuple[int, int, int, int]  # x, y, width, height
    polygons: list[list[int]]  # each [x0, y0, x1, y1, ...] along pixel edges


def draw_scene(rng: np.random.RandomState, digits: np.ndarray) -> tuple[np.ndarray, list[Digit]]:
    """Draw 2 to 6 of `digits` (n, 8, 8), where 0 is paper and 16 is ink, into an (H, W, 3) uint8 RGB image."""
    height, width = (_integer(rng, *SIDES) for _ in range(2))
    canvas = _background(rng, height, width)
    for _ in range(_integer(rng, 3, 7)):
        _draw_line(rng, canvas)
    drawn: list[Digit] = []
    occupied = np.zeros((height, width), bool)
    for _ in range(_integer(rng, *COUNTS)):
        for _ in range(TRIES):
            position = _integer(rng, 0, len(digits) - 1)
            opacity = _enlarge(rng, digits[position])
            h, w = opacity.shape
            x, y = _integer(rng, 0, width - w), _integer(rng, 0, height - h)
            ink = opacity >= VISIBLE
            place = slice(y, y + h), slice(x, x + w)
            if not (occupied[place] & ink).any() and not any(_overlaps((x, y, w, h), other.box) for other in drawn):
                break
        else:
            continue
        occupied[place] |= ink
        canvas[place] = _blend(canvas[place], opacity, _contrasting_color(rng, canvas[place]))
        polygons = [(corners + np.array([x, y])).ravel().tolist() for corners in outline(ink)]
        drawn.append(Digit(position, (x, y, w, h), polygons))
    grain = _integer(rng, 2, 6)
    noise = rng.randint(-grain, grain + 1, canvas.shape, dtype=np.int64)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8), drawn


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """Polygons around the 4-connected parts of a mask (H, W), along the edges of its pixels.

    Returns:
        Arrays (n, 2) of corners x, y, clockwise on the screen. Holes have none: COCO's polygons cannot express them.
    """
    # Points and directions are complex numbers x + iy. By corner: directions of the edges with ink on their right.
    edges: dict[complex, list[complex]] = {}
    padded = np.pad(mask, 1)
    for direction, corner in ((1, 0), (1j, 1), (-1, 1 + 1j), (-1j, 1j)):
        outside = direction * -1j  # where the pixel on the left is
        shifted = np.roll(padded, (-int(outside.imag), -int(outside.real)), (0, 1))
        for y, x in np.argwhere((padded & ~shifted)[1:-1, 1:-1]).tolist():
            edges.setdefault(x + y * 1j + corner, []).append(direction)
    polygons = []
    while edges:
        here, heading, corners = min(edges, key=lambda point: (point.real, point.imag)), 0, []
        while here in edges:
            # Where two pixels touch by a corner only, the turn to the right stays with the same one.
            step = max(edges[here], key=lambda direction: (direction * heading.conjugate()).imag)
            edges[here].remove(step)
            if not edges[here]:
                del edges[here]
            if step != heading:
                corners.append(here)
            heading, here = step, here + step
        points = np.array(corners)
        if (points.conj() * np.roll(points, -1)).imag.sum() > 0:
            polygons.append(np.stack([points.real, points.imag], 1).astype(np.int64))
    return polygons


def _integer(rng: np.random.RandomState, low: int, high: int) -> int:
    """An integer from `low` to `high`, both included."""
    return int(rng.randint(low, high + 1, dtype=np.int64))


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (h, w) as int64 (height, width); PIL resamples 8 bits in integers."""
    resized = Image.fromarray(values.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized).astype(np.int64)


def _background(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Background (H, W, 3) int64: a color with coarse to fine variations."""
    background = np.full((height, width, 3), rng.randint(64, 192, 3, dtype=np.int64))
    for cells, strength in ((2, 40), (5, 40), (16, 32), (48, 24)):
        values = _resize(rng.randint(0, 256, (cells, cells), dtype=np.int64), height, width) - 128
        background += values[..., None] * rng.randint(-strength, strength + 1, 3, dtype=np.int64) // 128
    return np.clip(background, 0, 255)


def _draw_line(rng: np.random.RandomState, canvas: np.ndarray) -> None:
    """A scratch across the canvas, thinner and longer than any stroke of a digit."""
    height, width = canvas.shape[:2]
    (x0, x1), (y0, y1) = rng.randint(0, width, 2, dtype=np.int64), rng.randint(0, height, 2, dtype=np.int64)
    dx, dy = x1 - x0, y1 - y0
    if dx * dx + dy * dy < 48 * 48:
        return  # a short one might be a 1
    x, y = np.arange(width) - x0, np.arange(height)[:, None] - y0
    along, across, length2 = x * dx + y * dy, x * dy - y * dx, dx * dx + dy * dy
    # In quarters of squared pixels: lines of 1 to 2 pixels.
    near = (4 * across * across <= _integer(rng, 1, 4) * length2) & (along >= 0) & (along <= length2)
    opacity = np.array(_integer(rng, 64, 200))
    canvas[near] = _blend(canvas[near], opacity, rng.randint(0, 256, 3, dtype=np.int64))


def _enlarge(rng: np.random.RandomState, digit: np.ndarray) -> np.ndarray:
    """Opacity 0..255 of a digit at a random size, cropped to its visible ink."""
    height = _integer(rng, HEIGHTS[0], _integer(rng, HEIGHTS[0] + 6, HEIGHTS[1]))
    width = height * _integer(rng, 75, 110) // 100
    smooth = _resize(np.pad(digit.astype(np.int64) * 255 // 16, 1), height, width)
    # Bicubic interpolation leaves wide soft edges; steeper ones look like ink.
    opacity = np.clip((smooth - 64) * _integer(rng, 15, 30) // 10, 0, 255)
    rows, columns = (np.flatnonzero((opacity >= VISIBLE).any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _overlaps(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    (x, y, w, h), (ox, oy, ow, oh) = box, other
    shared = max(0, min(x + w, ox + ow) - max(x, ox)) * max(0, min(y + h, oy + oh) - max(y, oy))
    return shared > MAX_OVERLAP * min(w * h, ow * oh)


def _contrasting_color(rng: np.random.RandomState, background: np.ndarray) -> np.ndarray:
    """A random color whose luminance differs enough from that of `background`."""
    weights = np.array([299, 587, 114])
    luminance = int((background * weights).sum()) // (background[..., 0].size * 1000)
    while True:
        color = rng.randint(0, 256, 3, dtype=np.int64)
        if abs(int((color * weights).sum()) // 1000 - luminance) >= MIN_CONTRAST:
            return color


def _blend(background: np.ndarray, opacity: np.ndarray, color: np.ndarray) -> np.ndarray:
    """`color` over `background` (..., 3), with an `opacity` (...) of 0..255."""
    return (background * (255 - opacity[..., None]) + color * opacity[..., None] + 127) // 255
