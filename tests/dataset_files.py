"""Write tiny data sets in the files and formats of the real ones.

Every class has its own color under the noise, so that a network can learn from these images. Writers return, for each
split, what they wrote: ``(images, labels)`` arrays where the format keeps pixels, ``(paths, labels)`` where it is JPEG.
"""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def class_labels(n: int, num_classes: int) -> np.ndarray:
    """(n,) int64 labels 0, 1, 2, ... : as many classes as n allows, then all of them equally often."""
    return np.arange(n) % num_classes


def class_images(labels: np.ndarray, height: int, width: int, seed: int = 0) -> np.ndarray:
    """(n, 3, height, width) uint8: a color per label plus noise, different for every image."""
    colors = np.random.default_rng(0).integers(40, 216, (int(max(labels, default=0)) + 1, 3, 1, 1))
    noise = np.random.default_rng([1, seed]).integers(-40, 40, (len(labels), 3, height, width))
    return (colors[labels] + noise).astype(np.uint8)


def write_pickle(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def _write_cifar_batch(path: Path, keys: dict[str, str], labels: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    images = class_images(labels, 32, 32, seed)
    entries = {
        "filenames": [f"image_{i}.png".encode() for i in range(len(labels))],
        "batch_label": f"tiny {path.name}".encode(),
        keys["labels"]: [int(label) for label in labels],
        "data": images.reshape(len(labels), 3072),
    }
    if "coarse" in keys:
        entries[keys["coarse"]] = [int(label) // 5 for label in labels]
    write_pickle(path, {key.encode(): value for key, value in entries.items()})
    return images, labels


def write_cifar100(
    root: str | Path, n_train: int = 32, n_test: int = 16, num_classes: int = 100
) -> dict[str, tuple[np.ndarray, ...]]:
    """``root/cifar-100-python`` with labels in 0..num_classes-1 (there are always 100 class names)."""
    folder = Path(root, "cifar-100-python")
    keys = {"labels": "fine_labels", "coarse": "coarse_labels"}
    written = {
        "train": _write_cifar_batch(folder / "train", keys, class_labels(n_train, num_classes), seed=1),
        "val": _write_cifar_batch(folder / "test", keys, class_labels(n_test, num_classes), seed=2),
    }
    names = {b"fine_label_names": [b"fine_%d" % i for i in range(100)], b"coarse_label_names": [b"coarse"] * 20}
    write_pickle(folder / "meta", names)
    return written


def write_cifar10(
    root: str | Path, n_train: int = 30, n_test: int = 10, batches: int = 5
) -> dict[str, tuple[np.ndarray, ...]]:
    """``root/cifar-10-batches-py`` with the n_train images spread over ``batches`` files."""
    folder = Path(root, "cifar-10-batches-py")
    keys = {"labels": "labels"}
    chunks = np.array_split(class_labels(n_train, 10), batches)
    train = [_write_cifar_batch(folder / f"data_batch_{i}", keys, chunk, i) for i, chunk in enumerate(chunks, start=1)]
    val = _write_cifar_batch(folder / "test_batch", keys, class_labels(n_test, 10), seed=9)
    write_pickle(folder / "batches.meta", {b"label_names": [b"name_%d" % i for i in range(10)]})
    return {"train": tuple(np.concatenate(arrays) for arrays in zip(*train, strict=True)), "val": val}


def _save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(path, format="JPEG", quality=95)
    return path


def write_tiny_imagenet(
    root: str | Path, layout: str = "original", n_train: int = 200, n_val: int = 16
) -> dict[str, tuple[list[Path], np.ndarray]]:
    """``root/tiny-imagenet-200`` with its 200 classes, so n_train is 200 or more.

    Args:
        layout: "original" as published, "folder" with every image in ``<split>/<wnid>/``.
    """
    folder = Path(root, "tiny-imagenet-200")
    # Neither sorted nor contiguous, as the published wnids.txt.
    wnids = [f"n{(i * 7919) % 100003:08d}" for i in range(200)]
    order = sorted(wnids)
    train_labels, val_labels = class_labels(n_train, 200), class_labels(n_val, 200)[::-1].copy()
    images = {"train": class_images(train_labels, 64, 64, 1), "val": class_images(val_labels, 64, 64, 2)}
    original = layout == "original"
    train, val, annotations = [], [], []
    for i, (label, image) in enumerate(zip(train_labels, images["train"], strict=True)):
        wnid = order[label]
        train.append(_save(folder / "train" / wnid / ("images" if original else ".") / f"{wnid}_{i}.JPEG", image))
    for i, (label, image) in enumerate(zip(val_labels, images["val"], strict=True)):
        name = f"val_{i}.JPEG"
        val.append(_save(folder / "val" / ("images" if original else order[label]) / name, image))
        annotations.append(f"{name}\t{order[label]}\t0\t0\t62\t62\n")
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    if original:
        (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
        for wnid in wnids:
            (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    return {"train": (train, train_labels), "val": (val, val_labels)}


def write_image_folder(
    root: str | Path, classes: int = 3, per_class: int = 4, size: tuple[int, int] = (40, 56), val_per_class: int = 2
) -> dict[str, tuple[list[Path], np.ndarray]]:
    """``root/{train,val}/class_<i>/*.jpg`` of ``size`` (height, width)."""
    written = {}
    for seed, (split, n) in enumerate((("train", per_class), ("val", val_per_class))):
        labels = np.repeat(np.arange(classes), n)
        images = class_images(labels, *size, seed)
        paths = [
            _save(Path(root, split, f"class_{label:04d}", f"{i:05d}.jpg"), image)
            for i, (label, image) in enumerate(zip(labels, images, strict=True))
        ]
        written[split] = (paths, labels)
    return written


def write_imagenet(root: str | Path, per_class: int = 1, size: tuple[int, int] = (24, 32), n_val: int = 16) -> None:
    """``root/imagenet`` with its 1,000 class folders; one JPEG per color is stored many times, which is quick."""
    colors = class_images(np.arange(10), *size)
    for split, labels in (("train", np.repeat(np.arange(1000), per_class)), ("val", np.arange(n_val) % 1000)):
        for i, label in enumerate(labels):
            path = Path(root, "imagenet", split, f"n{label:08d}", f"{i:06d}.JPEG")
            first = Path(root, "imagenet", f"color_{label % 10}.JPEG")
            if not first.exists():
                _save(first, colors[label % 10])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(first.read_bytes())


def write_idx(path: Path, array: np.ndarray) -> None:
    """An idx file of unsigned bytes, gzipped if ``path`` ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(f">{array.ndim + 1}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_fashion_mnist(
    root: str | Path, n_train: int = 30, n_test: int = 10, folder: str = "fashion-mnist", suffix: str = ".gz"
) -> dict[str, tuple[np.ndarray, ...]]:
    """``root/folder/*-ubyte`` + suffix (".gz" or ""); images are (n, 28, 28) uint8."""
    written = {}
    for seed, (split, prefix, n) in enumerate((("train", "train", n_train), ("val", "t10k", n_test))):
        labels = class_labels(n, 10)
        images = class_images(labels, 28, 28, seed)[:, 0]
        write_idx(Path(root, folder, f"{prefix}-images-idx3-ubyte{suffix}"), images)
        write_idx(Path(root, folder, f"{prefix}-labels-idx1-ubyte{suffix}"), labels)
        written[split] = (images, labels)
    return written
