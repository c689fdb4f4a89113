"""The random numbers of many samples at once, to the bit those that each sample's own numpy generator gives.

A generator of its own for each sample, ``np.random.default_rng([seed, epoch, index])``, costs more time than cropping
a small image. Here the same arithmetic runs on arrays with one entry per sample: SeedSequence's hash, PCG64 (O'Neill,
HMC-CS-2014-0905, 2014) and numpy's ways from its bits to numbers. numpy guarantees that the first two stay as they are;
the last are held by a test, as are the numbers of published runs.
"""

from collections.abc import Iterator
from itertools import cycle, islice, permutations, product

import numpy as np

__all__ = ["BatchGenerator"]

# Names and values are those of numpy/random/bit_generator.pyx and of O'Neill's pcg64.
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_MULT_L, _MIX_MULT_R, _POOL_SIZE = np.uint32(0xCA01F9DD), np.uint32(0x4973F715), 4
_MULTIPLIER = np.uint64(2549297995355413924), np.uint64(4865540595714422341)
_LOW = np.uint64(0xFFFFFFFF)

#: Unsigned numbers of 128 bits, the higher and the lower 64 of each.
Wide = tuple[np.ndarray, np.ndarray]


class BatchGenerator:
    """One generator per sample: each method gives an array (N,), the number that each of them gives at this call.

    Args:
        seed: of the run, 0 or more.
        epochs, indices: (N,) of the samples, in 0..2**32 - 1.

    Attributes:
        rejected: (N,) bool, samples of which :meth:`integers` would draw again, one in about 2**32 / high. From there
            on their numbers are wrong; take them from a generator of their own.
    """

    def __init__(self, seed: int, epochs: np.ndarray, indices: np.ndarray) -> None:
        words = [seed & 0xFFFFFFFF]
        while seed := seed >> 32:
            words.append(seed & 0xFFFFFFFF)
        keys = [np.full(len(indices), word) for word in words] + [epochs, indices]
        high, low, increment_high, increment_low = _seed_sequence([key.astype(np.uint32) for key in keys])
        # pcg64_srandom: an odd increment; one step, the seed added, another step.
        self._increment = (increment_high << 1) | (increment_low >> 63), (increment_low << 1) | 1
        self._state = _add(self._increment, (high, low))
        self._next_state()
        self._upper_half: np.ndarray | None = None
        self.rejected = np.zeros(len(indices), bool)

    def random(self) -> np.ndarray:
        """Uniform in [0, 1), float64."""
        return (self._next64() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> np.ndarray:
        """Uniform in [low, high), float64."""
        return low + (high - low) * self.random()

    def integers(self, high: int) -> np.ndarray:
        """Uniform in 0..high - 1, int64, for 1 <= high < 2**32 (Lemire, ACM TOMACS 29, 2019)."""
        if high == 1:
            return np.zeros(len(self.rejected), np.int64)
        scaled = self._next32() * np.uint64(high)
        self.rejected |= (scaled & _LOW) < 2**32 % high
        return (scaled >> 32).astype(np.int64)

    def _next_state(self) -> Wide:
        self._state = _add(_multiply(self._state, _MULTIPLIER), self._increment)
        return self._state

    def _next64(self) -> np.ndarray:
        high, low = self._next_state()
        mixed, turns = high ^ low, high >> 58
        return (mixed >> turns) | (mixed << (-turns & 63))

    def _next32(self) -> np.ndarray:
        # The lower half first; the upper one is the next 32 bits, even if 64 are drawn before.
        if self._upper_half is not None:
            half, self._upper_half = self._upper_half, None
            return half
        number = self._next64()
        self._upper_half = number >> 32
        return number & _LOW


def _add(a: Wide, b: Wide) -> Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _multiply(a: Wide, b: Wide) -> Wide:
    # The lower halves of both in parts of 32 bits: their product's upper 64 bits carry over.
    (a1, a0), (b1, b0) = ((x[1] >> 32, x[1] & _LOW) for x in (a, b))
    middle = ((a0 * b0) >> 32) + (a0 * b1 & _LOW) + (a1 * b0 & _LOW)
    carry = a1 * b1 + ((a0 * b1) >> 32) + ((a1 * b0) >> 32) + (middle >> 32)
    return a[0] * b[1] + a[1] * b[0] + carry, a[1] * b[1]


def _seed_sequence(entropy: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The four 64-bit words with which ``SeedSequence(entropy).generate_state`` seeds a PCG64."""
    constants = _hash_constants(_INIT_A, _MULT_A)
    padded = entropy + [np.zeros_like(entropy[0])] * (_POOL_SIZE - len(entropy))
    pool = [_hash(word, constants) for word in padded[:_POOL_SIZE]]
    for source, target in permutations(range(_POOL_SIZE), 2):
        pool[target] = _mix(pool[target], _hash(pool[source], constants))
    for word, target in product(padded[_POOL_SIZE:], range(_POOL_SIZE)):
        pool[target] = _mix(pool[target], _hash(word, constants))
    constants = _hash_constants(_INIT_B, _MULT_B)
    words = [_hash(word, constants).astype(np.uint64) for word in islice(cycle(pool), 8)]
    return (low | (high << 32) for low, high in zip(words[::2], words[1::2], strict=True))


def _hash_constants(value: int, factor: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    while True:
        before, value = value, value * factor & 0xFFFFFFFF
        yield np.uint32(before), np.uint32(value)


def _hash(value: np.ndarray, constants: Iterator[tuple[np.uint32, np.uint32]]) -> np.ndarray:
    before, after = next(constants)
    value = (value ^ before) * after
    return value ^ (value >> 16)


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    result = _MIX_MULT_L * x - _MIX_MULT_R * y
    return result ^ (result >> 16)
