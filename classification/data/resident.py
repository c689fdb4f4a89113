"""Data sets that fit in memory: all images in one uint8 tensor on the device, augmented a batch at a time.

Order, numbers, pixels and labels are, to the bit, those of :class:`.AugmentedDataset` and its workers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data.samplers import InferenceSampler
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from d2distill.classification.data.augment import AugmentedDataset
from d2distill.classification.data.datasets import ArrayDataset, FileDataset, ImageDataset, ImageSelection
from d2distill.common.config import CfgNode, resolve_device

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

    def takes(self, samples: AugmentedDataset, name: str) -> bool:
        """Whether these images, `name` in the log, are to be kept, which is logged."""
        size, (base, _), recipe = len(samples) * 3 * samples.fit.size**2 / 1e9, _base(samples.dataset), samples.recipe
        kind = {ArrayDataset.load: Tensor, FileDataset.load: Image.Image}.get(type(base).load)
        kept = kind in recipe.batched and size <= self.gigabytes
        if kept:
            where = f"kept on {self.device} ({size:.2g} GB)"
        elif kind is None:
            # Its pixels may be others each time.
            where = f"loaded by workers: {type(base).__name__} loads them in its own way"
        elif kind not in recipe.batched:
            where = f"loaded by workers: {type(recipe).__name__} has no batched form for {kind.__name__}"
        else:
            bound = f"DATALOADER.RESIDENT_GB is {self.gigabytes:g}"
            where = f"loaded by workers: they would take {size:.2g} GB, and {bound}"
        logger.info(f"The {len(samples)} {name} images are {where}")
        return kept


def _base(dataset: ImageDataset) -> tuple[ImageDataset, np.ndarray]:
    """The data set that `dataset` is a selection of, over several ones if need be, and the positions in it."""
    positions = np.arange(len(dataset))
    while type(dataset).load is ImageSelection.load:
        positions, dataset = dataset.positions[positions], dataset.dataset
    return dataset, positions


def _in_memory(samples: AugmentedDataset) -> Tensor | None:
    """All images (n, 3, S, S) uint8 of a data set that has them as tensors; None of files."""
    (base, positions), side = _base(samples.dataset), samples.fit.size
    if not isinstance(base, ArrayDataset):
        return None
    images = base.images if np.array_equal(positions, np.arange(len(base))) else base.images[positions]
    return images if images.shape[2:] == (side, side) else torch.cat([*map(samples.fit, images.split(1000))])


def _labels(dataset: ImageDataset) -> Tensor:
    """As ``dataset.label`` gives them one by one."""
    return dataset.labels.float() if dataset.info.multi_label else dataset.labels


class ResidentTrainLoader:
    """The batches of a training: ``image`` and ``label`` on the device, numbers of samples and variants on the host.

    Args:
        samples: a data set and a recipe that a :class:`Residence` takes.
        batch_sampler: the order, by its ``index_batches``.
        device: where the images are kept.
        read: a loader of batches of these samples as test images. Each file is read when it is first needed, by workers
            that are ahead of the training as they are without a residence.
    """

    def __init__(
        self,
        samples: AugmentedDataset,
        batch_sampler: Sampler,
        device: torch.device,
        read: Callable[[Iterable[list[int]]], DataLoader],
    ) -> None:
        self.samples, self.batch_sampler, self.device, self.read = samples, batch_sampler, device, read
        images, side = _in_memory(samples), samples.fit.size
        #: Rows of `images` that are still to be read.
        self.unread = np.full(len(samples), images is None)
        if images is None:
            images = torch.empty(len(samples), 3, side, side, dtype=torch.uint8)
        self.images, self.labels = images.to(device), _labels(samples.dataset).to(device)
        #: Which sample each row is: the one after it in place of one that cannot be read.
        self.index = np.arange(len(samples))

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        recipe, size = self.samples.recipe, self.samples.fit.size
        batches, files = self.batch_sampler.index_batches(), iter(())
        if self.unread.any():
            files = iter(self.read(self._first_uses()))
        while some := list(islice(batches, 1 if self.unread.any() else _AT_ONCE)):
            rows, lengths = np.concatenate([rows for _, rows in some]), [len(rows) for _, rows in some]
            if len(new := _new(rows, self.unread)):
                self._keep(new, next(files))
                # The last one ends the workers.
                files = files if self.unread.any() else iter(())
            index, epochs = self.index[rows], np.repeat([epoch for epoch, _ in some], lengths)
            params = recipe.draw_batch(self.samples.seed, epochs, index, size)
            numbers = {"index": index}
            if recipe.variants(size) is not None:
                numbers["key"] = np.zeros_like(index) + recipe.number(params, size)
            numbers = {name: self._pinned(part).split(lengths) for name, part in numbers.items()}
            rows, index, *sent = (
                self._pinned(part).to(self.device, non_blocking=True).split(lengths)
                for part in (rows, index, *params.values())
            )
            for i in range(len(some)):
                own = {name: parts[i] for name, parts in zip(params, sent, strict=True)}
                yield {
                    "image": recipe.apply_batch(self.images.index_select(0, rows[i]), own, size),
                    "label": self.labels.index_select(0, index[i]),
                    **{name: parts[i] for name, parts in numbers.items()},
                }

    def _first_uses(self) -> Iterator[list[int]]:
        """The rows that each batch is the first to need, without batches that need none."""
        unread = self.unread.copy()
        for _, rows in self.batch_sampler.index_batches():
            if len(new := _new(rows, unread)):
                unread[new] = False
                yield new.tolist()
            if not unread.any():
                return

    def _keep(self, rows: np.ndarray, batch: dict[str, Tensor]) -> None:
        where = self._pinned(rows).to(self.device, non_blocking=True)
        self.images.index_copy_(0, where, batch["image"].to(self.device, non_blocking=True))
        self.index[rows], self.unread[rows] = batch["index"], False

    def _pinned(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        # A step does not wait for copies from there.
        return tensor.pin_memory() if self.device.type == "cuda" else tensor


def _new(rows: np.ndarray, unread: np.ndarray) -> np.ndarray:
    # A row can be in a batch twice, where classes are drawn alike.
    return np.unique(rows[unread[rows]])


class ResidentTestLoader:
    """The batches of an evaluation, ``image`` and ``label`` on the device; files are read in the first evaluation.

    Args:
        samples: a data set that a :class:`Residence` takes.
        device: where the images are kept.
        loader: of these samples, if they are files.
    """

    def __init__(self, samples: AugmentedDataset, batch_size: int, device: torch.device, loader: DataLoader) -> None:
        self.samples, self.batch_size, self.device, self.loader = samples, batch_size, device, loader
        self.batches: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self.batches and (images := _in_memory(self.samples)) is not None:
            self.batches = [*self._slices(images.to(self.device), _labels(self.samples.dataset).to(self.device))]
        if self.batches:
            yield from map(dict, self.batches)
            return
        read = []
        for batch in self.loader:
            devices = {name: self.device if name in ("image", "label") else "cpu" for name in batch}
            # Copies: what workers send is in shared memory, of which there is little.
            read.append({name: part.to(devices[name], non_blocking=True, copy=True) for name, part in batch.items()})
            yield dict(read[-1])
        # An evaluation that ends early leaves it to the next one.
        self.batches = read

    def _slices(self, images: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        own = [*InferenceSampler(len(self.samples))]
        for begin in range(0, len(own), self.batch_size):
            index = torch.tensor(own[begin : begin + self.batch_size])
            part = slice(own[begin], own[begin] + len(index))
            yield {"image": images[part], "label": labels[part], "index": index, "key": torch.zeros_like(index)}
