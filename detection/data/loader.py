"""Data loaders of detection. Batches and augmentation are a function of (seed, step), so that runs resume exactly."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.data.build import trivial_batch_collator
from detectron2.data.detection_utils import SizeMismatchError, convert_PIL_to_numpy
from detectron2.data.samplers import InferenceSampler
from detectron2.data.transforms import AugInput
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from d2distill.common.building import building
from d2distill.common.engine.loading import WorkerLoader
from d2distill.common.errors import DataError, MissingDependencyError, UserError

from .catalog import load_test_set
from .sampling import build_batch_sampler

__all__ = ["MappedImages", "build_test_loader", "build_train_loader", "check_depth"]


class MappedImages(Dataset):
    """Images processed by a mapper, by (position, index), or by index where nothing is random.

    While the mapper runs, Python's, numpy's and torch's generators are seeded by (seed, position).
    """

    def __init__(self, dicts: list[dict[str, Any]], mapper: Callable[[dict], dict], seed: int) -> None:
        # Serialized into one buffer that workers share: reference counts would copy a list of objects into each.
        self.dicts = DatasetFromList(dicts, copy=False)
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        position, index = key if isinstance(key, tuple) else (0, key)
        record = self.dicts[index]
        try:
            with _seeded(self.seed, position):
                return self.mapper(record)
        except UserError:
            raise
        except ImportError as error:  # Detectron2 crops polygons with a library of their own
            raise MissingDependencyError(f"images cannot be prepared as INPUT says: {error}; install it") from error
        except (OSError, SyntaxError, ValueError) as error:  # of image decoders, and Detectron2's
            raise _explained(error, record["file_name"]) from error


class PictureMapper(DatasetMapper):
    """Detectron2's mapper, which refuses pictures whose pixels it would change."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        file_name = dataset_dict["file_name"]
        # A JPEG, as most pictures are, has 8 bits.
        if not file_name.lower().endswith((".jpg", ".jpeg")):
            with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
                check_depth(image, file_name)
        return super().__call__(dataset_dict)


def check_depth(image: Image.Image, name: str) -> None:
    """Raise a DataError for gray pixels of more than 8 bits, nearly all of which Pillow would make white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise DataError(
            f"image {name} has gray pixels of more than 8 bits (mode {image.mode}), whose range is not known: convert "
            "it to 8 bits"
        )


def _explained(error: Exception, file_name: str) -> DataError:
    """What stopped the mapper: the picture, or what the annotations say of it."""
    reason = str(error) or type(error).__name__
    if isinstance(error, SizeMismatchError):
        return DataError(f"{reason} (Detectron2 first turns a picture as its EXIF orientation says)")
    try:
        with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
            image.load()
    except Exception:  # decoders raise nearly anything
        return DataError(
            f"cannot use image {file_name}: {reason}. Restore the file, or remove the image from the annotations"
        )
    return DataError(
        f"image {file_name} can be read, but not prepared: {reason}; check its annotations, and the settings of INPUT"
    )


@contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators by (seed, position), and restore them at the end."""
    # The spawn key keeps this stream apart from seed_step's, which is seeded by numbers like these.
    words = np.random.SeedSequence([seed, position], spawn_key=(2,)).generate_state(4)
    number = int(words[1]) << 32 | int(words[0])
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(number)
        np.random.seed(words)
        # torch.manual_seed would seed the GPUs' generators too, and nothing restores them.
        torch.default_generator.manual_seed(number)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def build_train_loader(cfg: CfgNode, dataset_dicts: list[dict[str, Any]], start: int = 0) -> DataLoader:
    """Endless batches of this process's share of SOLVER.IMS_PER_BATCH images, from step `start` on.

    A batch is a list of dicts as Detectron2's models take them. Which images, and how they are augmented, depends on
    SEED and the step only: not on the number of workers and processes, nor on restarts.

    Raises:
        ConfigError: as :func:`.build_batch_sampler`; settings below INPUT that no image can be augmented with.
        DataError: while iterating, for an image that cannot be read or has another size than the annotations say.
    """
    return _loader(cfg, dataset_dicts, True, batch_sampler=build_batch_sampler(cfg, dataset_dicts, start))


def build_test_loader(cfg: CfgNode, name: str, dicts: Sequence[dict[str, Any]] | None = None) -> DataLoader:
    """Every image of a registered data set once, in order, divided among the processes, in batches of one.

    Args:
        dicts: the images, where :func:`.load_test_set` has read them already.
    """
    dicts = load_test_set(cfg, name) if dicts is None else list(dicts)
    return _loader(cfg, dicts, False, batch_size=1, sampler=InferenceSampler(len(dicts)))


def _loader(cfg: CfgNode, dicts: list[dict[str, Any]], is_train: bool, **sampling: Any) -> DataLoader:
    with building("INPUT", cfg), _seeded(cfg.SEED, 0):
        mapper = PictureMapper(cfg, is_train)
        # What is wrong with the settings shows here, and is not taken for a fault of the first image.
        mapper.augmentations(AugInput(convert_PIL_to_numpy(Image.new("RGB", (64, 64)), mapper.image_format)))
    images, workers = MappedImages(dicts, mapper, cfg.SEED), cfg.DATALOADER.NUM_WORKERS
    options = {"num_workers": workers, "pin_memory": cfg.MODEL.DEVICE.startswith("cuda")}
    return WorkerLoader(images, collate_fn=trivial_batch_collator, **options, **sampling)
