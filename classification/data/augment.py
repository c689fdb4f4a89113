"""Augmentation as numbers: drawn from (seed, epoch, index), applied by a pure function.

No global RNG is read or moved, so a sample's pixels do not depend on the order of loading, on the number of workers
or on restarts. All pixel work is torchvision's: on PIL images in PIL, on tensors in torch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from d2distill.classification.registry import NamedRegistry

from .datasets import ImageDataset
from .draws import BatchGenerator

ImageLike = torch.Tensor | Image.Image
Params = dict[str, int | float | bool]
#: The same of many images, an array each with an entry per image.
BatchParams = dict[str, np.ndarray | torch.Tensor]
AUGMENTATION_REGISTRY = NamedRegistry("augmentation")


def _to_tensor(image: ImageLike) -> torch.Tensor:
    return image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)


@dataclass(frozen=True)
class CenterFit:
    """Test images to `size` x `size`: as they are if they are of that size, else resized and cropped at the center.

    Attributes:
        resize: the short side in pixels before the crop; 0: size * 256 / 224.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    size: int
    resize: int = 0
    interpolation: str = "bilinear"

    def __call__(self, image: ImageLike) -> ImageLike:
        if tuple(F.get_size(image)) == (self.size, self.size):
            return image
        short_side = self.resize or round(self.size * 256 / 224)
        image = F.resize(image, [short_side], interpolation=InterpolationMode(self.interpolation), antialias=True)
        return F.center_crop(image, [self.size, self.size])


def eval_transform(image: ImageLike, size: int | CenterFit) -> torch.Tensor:
    """A uint8 tensor (3, H, W) or an RGB PIL image to a uint8 tensor (3, size, size), as :class:`CenterFit`."""
    return _to_tensor(_as_fit(size)(image))


def _as_fit(size: int | CenterFit) -> CenterFit:
    return size if isinstance(size, CenterFit) else CenterFit(size)


def _flipped(image: ImageLike, params: Params) -> torch.Tensor:
    return _to_tensor(F.horizontal_flip(image) if params["flip"] else image)


def _flipped_batch(images: torch.Tensor, params: BatchParams) -> torch.Tensor:
    # By bits: a quarter of the time that torch.where takes on a CPU.
    flip = (params["flip"].to(torch.uint8) * 255)[:, None, None, None]
    return images ^ ((images ^ images.flip(3)) & flip)


class Augmentation:
    """A training recipe: :meth:`draw` makes numbers, :meth:`apply` makes pixels from them. Here: none.

    These two are enough. With :attr:`batched` and :meth:`apply_batch` a recipe also serves images that are all in
    memory, many at a time. A subclass with another ``draw`` or ``apply`` inherits neither these nor the numbers of
    variants: its pixels are others.

    Attributes:
        fits_first: the image is first brought to size x size as test images are, so :meth:`draw` is given
            ``(size, size)``; otherwise it is given the stored image's height and width.
        batched: the kinds of images, tensors or PIL's, of which :meth:`apply_batch` gives the pixels of :meth:`apply`;
            with ``fits_first``.
    """

    fits_first = True
    batched: tuple[type, ...] = ()

    def __init_subclass__(cls) -> None:
        if vars(cls).keys() & {"draw", "apply"}:
            for name in {"batched", "variants", "number", "numbered"} - vars(cls).keys():
                setattr(cls, name, getattr(Augmentation, name))

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Params:
        """Numbers for one image of height x width pixels; `rng` is a :class:`.BatchGenerator` in :meth:`draw_batch`."""
        return {}

    def apply(self, image: ImageLike, params: Params, size: int) -> torch.Tensor:
        """uint8 tensor (3, size, size): a pure function of its arguments; ``image`` is not changed."""
        return eval_transform(image, size)

    def draw_batch(self, seed: int, epochs: np.ndarray, indices: np.ndarray, size: int) -> BatchParams:
        """The numbers of :meth:`draw` for samples (N,), by their own generators, and what :meth:`apply_batch` needs."""
        rng = BatchGenerator(seed, epochs, indices)
        params = self.draw(rng, size, size)
        for row in np.flatnonzero(rng.rejected):
            own = self.draw(np.random.default_rng([seed, int(epochs[row]), int(indices[row])]), size, size)
            for name, value in own.items():
                params[name][row] = value
        return params

    def apply_batch(self, images: torch.Tensor, params: BatchParams, size: int) -> torch.Tensor:
        """:meth:`apply` to images (N, 3, size, size) with tensors of :meth:`draw_batch`, on the images' device."""
        raise NotImplementedError(f"{type(self).__name__} has no batched form")

    def variants(self, size: int) -> int | None:
        """How many different results :meth:`apply` has for one image; None where they cannot be counted."""
        return None

    def number(self, params: Params, size: int) -> int:
        """Which of its :meth:`variants` an image gets by these numbers, from 0; where there are variants."""
        raise NotImplementedError(f"{type(self).__name__} does not number its variants")

    def numbered(self, number: int, size: int) -> Params:
        """The numbers for :meth:`apply` that make this one of the variants."""
        raise NotImplementedError(f"{type(self).__name__} does not number its variants")


@AUGMENTATION_REGISTRY.register_as("none")
class Unchanged(Augmentation):
    """Training images as test images."""

    batched = torch.Tensor, Image.Image

    def apply_batch(self, images: torch.Tensor, params: BatchParams, size: int) -> torch.Tensor:
        return images

    def variants(self, size: int) -> int:
        return 1

    def number(self, params: Params, size: int) -> int:
        return 0

    def numbered(self, number: int, size: int) -> Params:
        return {}


@AUGMENTATION_REGISTRY.register_as("crop")
class Crop(Augmentation):
    """Pad by size // 8 zeros on each side (4 for 32) and crop back at random.

    Numbers: ``top``, ``left``, the crop's corner in the padded image, 0..2 * padding.
    """

    batched = torch.Tensor, Image.Image

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Params:
        top, left = (rng.integers(2 * (side // 8) + 1) for side in (height, width))
        return {"top": top, "left": left}

    def apply(self, image: ImageLike, params: Params, size: int) -> torch.Tensor:
        padding = size // 8
        padded = F.pad(CenterFit(size)(image), [padding] * 4, fill=0)
        return _to_tensor(F.crop(padded, params["top"], params["left"], size, size))

    def apply_batch(self, images: torch.Tensor, params: BatchParams, size: int) -> torch.Tensor:
        padded = F.pad(images, [size // 8] * 4, fill=0)
        # Every crop of every image, (N, 3, tops, lefts, size, size): a view, of which one each is copied.
        crops = padded.unfold(2, size, 1).unfold(3, size, 1)
        image, top, left = torch.arange(len(images), device=images.device), params["top"], params["left"]
        if images.device.type != "cpu":
            return crops[image, :, top, left]
        # numpy copies rows where torch copies pixel by pixel: a third of the time.
        return torch.from_numpy(crops.numpy()[image.numpy(), :, top.numpy(), left.numpy()])

    def variants(self, size: int) -> int:
        return (2 * (size // 8) + 1) ** 2

    def number(self, params: Params, size: int) -> int:
        return params["top"] * (2 * (size // 8) + 1) + params["left"]

    def numbered(self, number: int, size: int) -> Params:
        top, left = divmod(number, 2 * (size // 8) + 1)
        return {"top": top, "left": left}


@AUGMENTATION_REGISTRY.register_as("crop_flip")
class CropFlip(Crop):
    """CIFAR's recipe: :class:`Crop`, then a horizontal flip with probability 1/2 (``flip``)."""

    batched = torch.Tensor, Image.Image

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Params:
        return super().draw(rng, height, width) | {"flip": rng.random() < 0.5}

    def apply(self, image: ImageLike, params: Params, size: int) -> torch.Tensor:
        return _flipped(super().apply(image, params, size), params)

    def apply_batch(self, images: torch.Tensor, params: BatchParams, size: int) -> torch.Tensor:
        return _flipped_batch(super().apply_batch(images, params, size), params)

    def variants(self, size: int) -> int:
        return 2 * super().variants(size)

    def number(self, params: Params, size: int) -> int:
        return 2 * super().number(params, size) + params["flip"]

    def numbered(self, number: int, size: int) -> Params:
        return super().numbered(number // 2, size) | {"flip": bool(number % 2)}


@AUGMENTATION_REGISTRY.register_as("rotate_flip")
class RotateFlip(Augmentation):
    """Tiny-ImageNet's reference recipe: rotate by up to 20 degrees (nearest, zeros outside), flip.

    Numbers: ``angle`` in degrees, counter-clockwise; ``flip``.
    """

    #: PIL's way to rotate is in whole numbers, the same on every device; torchvision's for tensors is not.
    batched = (Image.Image,)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Params:
        return {"angle": rng.uniform(-20.0, 20.0), "flip": rng.random() < 0.5}

    def apply(self, image: ImageLike, params: Params, size: int) -> torch.Tensor:
        rotated = F.rotate(CenterFit(size)(image), params["angle"], interpolation=InterpolationMode.NEAREST, fill=0)
        return _flipped(rotated, params)

    def draw_batch(self, seed: int, epochs: np.ndarray, indices: np.ndarray, size: int) -> BatchParams:
        params = super().draw_batch(seed, epochs, indices, size)
        return {**params, "affine": pil_rotation(params["angle"], size)}

    def apply_batch(self, images: torch.Tensor, params: BatchParams, size: int) -> torch.Tensor:
        side = torch.arange(size, dtype=torch.int32, device=images.device)
        x, y = torch.where(params["flip"][:, None], side.flip(0), side)[:, None, :], side[:, None]
        affine = params["affine"][:, :, None, None]
        # Rows and columns of a frame of zeros around the image, on which all that is outside falls.
        column, row = (
            ((affine[:, i] * x + affine[:, i + 2] + affine[:, i + 1] * y) >> 16).clamp_(-1, size).add_(1)
            for i in (0, 3)
        )
        source = row.mul_(size + 2).add_(column).long().flatten(1)[:, None].expand(-1, 3, -1)
        return F.pad(images, [1] * 4, fill=0).flatten(2).gather(2, source).view_as(images)


def pil_rotation(angles: np.ndarray, size: int) -> np.ndarray:
    """Where PIL's rotate, nearest, takes the pixel (x, y) from: a, b, c, d, e, f in units of 1 / 65536 pixel.

    Column ``a * x + b * y + c`` and row ``d * x + e * y + f``, rounded down: affine_fixed in PIL's Geometry.c.

    Args:
        angles: (N,) in degrees.

    Returns:
        (N, 6) int32.
    """
    turns = [-math.radians(angle % 360.0) for angle in angles.tolist()]
    # Python's functions, as in PIL: numpy's differ in the last bit.
    cos, sin = (np.array([round(function(turn), 15) for turn in turns]) for function in (math.cos, math.sin))
    columns, center = [], size / 2
    for a, b in ((cos, sin), (-sin, cos)):
        shift = a * -center + b * -center + center
        columns += [a, b, shift + a * 0.5 + b * 0.5]
    return np.floor(np.stack(columns, 1) * 65536.0 + 0.5).astype(np.int32)


@AUGMENTATION_REGISTRY.register_as("resized_crop_flip")
class ResizedCropFlip(Augmentation):
    """ImageNet's recipe: torchvision's RandomResizedCrop algorithm, bilinear with antialias, and a flip.

    Numbers: ``top``, ``left``, ``height``, ``width`` of the crop in the stored image; ``flip``.
    """

    fits_first = False

    def draw(self, rng: np.random.Generator, height: int, width: int) -> Params:
        return self._draw_box(rng, height, width) | {"flip": bool(rng.random() < 0.5)}

    def _draw_box(self, rng: np.random.Generator, height: int, width: int) -> Params:
        low, high = 3 / 4, 4 / 3
        for _ in range(10):
            area = height * width * rng.uniform(0.08, 1.0)
            ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(rng.integers(height - h + 1))
                return {"top": top, "left": int(rng.integers(width - w + 1)), "height": h, "width": w}
        # No box fits in a very long or very small image: the largest centered one of an allowed ratio.
        w, h = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
        return {"top": (height - h) // 2, "left": (width - w) // 2, "height": h, "width": w}

    def apply(self, image: ImageLike, params: Params, size: int) -> torch.Tensor:
        box = [params[key] for key in ("top", "left", "height", "width")]
        image = F.resized_crop(image, *box, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True)
        return _flipped(image, params)


def build_augmentation(name: str) -> Augmentation:
    """The recipe registered under ``name``; the ValueError for an unknown one proposes the nearest."""
    return AUGMENTATION_REGISTRY.get(name)()


class AugmentedDataset(Dataset):
    """Samples by (epoch, index): ``image`` (3, size, size) uint8 RGB, ``label`` and ``index``.

    Where the recipe has a number of variants, ``key`` is which of them a sample is.

    Args:
        size: side of the images in pixels, or with it how test images are brought to it.
        seed: of the run; with epoch and index, all 0 or more, it fixes the augmentation.
        augmentation: name of a recipe; empty: the evaluation transform, and samples by index.
    """

    def __init__(self, dataset: ImageDataset, size: int | CenterFit, seed: int = 0, augmentation: str = "") -> None:
        self.dataset, self.fit, self.seed = dataset, _as_fit(size), seed
        self.recipe = build_augmentation(augmentation or "none")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, torch.Tensor | int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.dataset.load(index)
        if self.recipe.fits_first:
            image = self.fit(image)
        size = self.fit.size
        params = self.recipe.draw(np.random.default_rng([self.seed, epoch, index]), *F.get_size(image))
        sample = {"image": self.recipe.apply(image, params, size), "label": label, "index": index}
        return (
            sample if self.recipe.variants(size) is None else {**sample, "key": int(self.recipe.number(params, size))}
        )
