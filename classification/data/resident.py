"""Data sets that fit in memory: all images in one uint8 tensor on the device, augmented a batch at a time.

Order, numbers, pixels and labels are, to the bit, those of :class:`.AugmentedDataset` and its workers.
"""

import functools
import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.samplers import InferenceSampler
from PIL import Image
from torch import Tensor
from torch.utils.data import Sampler

from d2distill.classification.data.augment import Augmentation, AugmentedDataset, CenterFit
from d2distill.classification.data.datasets import ArrayDataset, FileDataset, ImageDataset, ImageSelection
from d2distill.classification.data.unreadable import SkippingLoader, UnreadableImages
from d2distill.common.config import CfgNode, resolve_device
from d2distill.common.engine.loading import WorkerLoader

__all__ = ["Residence", "ResidentTestLoader", "ResidentTrainLoader"]

logger = logging.getLogger("detectron2.d2distill")
#: Batches whose numbers are drawn, and sent to the device, together.
_AT_ONCE = 64


class Residence(NamedTuple):
    """Where images may be kept, and how many 1e9 bytes of each set."""

    device: torch.device
    gigabytes: float

    @classmethod
    def of(cls, cfg: CfgNode) -> "Residence | None":
        """By DATALOADER.RESIDENT_GB on MODEL.DEVICE; None: nowhere."""
        bound = cfg.DATALOADER.RESIDENT_GB
        return cls(resolve_device(cfg), bound) if bound else None

    def takes(self, dataset: ImageDataset, name: str, recipe: Augmentation, fit: CenterFit) -> bool:
        """Whether the images of a data set, `name` in the log, are to be kept, which is logged."""
        size, (base, _) = len(dataset) * 3 * fit.size**2 / 1e9, _unwrapped(dataset)
        # The pixels of a class that loads them in its own way may be others each time.
        kind = {ArrayDataset.load: Tensor, FileDataset.load: Image.Image}.get(type(base).load)
        why = None
        if kind not in recipe.batched:
            why = f"{type(base).__name__} with {type(recipe).__name__} has no batched form"
        elif size > self.gigabytes:
            why = f"they would take {size:.3g} GB, and DATALOADER.RESIDENT_GB is {self.gigabytes:g}"
        where = f"are kept on {self.device}, {size:.2g} GB" if why is None else f"are loaded by workers: {why}"
        logger.info(f"The {len(dataset)} {name} images {where}")
        return why is None


class _Images(NamedTuple):
    """`pixels` (n, 3, S, S) uint8 and `labels` on the device; ``index`` (n,) is each image's place in the data set."""

    pixels: Tensor
    labels: Tensor
    index: np.ndarray


def _unwrapped(dataset: ImageDataset) -> tuple[ImageDataset, np.ndarray]:
    """The data set that `dataset` is a selection of, over several ones if need be, and the positions in it."""
    positions = np.arange(len(dataset))
    while type(dataset).load is ImageSelection.load:
        positions, dataset = dataset.positions[positions], dataset.dataset
    return dataset, positions


class _ResidentLoader:
    """Holds the images at `keys`, read when the first batch is asked for.

    Args:
        dataset: one that a :class:`Residence` takes.
        fit: how the images are brought to one size.
        num_workers: that read files.
        unreadable: takes the errors of images that cannot be read; without it they are raised.
    """

    #: The next image that can be read takes the place of one that cannot; otherwise it is left out.
    replace = False

    def __init__(
        self,
        dataset: ImageDataset,
        keys: np.ndarray,
        fit: CenterFit,
        num_workers: int,
        device: torch.device,
        unreadable: UnreadableImages | None,
    ) -> None:
        self.dataset, self.keys, self.fit, self.num_workers = dataset, keys, fit, num_workers
        self.device, self.unreadable = device, unreadable

    @functools.cached_property
    def images(self) -> _Images:
        base, positions = _unwrapped(self.dataset)
        if isinstance(base, ArrayDataset):
            pixels, index = self._from_memory(base.images, positions[self.keys]), self.keys
        else:
            pixels, index = self._from_files()
        labels = self.dataset.labels[index]
        labels = labels.float() if self.dataset.info.multi_label else labels
        return _Images(pixels.to(self.device), labels.to(self.device), index)

    def _from_memory(self, images: Tensor, positions: np.ndarray) -> Tensor:
        images = images if np.array_equal(positions, np.arange(len(images))) else images[positions]
        side = self.fit.size
        return images if images.shape[2:] == (side, side) else torch.cat([*map(self.fit, images.split(1000))])

    def _from_files(self) -> tuple[Tensor, np.ndarray]:
        samples, side = AugmentedDataset(self.dataset, self.fit), self.fit.size
        options = {"num_workers": self.num_workers, "sampler": self.keys.tolist(), "batch_size": 64}
        if self.unreadable is None:
            batches = WorkerLoader(samples, **options)
        else:
            batches = SkippingLoader(samples, self.unreadable, self.replace, **options)
        pixels, index = torch.empty(len(self.keys), 3, side, side, dtype=torch.uint8), self.keys[:0]
        for batch in batches:
            pixels[len(index) : len(index) + len(batch["index"])] = batch["image"]
            index = np.append(index, batch["index"])
        return pixels[: len(index)], index

    def _pinned(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        # A step does not wait for copies from there.
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


class ResidentTrainLoader(_ResidentLoader):
    """The batches of :func:`.build_train_loader`: ``image`` and ``label`` on the device, the numbers on the host.

    Args:
        batch_sampler: their order, by its ``index_batches``.
        recipe: one that is ``batched`` for the images as they are stored.
        seed: of the augmentation.
        rest: as above.
    """

    replace = True

    def __init__(
        self, dataset: ImageDataset, batch_sampler: Sampler, recipe: Augmentation, seed: int, *rest: Any
    ) -> None:
        super().__init__(dataset, np.arange(len(dataset)), *rest)
        self.batch_sampler, self.recipe, self.seed = batch_sampler, recipe, seed

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pixels, labels, positions = self.images
        size, batches = self.fit.size, self.batch_sampler.index_batches()
        while some := list(islice(batches, _AT_ONCE)):
            rows, lengths = np.concatenate([rows for _, rows in some]), [len(rows) for _, rows in some]
            index, epochs = positions[rows], np.repeat([epoch for epoch, _ in some], lengths)
            params = self.recipe.draw_batch(self.seed, epochs, index, size)
            numbers = {"index": index}
            if self.recipe.variants(size) is not None:
                numbers["key"] = np.zeros_like(index) + self.recipe.number(params, size)
            numbers = {name: self._pinned(part).split(lengths) for name, part in numbers.items()}
            rows, *sent = (
                self._pinned(part).to(self.device, non_blocking=True).split(lengths)
                for part in (rows, *params.values())
            )
            for i, row in enumerate(rows):
                own = {name: parts[i] for name, parts in zip(params, sent, strict=True)}
                yield {
                    "image": self.recipe.apply_batch(pixels.index_select(0, row), own, size),
                    "label": labels.index_select(0, row),
                    **{name: parts[i] for name, parts in numbers.items()},
                }


class ResidentTestLoader(_ResidentLoader):
    """The batches of :func:`.build_test_loader`, ``image`` and ``label`` on the device."""

    def __init__(self, dataset: ImageDataset, batch_size: int, *rest: Any) -> None:
        super().__init__(dataset, np.array([*InferenceSampler(len(dataset))], np.int64), *rest)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pixels, labels, index = self.images
        index = self._pinned(index)
        for begin in range(0, len(self.keys), self.batch_size):
            # Of the images of this batch those that could be read.
            ends = self.keys[begin], self.keys[min(begin + self.batch_size, len(self.keys)) - 1] + 1
            own = slice(*np.searchsorted(index.numpy(), ends))
            if own.start < own.stop:
                key = torch.zeros_like(index[own])
                yield {"image": pixels[own], "label": labels[own], "index": index[own], "key": key}
