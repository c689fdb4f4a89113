"""The 8x8 handwritten digits that scikit-learn carries: a real data set that needs no download."""

import torch
import torch.nn.functional as F

from d2distill.common.data.digits import load_digits_split

from .datasets import ArrayDataset, DatasetInfo, register_dataset

# python -c "from d2distill.classification.data import *; x = build_dataset('digits').images.double(); \
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
        model_family="cifar",
        augmentation="crop",
        source="it comes with scikit-learn (pip install scikit-learn); no download.",
    )
)
def build_digits(info: DatasetInfo, root: str, split: str) -> ArrayDataset:
    """1,797 digits, enlarged from 8x8 to 32x32; ``root`` is not used.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    images, labels, _ = load_digits_split(split)
    # Values 0..16. All products are multiples of 1/1024 below 2**24, so float32 is exact and so are the pixels.
    gray = torch.from_numpy(images).float()[:, None] * (255 / 16)
    large = F.interpolate(gray, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).repeat(1, 3, 1, 1)
    return ArrayDataset(info, pixels, labels, [str(digit) for digit in range(10)])
