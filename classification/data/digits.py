"""The 8x8 handwritten digits that scikit-learn carries: a real data set that needs no download."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .datasets import ArrayDataset, DatasetInfo, register_dataset

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


# python -c "from classification.data import *; x = build_dataset('digits').images.double(); \
#            print(x.mean(), x.std(correction=0))"
_MEAN = 77.8580
_STD = 82.5531


@register_dataset(
    DatasetInfo(
        name="digits",
        num_classes=10,
        image_size=32,
        pixel_mean=(_MEAN,) * 3,
        pixel_std=(_STD,) * 3,
        zoo="cifar",
        augmentation="crop",
        source="it comes with scikit-learn (pip install scikit-learn); no download.",
    )
)
def build_digits(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """1,797 digits, enlarged from 8x8 to 32x32; ``root`` is not used.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the data set 'digits' comes with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    index = split_indices(data.target, split)
    # Values 0..16. All products are multiples of 1/1024 below 2**24, so float32 is exact and so are the pixels.
    grey = torch.from_numpy(data.images[index]).float()[:, None] * (255 / 16)
    large = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).repeat(1, 3, 1, 1)
    return ArrayDataset(info, images, data.target[index], [str(name) for name in data.target_names])
