"""Images in one tensor: the batches are, to the bit, those that workers give."""

import itertools
import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from d2distill.classification.data import AUGMENTATION_REGISTRY, build_dataset
from d2distill.classification.data.augment import CenterFit, Crop, build_augmentation, pil_rotation
from d2distill.classification.data.datasets import FileDataset, ImageSelection
from d2distill.classification.data.loader import EpochBatchSampler, FixedSubset, build_test_loader, build_train_loader
from d2distill.classification.data.resident import Residence, ResidentTrainLoader
from d2distill.classification.data.unreadable import UnreadableImages
from d2distill.common.errors import DataError
from tests.classification.test_multilabel import write_colors
from tests.dataset_files import class_images, write_cifar100, write_image_folder

CPU = Residence(torch.device("cpu"), 2.0)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_cifar100(root, n_train=100)
    write_image_folder(root / "folder")
    write_colors(root / "colors")
    cifar = build_dataset("cifar100", root)
    return {
        "memory": cifar,
        "selection": FixedSubset(ImageSelection.with_classes(cifar, cifar.classes[::-1]), 70),
        "files": build_dataset("folder", root / "folder"),
        "several classes": ImageSelection(build_dataset("multilabel", root / "colors"), [5, 3, 20, 8, 11]),
    }


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for own, other in zip(batches, expected, strict=True):
        assert own.keys() == other.keys()
        for name, part in own.items():
            assert part.dtype == other[name].dtype and torch.equal(part, other[name]), name


def both(dataset, size, recipe, batch_size=32, start=0, labels=None, unreadable=()):
    for residence, errors in itertools.zip_longest((CPU, None), unreadable):
        sampler = EpochBatchSampler(len(dataset), batch_size, 3, 7, start, labels)
        yield build_train_loader(dataset, sampler, size, recipe, 0, errors, residence)


@pytest.mark.parametrize("recipe", ["none", "crop", "crop_flip", "rotate_flip"])
@pytest.mark.parametrize("source", ["memory", "selection", "files", "several classes"])
@pytest.mark.parametrize("size", [CenterFit(32), CenterFit(20, 24, "bicubic")])
def test_training_batches(datasets, source, recipe, size):
    resident, workers = both(datasets[source], size, recipe)
    as_tensors = source in ("memory", "selection")
    assert isinstance(resident, ResidentTrainLoader) == (not as_tensors or recipe != "rotate_flip")
    assert_same(list(resident), list(workers))


@pytest.mark.parametrize(("source", "batch_size"), [("selection", 32), ("files", 5)])
@pytest.mark.parametrize("start", [1, 5, 8])
def test_any_start(datasets, source, batch_size, start):
    resident, workers = both(datasets[source], 32, "crop_flip", batch_size, start)
    assert len(resident) == len(workers) == 9 - start
    assert_same(list(resident), list(workers))


@pytest.mark.parametrize(("source", "batch_size"), [("memory", 32), ("files", 7)])
def test_classes_drawn_alike(datasets, source, batch_size):
    labels = datasets[source].labels.clone()
    labels[1:] = labels[1]
    resident, workers = both(datasets[source], 32, "crop_flip", batch_size, labels=labels)
    assert_same(list(resident), list(workers))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_has_its_own(datasets, rank, monkeypatch):
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 3)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
    resident, workers = both(datasets["files"], 32, "crop_flip", batch_size=11)
    assert_same(list(resident), list(workers))
    resident, workers = (build_test_loader(datasets["files"], 3, 32, 0, None, residence) for residence in (CPU, None))
    assert_same(list(resident), list(workers))


@pytest.mark.parametrize("source", ["memory", "selection", "files", "several classes"])
@pytest.mark.parametrize("size", [32, 20])
def test_test_batches(datasets, source, size):
    resident, workers = (build_test_loader(datasets[source], 3, size, 0, None, where) for where in (CPU, None))
    assert len(resident) == len(workers) and not isinstance(resident, DataLoader)
    for _ in range(2):
        assert_same(list(resident), list(workers))


@pytest.fixture
def reads(datasets, monkeypatch, tmp_path):
    """How often each file was read, whichever process did."""

    def load(self, index, load=FileDataset.load):
        with (tmp_path / str(index)).open("a") as file:
            file.write("x")
        return load(self, index)

    monkeypatch.setattr(FileDataset, "load", load)
    return lambda: {int(path.name): len(path.read_text()) for path in tmp_path.iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_files_are_read_once_by_workers_that_end(datasets, workers, reads):
    sampler = EpochBatchSampler(12, 5, 3, 0)
    batches = iter(build_train_loader(datasets["files"], sampler, 32, "crop_flip", workers, None, CPU))
    next(batches)
    assert len(multiprocessing.active_children()) == workers
    assert len(list(itertools.islice(batches, 2))) == 2 and not multiprocessing.active_children()
    assert len(list(batches)) == 6 and reads() == dict.fromkeys(range(12), 1)


def test_test_files_are_read_once(datasets, reads):
    loader = build_test_loader(datasets["files"], 5, 32, 0, None, CPU)
    next(iter(loader))  # an evaluation that ends early
    whole = list(loader)
    assert reads() == {index: 2 if index < 5 else 1 for index in range(12)}
    whole[1].pop("label")
    again = list(loader)
    assert_same(again, list(build_test_loader(datasets["files"], 5, 32, 0)))
    assert reads() == {index: 3 if index < 5 else 2 for index in range(12)}


def test_unreadable_images(tmp_path):
    written = write_image_folder(tmp_path)
    for path in [*(written["train"][0][i] for i in (4, 5, 11)), *(written["val"][0][i] for i in (0, 1, 4))]:
        path.write_bytes(b"no image")
    train_set, test_set = (build_dataset("folder", tmp_path, split) for split in ("train", "val"))
    errors = [UnreadableImages(), UnreadableImages()]
    resident, workers = both(train_set, 32, "crop_flip", batch_size=5, unreadable=errors)
    assert_same(list(resident), list(workers))
    assert set(errors[0].errors) == set(errors[1].errors) and len(errors[0].errors) == 3
    resident, workers = (
        build_test_loader(test_set, 2, 32, 0, own, where) for own, where in zip(errors, (CPU, None), strict=True)
    )
    assert_same(list(resident), list(workers))
    assert len(resident) == 3 and set(errors[0].errors) == set(errors[1].errors) and len(errors[0].errors) == 6
    with pytest.raises(DataError, match=r"cannot read image .*class_0000/00000\.jpg"):
        list(build_test_loader(test_set, 2, 32, 0, None, CPU))


# ---- pixels


@pytest.mark.parametrize("size", [15, 32, 64])
@pytest.mark.parametrize("name", ["none", "crop", "crop_flip", "rotate_flip"])
def test_a_batch_is_augmented_as_its_images_one_by_one(name, size):
    recipe, seed, n = build_augmentation(name), 2**40 + 3, 700
    images = torch.from_numpy(class_images(np.arange(n), size, size))
    epochs, indices = np.arange(n) // 100, np.arange(n) * 5
    params = recipe.draw_batch(seed, epochs, indices, size)
    pixels = recipe.apply_batch(images, {key: torch.from_numpy(value) for key, value in params.items()}, size)
    numbers = recipe.number(params, size) if recipe.variants(size) else None
    for i, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist(), strict=True)):
        own = recipe.draw(np.random.default_rng([seed, epoch, index]), size, size)
        assert {key: params[key][i] for key in own} == own
        assert numbers is None or np.broadcast_to(numbers, n)[i] == recipe.number(own, size)
        for image in (images[i], F.to_pil_image(images[i])):
            if isinstance(image, recipe.batched):
                assert torch.equal(pixels[i], recipe.apply(image, own, size))


@pytest.mark.parametrize("angle", [0.0, 1e-17, -1e-17, 20.0, -20.0, 5.625, -11.25])
def test_angles_at_the_edges(angle):
    recipe, image = build_augmentation("rotate_flip"), torch.from_numpy(class_images(np.arange(1), 64, 64))
    params = {"affine": torch.from_numpy(pil_rotation(np.array([angle]), 64)), "flip": torch.tensor([True])}
    expected = recipe.apply(F.to_pil_image(image[0]), {"angle": angle, "flip": True}, 64)
    assert torch.equal(recipe.apply_batch(image, params, 64)[0], expected)


def test_a_number_that_is_drawn_again():
    class Often(Crop):
        def draw(self, rng, height, width):
            return {"top": rng.integers(3 * 2**30), "left": rng.integers(9), "share": rng.random()}

    params = Often().draw_batch(1, np.ones(200, int), np.arange(200), 32)
    own = [Often().draw(np.random.default_rng([1, 1, index]), 32, 32) for index in range(200)]
    assert {key: values.tolist() for key, values in params.items()} == {key: [p[key] for p in own] for key in params}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_same_pixels_on_a_gpu(datasets):
    for recipe in ("none", "crop", "crop_flip", "rotate_flip"):
        sampler = EpochBatchSampler(12, 5, 3, 7)
        where = Residence(torch.device("cuda"), 2.0)
        batches = iter(build_train_loader(datasets["files"], sampler, 32, recipe, 0, None, where))
        first, (_, workers) = next(batches), both(datasets["files"], 32, recipe, batch_size=5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = [first, *batches]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert first["image"].is_cuda and first["label"].is_cuda and not first["index"].is_cuda
        assert_same([{name: part.cpu() for name, part in batch.items()} for batch in batches], list(workers))


# ---- what is kept


def test_recipes_of_users_stay_with_the_workers(datasets, log, monkeypatch):
    class DarkCrop(Crop):
        def apply(self, image, params, size):
            return super().apply(image, params, size) // 2

    monkeypatch.setitem(AUGMENTATION_REGISTRY._obj_map, "dark_crop", DarkCrop)
    resident, workers = both(datasets["memory"], 32, "dark_crop")
    assert isinstance(resident, DataLoader)
    assert_same(list(resident), list(workers))
    assert "training images are loaded by workers: DarkCrop has no batched form for Tensor" in log.text


def test_the_log_says_where_the_images_are(datasets, log):
    class Noisy(type(datasets["memory"])):
        def load(self, index):
            image, label = super().load(index)
            return image + torch.randint(9, image.shape, dtype=torch.uint8), label

    memory = datasets["memory"]
    noisy = Noisy(memory.info, memory.images, memory.labels, memory.classes)
    build_test_loader(memory, 3, 32, 0, None, CPU)
    build_test_loader(memory, 3, 32, 0, None, Residence(torch.device("cpu"), 1e-4))
    build_test_loader(noisy, 3, 32, 0, None, CPU)
    assert [record.getMessage() for record in log.records] == [
        "The 100 test images are kept on cpu (0.00031 GB)",
        "The 100 test images are loaded by workers: they would take 0.00031 GB, and DATALOADER.RESIDENT_GB is 0.0001",
        "The 100 test images are loaded by workers: Noisy loads them in its own way",
    ]
