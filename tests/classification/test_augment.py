"""Augmentation: numbers from (seed, epoch, index), pixels from numbers, no global RNG."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from d2distill.classification.data import AugmentedDataset, build_dataset
from d2distill.classification.data.augment import build_augmentation, eval_transform
from tests.dataset_files import class_images, write_cifar100, write_image_folder

RECIPES = ["crop", "crop_flip", "none", "resized_crop_flip", "rotate_flip"]
RANDOM_RECIPES = [name for name in RECIPES if name != "none"]


def tensor_image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(class_images(np.zeros(1, dtype=int), height, width, seed)[0])


def pil_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return F.to_pil_image(tensor_image(height, width, seed))


def draw(name: str, index: int, height: int = 32, width: int = 32, seed: int = 7, epoch: int = 3):
    return build_augmentation(name).draw(np.random.default_rng([seed, epoch, index]), height, width)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    images, labels = write_cifar100(root)["train"]
    return build_dataset("cifar100", root, "train"), images, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    write_image_folder(root)
    return build_dataset("folder", root, "train")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"unknown augmentation 'crop-flip' \(did you mean crop_flip"):
        build_augmentation("crop-flip")


# ---- numbers


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("none", {}),
        ("crop", {"top": 4, "left": 7}),
        ("crop_flip", {"top": 4, "left": 7, "flip": False}),
        ("rotate_flip", {"angle": -0.6099633181840218, "flip": False}),
        ("resized_crop_flip", {"top": 1, "left": 15, "height": 32, "width": 37, "flip": True}),
    ],
)
def test_the_numbers_of_published_runs(name, numbers):
    assert draw(name, index=11, height=40, width=56, seed=7, epoch=3) == numbers


@pytest.mark.parametrize("name", RANDOM_RECIPES)
def test_numbers_depend_on_seed_epoch_and_index_only(name):
    first = [draw(name, index) for index in range(50)]
    assert first == [draw(name, index) for index in reversed(range(50))][::-1]
    for other in (
        [draw(name, index, seed=8) for index in range(50)],
        [draw(name, index, epoch=4) for index in range(50)],
        [draw(name, index + 50) for index in range(50)],
        [draw(name, index, seed=3, epoch=7) for index in range(50)],
    ):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (64, 8)])
def test_crop_positions_are_uniform(size, padding):
    draws = [draw("crop_flip", index, size, size) for index in range(3000)]
    for key in ("top", "left"):
        counts = np.bincount([params[key] for params in draws], minlength=2 * padding + 1)
        assert len(counts) == 2 * padding + 1
        assert abs(counts - 3000 / len(counts)).max() < 5 * np.sqrt(3000 / len(counts))
    assert abs(np.mean([params["flip"] for params in draws]) - 0.5) < 0.05
    assert abs(np.corrcoef([(p["top"], p["left"], p["flip"]) for p in draws], rowvar=False)[0, 1:]).max() < 0.1


def test_angles_fill_the_range():
    angles = np.array([draw("rotate_flip", index, 64, 64)["angle"] for index in range(2000)])
    assert -20 <= angles.min() < -19.8 and 19.8 < angles.max() <= 20
    assert abs(angles.mean()) < 1 and abs(angles.std() - 40 / np.sqrt(12)) < 0.5


def test_resized_crop_boxes_are_distributed_as_torchvisions():
    height, width = 300, 400
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference_transform = v2.RandomResizedCrop(224)
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        reference = [reference_transform.make_params([image]) for _ in range(3000)]
    ours = [draw("resized_crop_flip", index, height, width) for index in range(3000)]
    assert all(box["top"] + box["height"] <= height and box["left"] + box["width"] <= width for box in ours)
    assert abs(np.mean([box["flip"] for box in ours]) - 0.5) < 0.05
    for key in ("top", "left", "height", "width"):
        a, b = (np.array([box[key] for box in boxes]) for boxes in (ours, reference))
        np.testing.assert_allclose(np.quantile(a, [0.1, 0.5, 0.9]), np.quantile(b, [0.1, 0.5, 0.9]), atol=14)
        assert abs(a.mean() - b.mean()) < 6


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (500, 1)])
def test_resized_crop_falls_back_as_torchvision(height, width):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    ours = draw("resized_crop_flip", 0, height, width)
    with torch.random.fork_rng():
        reference = v2.RandomResizedCrop(224).make_params([image])
    assert {key: ours[key] for key in reference} == {key: max(value, 0) for key, value in reference.items()}


# ---- pixels


both_kinds = pytest.mark.parametrize("make", [tensor_image, pil_image])


@both_kinds
def test_crop_is_numpy_slicing(make):
    padded = np.pad(tensor_image(32, 32).numpy(), ((0, 0), (4, 4), (4, 4)))
    for top, left in ((0, 0), (8, 8), (3, 6)):
        expected = padded[:, top : top + 32, left : left + 32]
        plain = build_augmentation("crop").apply(make(32, 32), {"top": top, "left": left}, 32)
        np.testing.assert_array_equal(plain.numpy(), expected)
        for flip in (False, True):
            params = {"top": top, "left": left, "flip": flip}
            result = build_augmentation("crop_flip").apply(make(32, 32), params, 32)
            np.testing.assert_array_equal(result.numpy(), expected[:, :, ::-1] if flip else expected)


@both_kinds
def test_rotate_is_torchvisions(make):
    image = make(64, 64)
    expected = F.rotate(image, 17.3, interpolation=InterpolationMode.NEAREST, fill=0)
    expected = expected if isinstance(expected, torch.Tensor) else F.pil_to_tensor(expected)
    recipe = build_augmentation("rotate_flip")
    assert torch.equal(recipe.apply(image, {"angle": 17.3, "flip": False}, 64), expected)
    assert torch.equal(recipe.apply(image, {"angle": 17.3, "flip": True}, 64), expected.flip(-1))
    assert torch.equal(recipe.apply(image, {"angle": 0.0, "flip": False}, 64), tensor_image(64, 64))
    assert (expected[:, 0, 0] == 0).all(), "zeros outside"


@both_kinds
def test_resized_crop_is_torchvisions(make):
    image = make(40, 56)
    box = {"top": 3, "left": 5, "height": 30, "width": 25}
    expected = F.resized_crop(image, **box, size=[20, 20], interpolation=InterpolationMode.BILINEAR, antialias=True)
    expected = expected if isinstance(expected, torch.Tensor) else F.pil_to_tensor(expected)
    recipe = build_augmentation("resized_crop_flip")
    assert torch.equal(recipe.apply(image, box | {"flip": False}, 20), expected)
    assert torch.equal(recipe.apply(image, box | {"flip": True}, 20), expected.flip(-1))


@both_kinds
def test_eval_transform_is_the_imagenet_protocol(make):
    for size, short_side in ((224, 256), (32, 37)):  # 36.6
        protocol = v2.Compose([v2.Resize(short_side, antialias=True), v2.CenterCrop(size), v2.ToImage()])
        for image in (make(300, 400), make(100, 80), make(256, 256)):
            assert torch.equal(eval_transform(image, size), protocol(image).as_subclass(torch.Tensor))
    assert torch.equal(eval_transform(make(32, 32), 32), tensor_image(32, 32)), "the identity at its size"


@pytest.mark.parametrize("name", RECIPES)
@both_kinds
def test_every_recipe_takes_every_shape(name, make):
    recipe = build_augmentation(name)
    for shape in ((40, 56), (56, 40), (32, 32), (8, 100)):
        image = make(*shape)
        params = recipe.draw(np.random.default_rng([0, 1, 2]), *((32, 32) if recipe.fits_first else shape))
        result = recipe.apply(image, params, 32)
        assert result.dtype == torch.uint8 and result.shape == (3, 32, 32)
        assert torch.equal(result, recipe.apply(image, params, 32))
        unchanged = image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)
        assert torch.equal(unchanged, tensor_image(*shape))


# ---- variants


@pytest.mark.parametrize(("name", "size", "variants"), [("none", 32, 1), ("crop", 32, 81), ("crop_flip", 32, 162)])
def test_every_variant_has_a_number_and_pixels_of_its_own(name, size, variants):
    recipe, image, pixels = build_augmentation(name), tensor_image(size, size), {}
    for index in range(12 * variants):
        params = draw(name, index, size, size)
        assert torch.equal(
            pixels.setdefault(recipe.number(params, size), recipe.apply(image, params, size)),
            recipe.apply(image, params, size),
        )
    assert recipe.variants(size) == variants and sorted(pixels) == list(range(variants))
    assert len({result.numpy().tobytes() for result in pixels.values()}) == variants


def test_only_recipes_that_say_so_have_variants(cifar, folder):
    assert [build_augmentation(name).variants(64) for name in RECIPES] == [17**2, 2 * 17**2, 1, None, None]

    class Gray(type(build_augmentation("crop_flip"))):
        def apply(self, image, params, size):
            return F.rgb_to_grayscale(super().apply(image, params, size), 3)

    # It numbers no variants, and those of the recipe below have other pixels.
    assert Gray().variants(32) is None
    assert "key" not in AugmentedDataset(folder, 24, 0, "resized_crop_flip")[1, 0]
    recipe, params = build_augmentation("crop_flip"), draw("crop_flip", 5, seed=9, epoch=2)
    assert AugmentedDataset(cifar[0], 32, 9, "crop_flip")[2, 5]["key"] == recipe.number(params, 32)


# ---- samples


def test_sample_in_training(cifar):
    dataset, images, labels = cifar
    changed = 0
    for index in range(len(dataset)):
        result = AugmentedDataset(dataset, 32, 9, "crop_flip")[2, index]
        params = build_augmentation("crop_flip").draw(np.random.default_rng([9, 2, index]), 32, 32)
        padded = np.pad(images[index], ((0, 0), (4, 4), (4, 4)))
        expected = padded[:, params["top"] : params["top"] + 32, params["left"] : params["left"] + 32]
        expected = expected[:, :, ::-1] if params["flip"] else expected
        np.testing.assert_array_equal(result["image"].numpy(), expected)
        assert result["label"] == labels[index] and type(result["label"]) is int and result["index"] == index
        changed += not np.array_equal(result["image"].numpy(), images[index])
    assert changed > len(dataset) // 2


def test_sample_draws_boxes_from_the_stored_image(folder):
    for epoch in range(1, 10):
        result = AugmentedDataset(folder, 24, 0, "resized_crop_flip")[epoch, 0]
        params = draw("resized_crop_flip", 0, 40, 56, seed=0, epoch=epoch)
        expected = build_augmentation("resized_crop_flip").apply(folder.load(0)[0], params, 24)
        assert torch.equal(result["image"], expected)


@pytest.mark.parametrize("name", RECIPES)
def test_global_rngs_are_neither_read_nor_moved(cifar, folder, name):
    def run(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        images = [
            AugmentedDataset(dataset, 32, 0, name)[1, i]["image"] for dataset in (cifar[0], folder) for i in range(4)
        ]
        assert torch.equal(states[0], torch.get_rng_state())
        assert (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()
        return torch.stack(images)

    assert torch.equal(run(1), run(2))
