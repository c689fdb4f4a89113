"""DATALOADER.ON_ERROR skip: images that cannot be read are passed over, each is reported once, and they are counted."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from torch.utils.data import Dataset, default_collate

from d2distill.common.engine.distributed import run_on_main_process
from d2distill.common.engine.loading import WorkerLoader
from d2distill.common.engine.run_folder import write_text
from d2distill.common.errors import DataError
from d2distill.common.text import printable

__all__ = ["SkippingLoader", "UnreadableImages"]

logger = logging.getLogger("detectron2.d2distill")


class UnreadableImages:
    """The errors of images that could not be read, each logged when it is met first.

    Args:
        folder: of the run, whose ``unreadable.txt`` lists them; of a resumed one those of before are known.
    """

    def __init__(self, folder: str = "") -> None:
        self.path = Path(folder, "unreadable.txt") if folder else None
        known = self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.is_file() else []
        self.errors, self._counted = dict.fromkeys(known), 0

    def add(self, error: str) -> None:
        if error not in self.errors:
            self.errors[error] = None
            logger.warning(f"DATALOADER.ON_ERROR skip: {error}")

    def summarize(self) -> None:
        """Log and list how many there are by now in all processes, if they are more than before. All call it."""
        of_ranks = comm.gather(list(self.errors))
        run_on_main_process(lambda: self._summarize([error for errors in of_ranks for error in errors]))

    def _summarize(self, errors: list[str]) -> None:
        for error in errors:
            self.add(error)
        if len(self.errors) == self._counted:
            return
        self._counted = len(self.errors)
        listed = f"; {self.path} lists them" if self.path else ""
        logger.warning(
            f"{self._counted} images cannot be read and are skipped: in training the next image takes their place, "
            f"metrics leave them out{listed}"
        )
        if self.path:
            write_text(self.path, "".join(f"{error}\n" for error in self.errors))


class SkippingLoader(WorkerLoader):
    """A WorkerLoader that puts the errors of unreadable images into `unreadable` instead of raising them.

    Args:
        samples: a map-style data set with keys index or (epoch, index), whose samples are dicts.
        replace: the sample that follows in the data set takes the place of an unreadable one: a function of its index
            alone, so that a resumed run sees what an unbroken one does. Otherwise the batch has a sample less, and is
            left out if it has none.
        options: of WorkerLoader.
    """

    def __init__(self, samples: Dataset, unreadable: UnreadableImages, replace: bool = False, **options: Any) -> None:
        super().__init__(_ReadableSamples(samples, replace), collate_fn=_collate, **options)
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[Any]:
        return self._without_errors(super().__iter__())

    def _without_errors(self, batches: Iterator[tuple[list[str], Any]]) -> Iterator[Any]:
        # Errors of images travel with the batch: a worker's log is not the run's.
        for errors, batch in batches:
            for error in errors:
                self.unreadable.add(error)
            if batch is not None:
                yield batch


class _ReadableSamples(Dataset):
    """Samples with the errors of those in whose place they are: ``(errors, sample)``."""

    def __init__(self, samples: Dataset, replace: bool) -> None:
        self.samples, self.replace = samples, replace

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[list[str], dict[str, Any] | None]:
        errors: list[str] = []
        for offset in range(len(self) if self.replace else 1):
            try:
                return errors, self.samples[_shifted(key, offset, len(self))]
            except DataError as error:
                errors.append(printable(str(error)))  # a line of the list
        if self.replace:
            raise DataError(f"none of the {len(self)} training images can be read; the first: {errors[0]}")
        return errors, None


def _shifted(key: tuple[int, int] | int, offset: int, length: int) -> tuple[int, int] | int:
    if isinstance(key, tuple):
        epoch, index = key
        return epoch, (index + offset) % length
    return (key + offset) % length


def _collate(samples: list[tuple[list[str], dict[str, Any] | None]]) -> tuple[list[str], Any]:
    errors = [error for own, _ in samples for error in own]
    readable = [sample for _, sample in samples if sample is not None]
    return errors, default_collate(readable) if readable else None
