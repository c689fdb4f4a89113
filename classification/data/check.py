"""What can be known about the image files of a data set before a training: each is opened once."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from d2distill.classification.data.datasets import read_image
from d2distill.common.engine.loading import WorkerLoader
from d2distill.common.errors import DataError

__all__ = ["FileCheck", "check_files"]


@dataclass
class FileCheck:
    """What :func:`check_files` found.

    Attributes:
        errors: of the files that cannot be read.
        sizes: (width, height) of each of the others.
        modes: how many of them have which Pillow mode.
        turned: how many have an EXIF orientation other than upright.
        duplicates: files of different splits with the same bytes, in pairs.
    """

    errors: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter = field(default_factory=Counter)
    turned: int = 0
    duplicates: list[tuple[str, str]] = field(default_factory=list)


def check_files(splits: Sequence[Sequence[str]], read_options: Mapping[str, Any], num_workers: int = 0) -> FileCheck:
    """Read every file of every split as a training does.

    Args:
        splits: paths of the images of each split.
        read_options: keyword arguments of :func:`.read_image`.
    """
    found, seen = FileCheck(), {}
    for paths in splits:
        digests = {}
        batches = WorkerLoader(_Files(paths, read_options), num_workers=num_workers, batch_size=16, collate_fn=list)
        for path, result in zip(paths, (result for batch in batches for result in batch), strict=True):
            if isinstance(result, str):
                found.errors.append(result)
                continue
            size, mode, turned, digest = result
            found.sizes.append(size)
            found.modes[mode] += 1
            found.turned += turned
            digests[digest] = path
            if digest in seen:
                found.duplicates.append((seen[digest], path))
        seen.update(digests)
    return found


class _Files(Dataset):
    """Of each file its size, mode, whether it is turned, and a hash; or what is wrong with it."""

    def __init__(self, paths: Sequence[str], read_options: Mapping[str, Any]) -> None:
        self.paths, self.read_options = paths, read_options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[tuple[int, int], str, bool, bytes] | str:
        path = self.paths[index]
        try:
            size = read_image(path, **self.read_options).size
        except DataError as error:
            return str(error)
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) != 1  # the tag of the orientation; 1 is upright
            return size, image.mode, turned, hashlib.sha256(Path(path).read_bytes()).digest()
