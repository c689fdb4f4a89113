"""scikit-learn's 8x8 handwritten digits and their one split: real images that need no download."""

import numpy as np

from d2distill.common.errors import MissingDependencyError


def load_digits_split(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The digits of "train" (1,297) or "val" (500), in the order of all 1,797.

    A permutation of a fixed seed, grouped by class, gives every 3.594th sample to "val", so each class keeps its
    share. RandomState, since NumPy has frozen its numbers and may change default_rng's.

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
    order = np.random.RandomState(0).permutation(len(data.target))
    order = order[np.argsort(data.target[order], kind="stable")]
    val = order[np.arange(500) * len(order) // 500]
    index = np.sort(val if split == "val" else np.setdiff1d(order, val))
    return data.images[index], data.target[index], index
