"""Data sets: what is read is what was written, and everything else is refused in words."""

import gzip
import hashlib
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2distill.classification.data import (
    DATASET_REGISTRY,
    ArrayDataset,
    DatasetInfo,
    arrays,
    build_dataset,
    dataset_info,
    register_dataset,
)
from d2distill.classification.data.datasets import FileDataset, read_image
from d2distill.common.engine.safe_pickle import load_arrays
from d2distill.common.errors import DataError
from tests import dataset_files as write


@pytest.fixture(autouse=True)
def no_other_data(monkeypatch, tmp_path):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.setattr(arrays, "DEBIAN_FOLDER", str(tmp_path / "debian"))


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    roots = {layout: tmp_path_factory.mktemp(layout) for layout in ("original", "folder")}
    return {layout: (root, write.write_tiny_imagenet(root, layout)) for layout, root in roots.items()}


# ---- registry


def test_statistics_of_fashion_mnist():
    """The published 0.28604 and 0.35302 of 28x28 images, with a border of zeros up to 32x32."""
    mean, square, inside = 0.28604 * 255, (0.28604**2 + 0.35302**2) * 255**2, 28**2 / 32**2
    info = dataset_info("fashion_mnist")
    np.testing.assert_allclose(info.pixel_mean, [mean * inside] * 3, atol=0.01)
    np.testing.assert_allclose(info.pixel_std, [(square * inside - (mean * inside) ** 2) ** 0.5] * 3, atol=0.01)


@pytest.mark.parametrize("call", [dataset_info, build_dataset])
def test_unknown_name_proposes_the_nearest(call):
    with pytest.raises(ValueError, match=r"'CIFAR-100' \(did you mean cifar100 or cifar10"):
        call("CIFAR-100")


def test_unknown_split():
    with pytest.raises(ValueError, match=r"train or val.*'test'"):
        build_dataset("digits", split="test")


def test_own_data_set(monkeypatch):
    monkeypatch.setattr(DATASET_REGISTRY, "_obj_map", {})
    info = DatasetInfo("mine", 2, 4, (1.0,) * 3, (2.0,) * 3, "cifar", "none", "it is made up")
    seen = []

    @register_dataset(info)
    def build(info, root, split):
        seen.append((root, split))
        return ArrayDataset(info, np.zeros((3, 3, 4, 4), np.uint8), [0, 1, 0], ["a", "b"])

    dataset = build_dataset("mine", "/some/where", "val")
    assert seen == [("/some/where", "val")] and dataset.num_classes == 2 and dataset.info.pixel_std == (2.0,) * 3
    with pytest.raises(AssertionError, match="'mine' was already registered in 'data set'"):
        register_dataset(info)(build)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no images"),
        ([0, 2], r"0\.\.1, found int64 0\.\.2"),
        ([0, -1], r"found int64 -1\.\.0"),
        ([0.0, 1.0], "whole numbers .* found float64"),
        ([0, 1, 1], r"n = 3 labels, got torch.uint8 \(2, 3, 4, 4\)"),
    ],
)
def test_wrong_labels(labels, message):
    info = DatasetInfo("mine", None, 4, (1.0,) * 3, (2.0,) * 3, "cifar", "none", "")
    with pytest.raises(ValueError, match=message):
        ArrayDataset(info, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), labels, ["a", "b"])


# ---- arrays: CIFAR, Fashion-MNIST, digits


@pytest.mark.parametrize(("name", "writer"), [("cifar100", write.write_cifar100), ("cifar10", write.write_cifar10)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar_keeps_pixels_and_labels(tmp_path, name, writer, split):
    images, labels = writer(tmp_path)[split]
    dataset = build_dataset(name, tmp_path, split)
    assert len(dataset) == len(labels) and dataset.labels.dtype == torch.int64
    np.testing.assert_array_equal(dataset.labels.numpy(), labels)
    for index in (0, len(labels) - 1):
        image, label = dataset.load(index)
        assert image.dtype == torch.uint8 and image.shape == (3, 32, 32) and type(label) is int
        np.testing.assert_array_equal(image.numpy(), images[index])
        assert label == labels[index]
    assert dataset.classes[3] == {"cifar100": "fine_3", "cifar10": "name_3"}[name]


def test_load_gives_a_copy(tmp_path):
    images, _ = write.write_cifar100(tmp_path)["train"]
    dataset = build_dataset("cifar100", tmp_path, "train")
    dataset.load(0)[0].zero_()
    np.testing.assert_array_equal(dataset.load(0)[0].numpy(), images[0])


class Evil:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('pwned')",)


def test_foreign_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write.write_cifar100(tmp_path) and tmp_path / "cifar-100-python" / "train"
    write.write_pickle(path, {b"data": Evil()})
    with pytest.raises(DataError, match=rf"refused to read {path}.*eval"):
        build_dataset("cifar100", tmp_path, "train")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("dtype", [object, [("a", object)], "V8", "S4", "M8[s]"])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, dtype):
    path = tmp_path / "file"
    write.write_pickle(path, {"data": np.zeros(2, dtype=dtype)})
    with pytest.raises(ValueError, match=r"file.* is not a plain number"):
        load_arrays(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"fine_labels": [0] * 3}, r"n = 3 labels, found uint8 \(4, 3072\)"),
        ({b"data": np.zeros((4, 3071), np.uint8)}, r"uint8 \(n, 3072\) .* found uint8 \(4, 3071\)"),
        ({b"data": np.zeros((4, 3072), np.float32)}, "found float32"),
    ],
)
def test_wrong_cifar_content(tmp_path, change, message):
    content = {b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [0, 1, 2, 3]}
    write.write_pickle(tmp_path / "cifar-100-python" / "train", content | change)
    with pytest.raises(DataError, match=message):
        build_dataset("cifar100", tmp_path, "train")


def test_cifar_file_of_another_kind(tmp_path):
    write.write_cifar100(tmp_path)
    folder = tmp_path / "cifar-100-python"
    shutil.copy(folder / "meta", folder / "train")
    with pytest.raises(DataError, match=r"train is not a CIFAR file: it has no entry 'data'"):
        build_dataset("cifar100", tmp_path, "train")


def test_cifar10_with_some_batches(tmp_path, log):
    images, _ = write.write_cifar10(tmp_path, n_train=8, batches=2)["train"]
    dataset = build_dataset("cifar10", tmp_path, "train")
    np.testing.assert_array_equal(dataset.images.numpy(), images)
    assert "2 of 5" in log.text
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        build_dataset("cifar10", tmp_path, "train")


@pytest.mark.parametrize(
    ("folder", "suffix"), [("fashion-mnist", ".gz"), ("FashionMNIST/raw", ""), ("", ""), ("debian", ".gz")]
)
def test_fashion_mnist(tmp_path, folder, suffix):
    written = write.write_fashion_mnist(tmp_path, folder=folder, suffix=suffix)
    for split, (images, labels) in written.items():
        dataset = build_dataset("fashion_mnist", tmp_path, split)
        np.testing.assert_array_equal(dataset.labels.numpy(), labels)
        assert dataset.images.shape == (len(labels), 3, 32, 32)
        for channel in range(3):
            np.testing.assert_array_equal(dataset.images[:, channel, 2:30, 2:30].numpy(), images)
        assert dataset.images.sum() == 3 * images.astype(int).sum(), "the padding is zeros"
    assert dataset.classes[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], r"cannot reshape array of size 23519 into shape \(30,28,28\)"),
        (lambda data: data + b"x", "there is more than the 23520 bytes that its header announces"),
        (
            lambda data: data[:4] + b"\xff" * 12 + data[16:],
            "its header announces 792281624589241053853",
        ),
        (lambda data: data[:9], "requires a buffer"),
        (lambda data: b"\0\0\x0d\x03" + data[4:], "magic number 3331, expected 2051"),
    ],
)
def test_damaged_idx(tmp_path, change, message):
    write.write_fashion_mnist(tmp_path, suffix="")
    path = tmp_path / "fashion-mnist" / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path} is not a readable idx file: .*{message}"):
        build_dataset("fashion_mnist", tmp_path, "train")


@pytest.mark.parametrize("change", [lambda data: data[:-20], lambda data: b"not gzip", lambda data: data[:200] + b"\0"])
def test_damaged_gzip(tmp_path, change):
    write.write_fashion_mnist(tmp_path)
    path = tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path} is not a readable idx file"):
        build_dataset("fashion_mnist", tmp_path, "val")


@pytest.mark.parametrize(("shape", "message"), [((1, 28, 28), "than the 784 bytes"), ((10**9,) * 3, "than there")])
def test_a_gzip_file_takes_no_more_memory_than_its_header_says(tmp_path, shape, message):
    write.write_fashion_mnist(tmp_path)
    path = tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, *shape) + bytes(3 * 10**7), 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=f"{path} is not a readable idx file: .*{message}"):
            build_dataset("fashion_mnist", tmp_path, "val")
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


DIGITS_SHA256 = "98e1e74b3310762bdf06d6641abc10bf4fa93ffa975565b84731bc5b63952b80"


def test_digits_split_is_fixed_and_disjoint():
    train, val = build_dataset("digits", split="train"), build_dataset("digits", split="val")
    assert (len(train), len(val)) == (1297, 500)
    # No two digits are equal, so the pixels tell which digit it was.
    keys = [image.numpy().tobytes() for dataset in (train, val) for image in dataset.images]
    assert len(set(keys)) == 1797
    assert not {*keys[:1297]} & {*keys[1297:]}
    assert val.labels.bincount().min() >= 48, "every class keeps its share"
    digest = hashlib.sha256(b"".join(keys) + train.labels.numpy().tobytes() + val.labels.numpy().tobytes()).hexdigest()
    assert digest == DIGITS_SHA256, "the published numbers of the examples depend on this split"


def test_digits_pixels():
    dataset = build_dataset("digits", split="train")
    images = dataset.images
    assert images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    assert images.min() == 0 and images.max() == 255
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert images.double().mean().item() == pytest.approx(dataset.info.pixel_mean[0], abs=1e-3)
    assert images.double().std(correction=0).item() == pytest.approx(dataset.info.pixel_std[0], abs=1e-3)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="'digits' comes with scikit-learn"):
        build_dataset("digits")


# ---- files: Tiny-ImageNet, ImageNet, folders


@pytest.mark.parametrize("layout", ["original", "folder"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_tiny_imagenet(tiny_root, layout, split):
    root, written = tiny_root[layout]
    dataset = build_dataset("tiny_imagenet", root, split)
    paths, labels = written[split]
    wnids = sorted((root / "tiny-imagenet-200" / "wnids.txt").read_text().split())
    assert dataset.classes == wnids and dataset.num_classes == 200
    found = {Path(dataset.path(i)).resolve(): int(dataset.labels[i]) for i in range(len(dataset))}
    assert found == dict(zip([path.resolve() for path in paths], labels.tolist(), strict=True))
    image, label = dataset.load(5)
    assert image.mode == "RGB" and image.size == (64, 64) and label == dataset.labels[5]
    with Image.open(dataset.path(5)) as reference:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(reference))


def test_tiny_imagenet_after_sorting_the_validation_images(tmp_path, tiny_root):
    shutil.copytree(tiny_root["folder"][0], tmp_path, dirs_exist_ok=True)
    val = tmp_path / "tiny-imagenet-200" / "val"
    (val / "images").mkdir()
    (val / "val_annotations.txt").write_text("val_0.JPEG\tn00000000\t0\t0\t1\t1\n")
    assert len(build_dataset("tiny_imagenet", tmp_path, "val")) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("\tn", "\tx", 1), r"line 1: class 'x\d+' is not among"),
        (lambda text: text + "gone.JPEG\t" + text.split()[1] + "\t0\n", "does not name the files .* images/gone.JPEG"),
        (lambda text: text.partition("\n")[2], "does not name the files .* images/val_0.JPEG"),
        (lambda text: text.replace("\t", " "), "line 1: class '' is not among"),
    ],
)
def test_wrong_tiny_imagenet_annotations(tmp_path, tiny_root, change, message):
    shutil.copytree(tiny_root["original"][0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        build_dataset("tiny_imagenet", tmp_path, "val")


def test_part_of_the_classes_is_taken_with_a_warning(tmp_path, log):
    write.write_image_folder(tmp_path / "imagenet")
    assert [build_dataset("imagenet", tmp_path, split).num_classes for split in ("train", "val")] == [3, 3]
    assert log.text.count("3 class folders, but imagenet as published has 1000") == 1


@pytest.mark.parametrize(
    ("name", "layout"), [("tiny_imagenet", "original"), ("tiny_imagenet", "folder"), ("folder", "")]
)
def test_val_alone_is_enough(tmp_path, tiny_root, name, layout):
    """Its classes are then its own."""
    if layout:
        shutil.copytree(tiny_root[layout][0], tmp_path, dirs_exist_ok=True)
    else:
        write.write_image_folder(tmp_path)
    before = build_dataset(name, tmp_path, "val")
    shutil.rmtree(tmp_path / ("tiny-imagenet-200" if layout else "") / "train")
    alone = build_dataset(name, tmp_path, "val")
    assert alone.classes == [before.classes[i] for i in sorted(set(before.labels.tolist()))]
    for i in range(len(alone)):
        assert alone.path(i) == before.path(i)
        assert alone.classes[alone.labels[i]] == before.classes[before.labels[i]]


def test_val_of_another_data_set_is_not_taken(tmp_path):
    write.write_image_folder(tmp_path)
    write.write_image_folder(tmp_path / "imagenet")
    shutil.rmtree(tmp_path / "imagenet" / "val")
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="imagenet/val"):
        build_dataset("imagenet", tmp_path, "val")


def test_imagenet(tmp_path):
    write.write_imagenet(tmp_path, n_val=5)
    train, val = build_dataset("imagenet", tmp_path, "train"), build_dataset("imagenet", tmp_path, "val")
    assert len(train) == 1000 and train.num_classes == val.num_classes == 1000 and val.classes == train.classes
    assert val.labels.tolist() == [0, 1, 2, 3, 4] and val.classes[4] == "n00000004"
    assert train.load(7)[0].size == (32, 24)


def test_folder(tmp_path):
    written = write.write_image_folder(tmp_path)
    for hidden in (".ipynb_checkpoints/x.jpg", "class_0001/._00004.jpg", "class_0001/notes.txt"):
        (tmp_path / "train" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / hidden).write_text("no image")
    for split in ("train", "val"):
        dataset = build_dataset("folder", tmp_path, split)
        assert isinstance(dataset, FileDataset) and dataset.num_classes == 3
        assert [Path(dataset.path(i)) for i in range(len(dataset))] == written[split][0]
        assert dataset.labels.tolist() == written[split][1].tolist()


def test_folder_val_labels_go_by_name(tmp_path):
    write.write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "val" / "class_0000")
    assert build_dataset("folder", tmp_path, "val").labels.tolist() == [1, 1, 2, 2]


def test_folder_with_unknown_val_class(tmp_path):
    write.write_image_folder(tmp_path)
    (tmp_path / "val" / "class_0001").rename(tmp_path / "val" / "cats")
    with pytest.raises(ValueError, match=r"training images do not have: cats$"):
        build_dataset("folder", tmp_path, "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_folders(tmp_path, split):
    write.write_image_folder(tmp_path)
    for path in (tmp_path / split / "class_0002").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"without images.*class_0002$"):
        build_dataset("folder", tmp_path, split)
    shutil.rmtree(tmp_path / split)
    (tmp_path / split).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"{split} has no class folders"):
        build_dataset("folder", tmp_path, split)


def test_odd_file_names(tmp_path):
    write.write_image_folder(tmp_path, classes=1, per_class=1)
    path = tmp_path / "train" / "class_0000" / "Grüße aus 東京.PNG"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(path)
    dataset = build_dataset("folder", tmp_path, "train")
    assert dataset.path(1) == str(path) and dataset.load(1)[0].getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("content", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"text" * 99])
def test_unreadable_image(tmp_path, content):
    paths, _ = write.write_image_folder(tmp_path)["train"]
    paths[2].write_bytes(content(paths[2].read_bytes()))
    dataset = build_dataset("folder", tmp_path, "train")
    with pytest.raises(DataError, match=f"cannot read image {paths[2]}: .") as error:
        dataset.load(2)
    assert error.value.__cause__ is not None
    dataset.load(3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_image_modes(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 204 * 257, dtype=np.uint16))
    else:
        image = Image.new("RGB", (6, 4), (204, 204, 204)).convert(mode, dither=Image.Dither.NONE)
    image.save(path)
    read = read_image(path)
    assert read.mode == "RGB" and read.size == (6, 4)
    expected = (255,) * 3 if mode == "1" else (204,) * 3
    assert all(abs(a - b) <= 3 for a, b in zip(read.getpixel((5, 3)), expected, strict=True))


def test_sixteen_bits_end_where_eight_do(tmp_path):
    values = np.array([[0, 256, 257, 65534, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 0, 1, 254, 255]


def test_palette_with_transparency_reads_without_a_warning(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (10, 20, 30)


def test_float_images_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="pixel mode F"):
        read_image(tmp_path / "x.tif")


# ---- where the files are looked for


def test_root_argument_environment_and_default(tmp_path, monkeypatch):
    for n, place in enumerate(("argument", "environment", "work/datasets"), start=1):
        write.write_cifar100(tmp_path / place, n_train=n)
    monkeypatch.chdir(tmp_path / "work")
    assert len(build_dataset("cifar100", "")) == 3
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "environment"))
    assert len(build_dataset("cifar100", "")) == 2
    assert len(build_dataset("cifar100", str(tmp_path / "argument"))) == 1


@pytest.mark.parametrize(
    ("name", "writer", "folder"),
    [
        ("cifar100", write.write_cifar100, "cifar-100-python"),
        ("cifar10", write.write_cifar10, "cifar-10-batches-py"),
        ("fashion_mnist", write.write_fashion_mnist, "fashion-mnist"),
        ("tiny_imagenet", write.write_tiny_imagenet, "tiny-imagenet-200"),
        ("imagenet", write.write_imagenet, "imagenet"),
    ],
)
def test_root_may_be_the_folder_itself(tmp_path, name, writer, folder):
    writer(tmp_path)
    outer = build_dataset(name, tmp_path, "val")
    inner = build_dataset(name, tmp_path / folder, "val")
    assert torch.equal(outer.labels, inner.labels)


@pytest.mark.parametrize(
    ("name", "needed", "how"),
    [
        ("cifar100", "cifar-100-python/train", "torchvision.datasets.CIFAR100('{root}', download=True)"),
        ("cifar10", "cifar-10-batches-py/data_batch_1", "torchvision.datasets.CIFAR10('{root}', download=True)"),
        ("tiny_imagenet", "tiny-imagenet-200/train", "tiny-imagenet-200.zip"),
        ("imagenet", "imagenet/train", "image-net.org"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte.gz", "apt-get install dataset-fashion-mnist"),
        ("folder", "train", "{root}/train/<class>/"),
    ],
)
def test_missing_data_says_where_and_how(tmp_path, name, needed, how):
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(name, tmp_path)
    message = str(error.value)
    assert f"{tmp_path}/{needed}" in message and "\n" not in message and how.format(root=tmp_path) in message
    assert "DATASETS.ROOT" in message and "DETECTRON2_DATASETS" in message
