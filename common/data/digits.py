"""scikit-learn's 8x8 handwritten digits and their one split: real images that need no download."""

import numpy as np

from d2distill.common.errors import MissingDependencyError

__all__ = ["NUM_VAL", "load_digits_split", "split_indices"]

NUM_VAL = 500
SPLIT_SEED = 0


def split_indices(labels: np.ndarray, split: str) -> np.ndarray:
    """Positions of a split, sorted: 500 for "val", the other 1,297 for "train".

    A permutation of a fixed seed, grouped by class, gives every 3.594th sample to "val", so each class keeps its
    share. RandomState, since NumPy has frozen its numbers and may change default_rng's.
    """
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    val = order[np.arange(NUM_VAL) * len(labels) // NUM_VAL]
    return np.sort(val if split == "val" else np.setdiff1d(order, val))


def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits of "train" or "val".

    Returns:
        Images (n, 8, 8), whole numbers 0 (paper) to 16 (ink) as float64; labels (n,); positions among all 1,797 (n,).

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the data set 'digits' comes with scikit-learn: pip install it") from error
    data = load_digits()
    index = split_indices(data.target, split)
    return data.images[index], data.target[index], index
