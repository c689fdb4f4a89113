"""A user's own folder of images: which files are read and how, the order of classes, parts of one folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d2distill.classification.config import get_cfg, load_cfg
from d2distill.classification.data import build_dataset, read_image
from d2distill.classification.data.augment import AugmentedDataset, eval_transform
from d2distill.classification.data.describe import describe_dataset
from d2distill.classification.data.loader import EpochBatchSampler, build_test_loader, build_train_loader
from d2distill.classification.data.splits import load_splits, load_test_set, read_class_names, split_positions
from d2distill.classification.data.unreadable import UnreadableImages
from d2distill.classification.deployed import Preprocess
from d2distill.classification.evaluation import AccuracyEvaluator
from d2distill.classification.trainer import build_trainer, evaluate, load_datasets, train
from d2distill.common.errors import ConfigError, DataError
from d2distill.deployed import load
from tests.dataset_files import write_image_folder

CLASSES = ["class_0000", "class_0001", "class_0002"]


def make_cfg(root, *opts, name="folder"):
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.NAME", name, "DATASETS.ROOT", str(root), "MODEL.DEVICE", "cpu", *opts])
    return cfg


def flat_folder(root, counts):
    """ROOT/<class>/<number>.png, each image of a color of its own."""
    for label, count in enumerate(counts):
        for number in range(count):
            path = Path(root, f"class_{label:04d}", f"{number:03d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (label, number, 0)).save(path)


def colors(dataset):
    """(class, number) of each image of `flat_folder`, from its pixels."""
    return {dataset.load(i)[0].getpixel((0, 0))[:2] for i in range(len(dataset))}


# ---- which files are read


def test_every_ending_that_pillow_opens_is_read(tmp_path):
    images = [Image.new("RGB", (6, 4), color) for color in ((200, 0, 0), (0, 0, 200))]
    folder = tmp_path / "train" / "cats"
    folder.mkdir(parents=True)
    endings = [
        "jfif",
        "jpe",
        "tif",
        "webp",
        "BMP",
        "tga",
        *(["avif"] if ".avif" in Image.registered_extensions() else []),
    ]
    for ending in endings:
        kind = {"jfif": "JPEG", "jpe": "JPEG"}.get(ending)
        images[0].save(folder / f"a.{ending}", format=kind)
    images[0].save(folder / "b.gif", save_all=True, append_images=images[1:])
    dataset = build_dataset("folder", tmp_path, "train")
    assert len(dataset) == len(endings) + 1 and not dataset.passed_over
    for index in range(len(dataset)):
        image, _ = dataset.load(index)
        assert image.mode == "RGB" and image.size == (6, 4), dataset.path(index)
        # Of the GIF's two frames the first.
        assert np.abs(np.subtract(image.getpixel((3, 2)), (200, 0, 0))).max() <= 12, dataset.path(index)


def test_links_in_a_circle_are_passed_over(tmp_path):
    """Links to other folders are followed, as torchvision's ImageFolder does."""
    flat_folder(tmp_path / "train", [2, 1])
    flat_folder(tmp_path / "more", [0, 0, 3])
    first, second = (tmp_path / "train" / name for name in CLASSES[:2])
    for number in range(3):  # one is passed 40 times, and of three 3**40 paths lead to the images
        (first / f"self{number}").symlink_to(first)
    (first / "above").symlink_to(tmp_path)
    (first / "other").symlink_to(second)
    (second / "back").symlink_to(first)
    (second / "more").symlink_to(tmp_path / "more")
    dataset = build_dataset("folder", tmp_path, "train")
    assert dataset.samples_per_class() == [2 + 1 + 3, 1 + 3 + 2]
    assert dataset.passed_over["link to a folder above it"][0] == 5 + 5
    (tmp_path / "train" / "loop").symlink_to(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"class folders without images that Pillow opens: loop; .* link to a "):
        build_dataset("folder", tmp_path, "train")


def test_a_pipe_is_no_image(tmp_path):
    flat_folder(tmp_path / "train", [1])
    os.mkfifo(tmp_path / "train" / "class_0000" / "pipe.png")
    dataset = build_dataset("folder", tmp_path, "train")
    with pytest.raises(DataError, match=r"cannot read image .*/pipe\.png: .* is no regular file"):
        dataset.load(1)
    for value in (str(tmp_path / "train" / "class_0000" / "pipe.png"), "/dev/zero"):
        with pytest.raises(ConfigError, match=f"DATASETS.CLASSES {value} is no list of names, and no text file"):
            read_class_names(value)


def test_other_files_are_counted(tmp_path):
    write_image_folder(tmp_path)
    folder = tmp_path / "train" / "class_0001"
    for name in ("a.HEIC", "b.heic", "clip.mpg", "notes", "._00000.jpg", ".DS_Store", "Thumbs.db"):
        (folder / name).write_text("no image")
    train, val = (build_dataset("folder", tmp_path, split) for split in ("train", "val"))
    assert len(train) == 12 and val.passed_over == {}
    assert {kind: count for kind, (count, _) in train.passed_over.items()} == {
        ".heic": 2, ".mpg": 1, "no ending": 1, "hidden": 3,
    }  # fmt: skip
    lines = describe_dataset({"training": train, "test": val})
    assert lines[0] == "Data set folder, 3 classes in this order: class_0000, class_0001, class_0002"
    assert lines[1:3] == [
        "12 training images: class_0000 4, class_0001 4, class_0002 4",
        "6 test images: class_0000 2, class_0001 2, class_0002 2",
    ]
    (line,) = lines[3:]
    assert f"2 .heic (e.g. {folder}/a.HEIC)" in line and "3 hidden (e.g. " in line


def test_a_class_without_readable_endings_says_which_are_there(tmp_path):
    write_image_folder(tmp_path)
    for path in (tmp_path / "train" / "class_0002").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(FileNotFoundError, match=r"Pillow opens: class_0002; .* there: \.heic$"):
        build_dataset("folder", tmp_path, "train")


def test_many_classes_are_described_in_short(tmp_path):
    flat_folder(tmp_path, [1 + (label == 7) for label in range(25)])
    lines = describe_dataset({"training": build_dataset("folder", tmp_path, "train")})
    assert lines[0].endswith("class_0018, class_0019 and 5 more")
    assert lines[1] == "26 training images: 1 (class_0000) to 2 (class_0007) per class"


# ---- how they are read


def test_exif_orientation_is_a_setting(tmp_path):
    write_image_folder(tmp_path, classes=1, per_class=1, val_per_class=1)
    image = Image.new("RGB", (6, 4), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    for split in ("train", "val"):
        image.save(tmp_path / split / "class_0000" / "0.png", exif=exif)
    for dataset in load_splits(make_cfg(tmp_path)):
        read = dataset.load(0)[0]
        assert read.size == (6, 4) and read.getpixel((0, 0)) == (255, 255, 255)
    for dataset in load_splits(make_cfg(tmp_path, "INPUT.EXIF_ORIENTATION", True)):
        read = dataset.load(0)[0]
        assert read.size == (4, 6) and read.getpixel((3, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "val" / "class_0000" / "0.png", exif_orientation=True).size == (4, 6)


def test_the_range_of_16_bits_is_a_setting(tmp_path):
    folder = tmp_path / "val" / "class_0000"
    folder.mkdir(parents=True)
    Image.fromarray(np.array([[0, 99, 100, 2097, 4095, 60000]], dtype=np.uint16)).save(folder / "0.tif")
    (dataset,) = [load_test_set(make_cfg(tmp_path, "INPUT.RANGE_16BIT", "[100, 4095]"))]
    assert np.asarray(dataset.load(0)[0])[0, :, 0].tolist() == [0, 0, 0, 127, 255, 255]
    assert np.asarray(read_image(folder / "0.tif"))[0, :, 0].tolist() == [0, 0, 0, 8, 15, 233]


def test_every_16_bit_value_is_the_quotient_by_257(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png"))[..., 0], values // 257)


def test_32_bits_are_read_in_a_range_of_their_own(tmp_path):
    Image.fromarray(np.array([[-1.0, 0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tif")
    Image.fromarray(np.array([[0, 1000, 2000]], dtype=np.int32)).save(tmp_path / "i.tif")
    assert np.asarray(read_image(tmp_path / "f.tif", range_16bit=(0, 1)))[0, :, 0].tolist() == [0, 0, 127, 255]
    assert np.asarray(read_image(tmp_path / "i.tif", range_16bit=(0, 2000)))[0, :, 0].tolist() == [0, 127, 255]
    with pytest.raises(DataError, match=r"pixel mode I .* set INPUT\.RANGE_16BIT"):
        read_image(tmp_path / "i.tif")


# ---- the order of classes

ORDER = ["class_0002", "class_0000", "class_0001"]


@pytest.mark.parametrize("form", ["list", "text", "json", "positions", "student"])
def test_the_order_of_classes_is_that_of_the_setting(tmp_path, form):
    write_image_folder(tmp_path / "data")
    content = {
        "text": "\n".join(ORDER) + "\n\n", "json": json.dumps(ORDER), "student": json.dumps({"classes": ORDER}),
        "positions": json.dumps({name: place for place, name in enumerate(ORDER)}),
    }  # fmt: skip
    if form != "list":
        (tmp_path / ("names.txt" if form == "text" else "names.json")).write_text(content[form])
    value = {"list": ORDER, "text": "names.txt"}.get(form, "names.json")
    # A file is looked for beside the YAML, and its names are in the run folder's copy.
    config = (
        f"MODEL: {{STUDENT: {{NAME: resnet8}}}}\nDATASETS: {{NAME: folder, ROOT: {tmp_path}/data, CLASSES: {value}}}"
    )
    (tmp_path / "own.yaml").write_text(config)
    cfg = load_cfg(str(tmp_path / "own.yaml"))
    assert cfg.DATASETS.CLASSES == ORDER
    for dataset, plain in zip(load_splits(cfg), load_splits(make_cfg(tmp_path / "data")), strict=True):
        assert dataset.classes == ORDER and dataset.num_classes == 3
        for index in (0, len(dataset) - 1):
            image, label = dataset.load(index)
            assert Path(dataset.path(index)).parent.name == ORDER[label] and label == dataset.labels[index]
            assert image.tobytes() == plain.load(index)[0].tobytes()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["class_0000", "class_0001"], "it lacks class_0002; those that are not there: none"),
        ([*CLASSES, "cats"], "it lacks none; those that are not there: cats"),
        (["class_0000", "class_0001", "class_2"], "it lacks class_0002; those that are not there: class_2"),
        ([*CLASSES, "class_0000"], "names a class twice: class_0000"),
        ("none.txt", "none.txt is no list of names, and no text file"),
    ],
)
def test_names_that_are_not_the_class_folders(tmp_path, names, message):
    write_image_folder(tmp_path)
    with pytest.raises(ConfigError, match=f"DATASETS.CLASSES .*{message}"):
        load_splits(make_cfg(tmp_path, "DATASETS.CLASSES", names))


@pytest.mark.parametrize(
    "content", ['{"a": 0, "b": 2}', '{"classes": [1, 2]}', "[", "3", pytest.param("[" * 100_000, id="deep")]
)
def test_json_of_something_else_is_no_list_of_names(tmp_path, content):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ConfigError, match=r"DATASETS\.CLASSES .*names\.json: no list of names"):
        load_test_set(make_cfg(tmp_path, "DATASETS.CLASSES", str(tmp_path / "names.json")))


def test_test_images_of_some_classes_keep_the_order_of_all(tmp_path):
    """Test images alone do not show how many classes a student has."""
    write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "train")
    shutil.rmtree(tmp_path / "val" / "class_0001")
    assert load_test_set(make_cfg(tmp_path)).labels.tolist() == [0, 0, 1, 1]
    dataset = load_test_set(make_cfg(tmp_path, "DATASETS.CLASSES", CLASSES))
    assert dataset.labels.tolist() == [0, 0, 2, 2] and dataset.num_classes == 3


def test_data_sets_in_memory_have_an_order_too(tmp_path):
    names = list("9876543210")
    _, dataset = load_splits(make_cfg("", "DATASETS.CLASSES", names, name="digits"))
    plain = build_dataset("digits", split="val")
    image, label = dataset.load(3)
    assert names[label] == plain.classes[plain.labels[3]] and torch.equal(image, plain.load(3)[0])


# ---- one folder without a split


def test_one_folder_is_divided_class_by_class(tmp_path, log):
    flat_folder(tmp_path, [10, 5, 2, 1])
    cfg = make_cfg(tmp_path, "DATASETS.VAL_FRACTION", 0.2, "SEED", 7)
    train_set, val_set = load_splits(cfg)
    # At least one of two, and none of one.
    assert train_set.samples_per_class() == [8, 4, 1, 1] and val_set.samples_per_class() == [2, 1, 1, 0]
    assert len(colors(train_set) | colors(val_set)) == 18 and not colors(train_set) & colors(val_set)
    assert "4 of the 18 training images are set apart" in log.text
    assert colors(load_test_set(cfg)) == colors(val_set)
    # Of a student of another seed and another order of classes the test images are the same ones.
    other = ["SEED", 8, "DATASETS.CLASSES", [f"class_{label:04d}" for label in (3, 1, 0, 2)]]
    reordered = load_splits(make_cfg(tmp_path, "DATASETS.VAL_FRACTION", 0.2, *other))[1]
    assert colors(reordered) == colors(val_set) and reordered.samples_per_class() == [0, 1, 2, 1]
    drawn = [load_test_set(make_cfg(tmp_path, "DATASETS.VAL_FRACTION", 0.2, "DATASETS.SPLIT_SEED", s)) for s in (1, 2)]
    assert len({frozenset(colors(dataset)) for dataset in (*drawn, val_set)}) == 3


def test_one_folder_without_a_fraction_names_the_way_out(tmp_path):
    flat_folder(tmp_path, [2, 2])
    with pytest.raises(DataError, match=r"neither train nor val: set DATASETS\.VAL_FRACTION, e\.g\. to 0\.2"):
        load_splits(make_cfg(tmp_path))


def test_a_fraction_leaves_the_own_test_images_alone():
    whole, (train_set, val_set) = build_dataset("digits"), load_splits(
        make_cfg("", "DATASETS.VAL_FRACTION", 0.1, name="digits")
    )  # fmt: skip
    assert len(train_set) + len(val_set) == 1297
    assert val_set.samples_per_class() == [round(0.1 * count) for count in whole.samples_per_class()]
    for index in (0, len(val_set) - 1):
        assert torch.equal(val_set.load(index)[0], whole.load(int(val_set.positions[index]))[0])


def test_no_share_is_too_large(tmp_path):
    flat_folder(tmp_path, [3, 2])
    training, validation = split_positions(build_dataset("folder", tmp_path, "train"), 0.99, 0)
    assert len(training) == 2 and len(validation) == 3


# ---- unreadable images


@pytest.fixture
def broken(tmp_path):
    """A folder of 12 + 6 images; 4, 5 and the last of the training and the first of the test ones cannot be read."""
    written = write_image_folder(tmp_path / "data")
    paths = [written["train"][0][i] for i in (4, 5, 11)] + [written["val"][0][0]]
    for path in paths:
        path.write_bytes(b"no image")
    return tmp_path / "data", paths


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_takes_the_place_of_an_unreadable_one(broken, workers, log):
    root, paths = broken
    dataset = build_dataset("folder", root, "train")
    unreadable = UnreadableImages()
    sampler = EpochBatchSampler(12, 5, 2, seed=1, start=2)
    batches = list(build_train_loader(dataset, sampler, 32, "crop_flip", workers, unreadable))
    expected = [{4: 6, 5: 6, 11: 0}.get(index, index) for keys in sampler for _, index in keys]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == expected
    # It is that image as it would be itself in this epoch, so that a resumed run sees the same.
    sample = AugmentedDataset(dataset, 32, 1, "crop_flip")[2, 6]
    last = [
        (batch["image"][i], batch["label"][i]) for batch in batches[1:] for i in (batch["index"] == 6).nonzero()[:, 0]
    ]
    assert len(last) == 3 and all(torch.equal(image, sample["image"]) and label == 1 for image, label in last)
    assert [sum(f"cannot read image {path}: " in error for error in unreadable.errors) for path in paths] == [
        1,
        1,
        1,
        0,
    ]
    assert log.text.count("DATALOADER.ON_ERROR skip: cannot read image") == 3


@pytest.mark.parametrize("batch_size", [1, 4])
def test_unreadable_test_images_are_left_out(broken, batch_size):
    dataset = build_dataset("folder", broken[0], "val")
    batches = list(build_test_loader(dataset, batch_size, 32, 0, UnreadableImages()))
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [1, 2, 3, 4, 5]


def test_nothing_readable_is_an_error(tmp_path):
    for path in write_image_folder(tmp_path, classes=1, per_class=2, val_per_class=1)["train"][0]:
        path.write_bytes(b"no image")
    sampler = EpochBatchSampler(2, 2, 1, seed=0)
    dataset = build_dataset("folder", tmp_path, "train")
    with pytest.raises(DataError, match=r"none of the 2 training images can be read; the first: cannot read .*\.jpg"):
        list(build_train_loader(dataset, sampler, 32, "none", 0, UnreadableImages()))
    evaluator = AccuracyEvaluator()
    evaluator.reset()
    with pytest.raises(DataError, match="no test image can be read"):
        evaluator.evaluate()


def small_run(root, folder, *opts):
    return load_cfg("", [
        "DATASETS.NAME", "folder", "DATASETS.ROOT", str(root), "OUTPUT_DIR", str(folder), "MODEL.STUDENT.NAME",
        "cifar/resnet8", "INPUT.SIZE", 32, "SOLVER.EPOCHS", 2, "SOLVER.STEPS", [], "SOLVER.IMS_PER_BATCH", 6,
        "SOLVER.BASE_LR", 0.01, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", *opts,
    ])  # fmt: skip


def test_a_run_skips_and_lists_them(broken, tmp_path, log):
    root, paths = broken
    with pytest.raises(DataError, match="cannot read image"):
        train(small_run(root, tmp_path / "run"))
    results = train(small_run(root, tmp_path / "run", "DATALOADER.ON_ERROR", "skip"))
    listed = (tmp_path / "run" / "unreadable.txt").read_text()
    assert len(listed.splitlines()) == 4 and all(f"read image {path}: " in listed for path in paths)
    assert log.text.count("12 training images: class_0000 4, class_0001 4") == 2, "at the start of each of two runs"
    assert log.text.count("ON_ERROR skip: cannot read image") == 4 and log.text.count("4 images cannot be read") == 1
    assert results["top1"] in [pytest.approx(100 * hits / 5) for hits in range(6)], "of five test images"
    opts = ["DATALOADER.ON_ERROR", "skip", "MODEL.STUDENT.WEIGHTS", str(tmp_path / "run" / "student_final.pth")]
    assert evaluate(small_run(root, tmp_path / "run", *opts))["top1"] == results["top1"]
    assert "1 images cannot be read" in log.text


def test_names_can_forge_nothing_and_lose_nothing(tmp_path, capsys):
    names = ["a\n\x1b[31mred\u202e", os.fsdecode(b"caf\xe9")]
    shown = [r"a\n\x1b[31mred\u202e", r"caf\udce9"]
    write_image_folder(tmp_path / "data", classes=2, per_class=2, val_per_class=1)
    for split in ("train", "val"):
        for number, name in enumerate(names):
            (tmp_path / "data" / split / f"class_{number:04d}").rename(tmp_path / "data" / split / name)
    run = tmp_path / "run"
    train(small_run(tmp_path / "data", run, "SOLVER.EPOCHS", 1))
    for text in (capsys.readouterr().out, (run / "log.txt").read_text()):
        assert f"4 training images: {shown[0]} 2, {shown[1]} 2" in text and "\x1b[31mred" not in text
    assert json.loads((run / "student.json").read_text())["classes"] == names
    assert shown[1] in (run / "confusion.csv").read_text()
    assert load(run).classes == names


def test_a_deployed_student_reads_images_as_its_training_did(tmp_path):
    write_image_folder(tmp_path / "data")
    exif, path = Image.Exif(), tmp_path / "turned.png"
    exif[0x0112] = 6
    Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)).save(path, exif=exif)
    cfg = small_run(tmp_path / "data", tmp_path, "INPUT.EXIF_ORIENTATION", True, "INPUT.RANGE_16BIT", [0, 1600])
    description = build_trainer(cfg, *load_datasets(cfg)).task.description()
    preprocess = Preprocess(**json.loads(json.dumps(description["preprocess"])))
    read = read_image(path, exif_orientation=True, range_16bit=(0, 1600))
    assert read.getpixel((39, 0)) == (0, 0, 0) and read.getpixel((0, 39)) > (250, 250, 250)
    with Image.open(path) as image:
        assert torch.equal(preprocess.pixels(image), preprocess.pixels(path))
    assert torch.equal(preprocess.pixels(path), eval_transform(read, preprocess.fit))
    assert description["multi_label"] is False


def test_the_main_process_lists_those_of_all_ranks(tmp_path, monkeypatch, log):
    (tmp_path / "unreadable.txt").write_text("a before the run was resumed\n")
    unreadable = UnreadableImages(str(tmp_path))
    unreadable.add("b of this rank")
    gather = "d2distill.classification.data.unreadable.comm.gather"
    monkeypatch.setattr(gather, lambda own: [own, ["b of this rank", "c of another"]])
    for _ in range(2):
        unreadable.summarize()
    names = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert names == ["a before the run was resumed", "b of this rank", "c of another"]
    assert log.text.count("skip: c of another") == log.text.count("3 images cannot be read") == 1
    assert "skip: a before" not in log.text
