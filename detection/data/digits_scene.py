"""Pictures of several digits on textured ground, with a box and an outline for each.

Everything is computed in whole numbers, from a generator whose numbers NumPy has frozen: the pixels are the same on
every machine.
"""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

__all__ = ["Digit", "Scene", "draw_scene", "outline"]

SIDES = (128, 192)  # of the canvas, in pixels
COUNTS = (2, 6)  # digits in a picture
HEIGHTS = (18, 80)  # of a digit with the paper around it: its ink is about 14 to 64 pixels high
VISIBLE = 64  # ink of this opacity (of 255) and more is the digit
MAX_OVERLAP = 0.1  # of two boxes, as part of the smaller one; ink never touches ink
MIN_CONTRAST = 70  # in luminance, between ink and the ground below it
TRIES = 60  # at finding a place for a digit, before there is one digit less


@dataclass
class Digit:
    """A digit in a picture.

    Attributes:
        position: among the digits that the picture was drawn from.
        box: x, y, width, height in pixels, tight around the visible ink.
        polygons: outlines of its connected parts, each [x0, y0, x1, y1, ...] along the edges of pixels; holes filled.
    """

    position: int
    box: tuple[int, int, int, int]
    polygons: list[list[int]]


@dataclass
class Scene:
    """A picture, (H, W, 3) uint8 RGB, and its digits."""

    image: np.ndarray
    digits: list[Digit] = field(default_factory=list)


def draw_scene(rng: np.random.RandomState, digits: np.ndarray) -> Scene:
    """Draw 2 to 6 of `digits` on a canvas of 128..192 pixels per side.

    Args:
        rng: all that is random in the picture comes from it.
        digits: (n, 8, 8), 0 is paper and 16 is ink.
    """
    height, width = (_integer(rng, *SIDES) for _ in range(2))
    canvas = _ground(rng, height, width)
    for _ in range(_integer(rng, 3, 7)):
        _draw_line(rng, canvas)
    scene, occupied = Scene(canvas), np.zeros((height, width), bool)
    for _ in range(_integer(rng, *COUNTS)):
        for _ in range(TRIES):
            position = _integer(rng, 0, len(digits) - 1)
            opacity = _enlarge(rng, digits[position])
            h, w = opacity.shape
            x, y = _integer(rng, 0, width - w), _integer(rng, 0, height - h)
            ink = opacity >= VISIBLE
            place = slice(y, y + h), slice(x, x + w)
            if not (occupied[place] & ink).any() and _apart((x, y, w, h), scene.digits):
                break
        else:
            continue
        occupied[place] |= ink
        canvas[place] = _blend(canvas[place], opacity, _contrasting(rng, canvas[place]))
        polygons = [(corners + np.array([x, y])).ravel().tolist() for corners in outline(ink)]
        scene.digits.append(Digit(position, (x, y, w, h), polygons))
    grain = _integer(rng, 2, 6)
    noise = rng.randint(-grain, grain + 1, canvas.shape, dtype=np.int64)
    scene.image = np.clip(canvas + noise, 0, 255).astype(np.uint8)
    return scene


def outline(mask: np.ndarray) -> list[np.ndarray]:
    """Polygons around the 4-connected parts of a mask (H, W), along the edges of its pixels.

    Returns:
        Arrays (n, 2) of corners x, y, clockwise on the screen. Holes have none: COCO's polygons cannot say them.
    """
    ahead: dict[tuple[int, int], list[tuple[int, int]]] = {}  # from a corner, along an edge that has ink on its right
    padded = np.pad(mask, 1)
    inside = padded[1:-1, 1:-1]
    sides = (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    for neighbour, begin, end in sides:
        for y, x in np.argwhere(inside & ~neighbour).tolist():
            ahead.setdefault((x + begin[0], y + begin[1]), []).append((x + end[0], y + end[1]))
    polygons = []
    while ahead:
        start = min(ahead)
        corners, before, here = [], None, start
        while here in ahead:
            # Where two pixels touch by a corner only, the turn to the right keeps to the same one.
            step = max(ahead[here], key=lambda end: _turn(before, here, end))
            ahead[here].remove(step)
            if not ahead[here]:
                del ahead[here]
            if before is None or _turn(before, here, step):
                corners.append(here)
            before, here = here, step
        points = np.array(corners)
        after = np.roll(points, -1, axis=0)
        if (points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum() > 0:
            polygons.append(points)
    return polygons


def _turn(before: tuple[int, int] | None, here: tuple[int, int], after: tuple[int, int]) -> int:
    """1 to the right (on the screen), -1 to the left, 0 straight on."""
    if before is None:
        return 0
    return (here[0] - before[0]) * (after[1] - here[1]) - (here[1] - before[1]) * (after[0] - here[0])


def _integer(rng: np.random.RandomState, low: int, high: int) -> int:
    """A whole number from `low` to `high`, both included."""
    return int(rng.randint(low, high + 1, dtype=np.int64))


def _resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (h, w) as int64 (height, width); PIL's resampling of 8 bits computes in whole numbers."""
    resized = Image.fromarray(values.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized).astype(np.int64)


def _ground(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """A colour that changes over the canvas (H, W, 3) int64: a gradient, clouds and finer texture."""
    ground = np.full((height, width, 3), rng.randint(64, 192, 3, dtype=np.int64))
    for cells, strength in ((2, 40), (5, 40), (16, 32), (48, 24)):
        values = _resize(rng.randint(0, 256, (cells, cells), dtype=np.int64), height, width) - 128
        ground += values[..., None] * rng.randint(-strength, strength + 1, 3, dtype=np.int64) // 128
    return np.clip(ground, 0, 255)


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
    """A digit's opacity 0..255 at a random size, cut to its visible ink."""
    height = _integer(rng, HEIGHTS[0], _integer(rng, HEIGHTS[0] + 6, HEIGHTS[1]))
    width = height * _integer(rng, 75, 110) // 100
    smooth = _resize(np.pad(digit.astype(np.int64) * 255 // 16, 1), height, width)
    # Smooth enlarging leaves wide soft edges. Steeper ones look like ink.
    opacity = np.clip((smooth - 64) * _integer(rng, 15, 30) // 10, 0, 255)
    rows, columns = (np.flatnonzero((opacity >= VISIBLE).any(axis)) for axis in (1, 0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _apart(box: tuple[int, int, int, int], digits: list[Digit]) -> bool:
    x, y, w, h = box
    for other in digits:
        ox, oy, ow, oh = other.box
        shared = max(0, min(x + w, ox + ow) - max(x, ox)) * max(0, min(y + h, oy + oh) - max(y, oy))
        if shared > MAX_OVERLAP * min(w * h, ow * oh):
            return False
    return True


def _contrasting(rng: np.random.RandomState, ground: np.ndarray) -> np.ndarray:
    """A random colour that stands out from `ground`."""
    weights = np.array([299, 587, 114])
    luminance = int((ground * weights).sum()) // (ground[..., 0].size * 1000)
    while True:
        colour = rng.randint(0, 256, 3, dtype=np.int64)
        if abs(int((colour * weights).sum()) // 1000 - luminance) >= MIN_CONTRAST:
            return colour


def _blend(ground: np.ndarray, opacity: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """A colour over `ground` (..., 3) where `opacity` (...), 0..255, says so."""
    return (ground * (255 - opacity[..., None]) + colour * opacity[..., None] + 127) // 255
