"""Order and content of detection batches: a function of (seed, step) for any number of workers, processes, restarts."""

import multiprocessing
import random
import re
from itertools import chain, islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.samplers import TrainingSampler
from PIL import Image

from d2distill.common.engine.seeding import seed_step
from d2distill.common.errors import ConfigError, DataError
from d2distill.detection.config import get_cfg
from d2distill.detection.data import build_test_loader, build_train_loader, load_training_set
from d2distill.detection.data.loader import MappedImages
from d2distill.detection.data.sampling import TrainBatchSampler, build_batch_sampler
from d2distill.detection.deployed import Preprocess

SHAPES = [(8, 6), (6, 8), (7, 7), (9, 5), (5, 9), (8, 6), (8, 7)]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (8, 16)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    return cfg


def image(folder, number, width=16, height=12, annotations=()):
    path = folder / f"{number}.png"
    Image.new("RGB", (width, height), (number * 10, 0, 0)).save(path)
    size = {"width": width, "height": height}
    return {"file_name": str(path), "image_id": number, **size, "annotations": list(annotations)}


def box(*numbers, **more):
    return {"bbox": list(numbers), "bbox_mode": 1, "category_id": 0, "iscrowd": 0, **more}  # 1: x, y, width, height


def take(loader, number):
    return list(islice(loader, number))


def processes(monkeypatch, rank, size):
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: size)


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert [x["image_id"] for x in a] == [x["image_id"] for x in b]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b, strict=True))
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)
            assert torch.equal(x["instances"].gt_classes, y["instances"].gt_classes)


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_any_start_gives_the_tail(cfg, sampler, grouping):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    dicts = [{"width": 2 + i % 3, "height": 3, "annotations": [{"category_id": i % 5}]} for i in range(20)]
    whole = take(build_batch_sampler(cfg, dicts), 40)
    for start in (0, 1, 7, 30):
        assert take(build_batch_sampler(cfg, dicts, start), 40 - start) == whole[start:]
    assert [position for batch in whole for position, _ in batch] == list(range(160))
    cfg.SEED = 1
    assert take(build_batch_sampler(cfg, dicts), 40) != whole


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("TrainingSampler", [[6, 0, 3, 5], [4, 1, 1, 4], [5, 3, 0, 6]]),
        ("RepeatFactorTrainingSampler", [[5, 5, 6, 6], [1, 2, 2, 2], [5, 3, 0, 0]]),
        ("RandomSubsetTrainingSampler", [[0, 5, 5, 0], [3, 0, 3, 5], [2, 4, 2, 4]]),
    ],
)
def test_order_of_published_runs(cfg, sampler, expected):
    """Runs of older versions resume in the order in which they began: third to fifth batch of seed 0."""
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.9, 0.8
    dicts = [{"width": w, "height": h, "annotations": [{"category_id": i % 3}]} for i, (w, h) in enumerate(SHAPES)]
    batches = take(build_batch_sampler(cfg, dicts, start=2), 3)
    assert [[index for _, index in batch] for batch in batches] == expected


def test_augmentation_of_published_runs(cfg, tmp_path):
    images = MappedImages([{}], lambda _: (random.random(), np.random.rand(), float(torch.rand(()))), seed=3)
    assert images[7, 0] == (0.4247647858121808, 0.8258057074179067, 0.6736271977424622)
    cfg.INPUT.CROP.ENABLED = True
    dicts = [image(tmp_path, n, annotations=[box(1, 2, 9, 7)]) for n in range(3)]
    (batch,) = take(build_train_loader(cfg, dicts, start=3), 1)
    assert [
        (x["image_id"], tuple(x["image"].shape[1:]), x["instances"].gt_boxes.tensor.round().int().tolist()[0])
        for x in batch
    ] == [
        (1, (16, 23), [9, 1, 22, 11]),
        (2, (8, 10), [4, 1, 10, 6]),
        (0, (16, 22), [9, 1, 22, 11]),
        (2, (16, 22), [9, 1, 22, 11]),
    ]


def test_processes_share_the_same_global_batches(cfg, monkeypatch):
    dicts = [{"width": w, "height": h} for w, h in SHAPES]
    whole = take(build_batch_sampler(cfg, dicts), 12)
    for size in (2, 4):
        parts = []
        for rank in range(size):
            processes(monkeypatch, rank, size)
            parts.append(take(build_batch_sampler(cfg, dicts), 12))
        assert [sorted(chain(*part)) for part in zip(*parts, strict=True)] == whole
    processes(monkeypatch, 0, 3)
    with pytest.raises(ConfigError, match=r"SOLVER.IMS_PER_BATCH is 4, but must be a multiple .* 3"):
        build_batch_sampler(cfg, dicts)


def test_grouping_keeps_wide_and_tall_apart_and_loses_nothing(cfg):
    dicts = [{"width": w, "height": h} for w, h in SHAPES]
    batches = [[index for _, index in batch] for batch in take(build_batch_sampler(cfg, dicts), 700)]
    for batch in batches:
        assert len(batch) == 4 and len({SHAPES[index][0] > SHAPES[index][1] for index in batch}) == 1
    counts = np.bincount(np.concatenate(batches))
    assert counts.min() >= counts.max() - 4
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    mixed = [[index for _, index in batch] for batch in take(build_batch_sampler(cfg, dicts), 20)]
    assert any(len({SHAPES[index][0] > SHAPES[index][1] for index in batch}) == 2 for batch in mixed)


def test_many_steps_are_passed_over_without_reading_an_image():
    sampler = TrainBatchSampler(TrainingSampler(1000, seed=0), 16, groups=[i % 2 for i in range(1000)], start=50_000)
    assert [position for position, _ in next(iter(sampler))] == list(range(800_000, 800_016))


def test_a_sampler_that_is_not_supported(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    with pytest.raises(ConfigError, match=r"SAMPLER_TRAIN is WeightedTrainingSampler, but must be TrainingSampler, "):
        build_batch_sampler(cfg, [{"width": 1, "height": 1}] * 2)


@pytest.mark.parametrize("crop", [False, True])
def test_batches_are_the_same_whatever_the_workers_and_the_start(digits_cfg, crop):
    digits_cfg.INPUT.CROP.ENABLED = crop
    dicts = load_training_set(digits_cfg)
    whole = take(build_train_loader(digits_cfg, dicts), 6)
    assert len({x["image"].shape for batch in whole for x in batch}) > 5
    digits_cfg.DATALOADER.NUM_WORKERS = 2
    assert_same(take(build_train_loader(digits_cfg, dicts), 6), whole)
    digits_cfg.DATALOADER.NUM_WORKERS = 0
    assert_same(take(build_train_loader(digits_cfg, dicts, start=4), 2), whole[4:])
    digits_cfg.SEED = 1
    other = take(build_train_loader(digits_cfg, dicts), 1)
    assert [x["image_id"] for x in other[0]] != [x["image_id"] for x in whole[0]]


def test_images_are_augmented_alike_in_any_number_of_processes(digits_cfg, monkeypatch):
    dicts = load_training_set(digits_cfg)
    whole = take(build_train_loader(digits_cfg, dicts), 2)
    for rank in range(2):
        processes(monkeypatch, rank, 2)
        assert_same(take(build_train_loader(digits_cfg, dicts), 2), [batch[rank::2] for batch in whole])


def test_the_same_image_is_augmented_anew_each_time(cfg, tmp_path):
    seen = [x["image"].shape for batch in take(build_train_loader(cfg, [image(tmp_path, 1)]), 5) for x in batch]
    assert len(set(seen)) == 2


def test_generators_are_seeded_by_position_and_restored():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    images = MappedImages([{}] * 3, lambda _: draw(), seed=0)
    draws = [images[position, 0] for position in range(6)]
    assert draw() == expected
    assert len(set(chain(*draws))) == 18
    assert images[5, 1] == draws[5] != MappedImages([{}], lambda _: draw(), seed=1)[5, 0]
    # The stream is not that of the training step.
    seed_step(0, 5)
    assert torch.rand(()).item() != draws[5][2]


def test_the_generators_of_gpus_are_left_alone(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("nothing would restore them"))
    assert take(build_train_loader(cfg, [image(tmp_path, 1)]), 1)


def test_images_with_nothing_to_find_flow_through(cfg, tmp_path):
    dicts = [
        image(tmp_path, 0),
        image(tmp_path, 1, annotations=[box(0, 0, 9, 9, iscrowd=1)]),
        image(tmp_path, 2, annotations=[box(3, 3, 0, 0), box(5, 5, 4, 0), box(90, 90, 5, 5)]),
        image(tmp_path, 3, annotations=[box(1, 1, 5, 5)]),
    ]
    found = {x["image_id"]: len(x["instances"]) for b in take(build_train_loader(cfg, dicts), 6) for x in b}
    assert found == {0: 0, 1: 0, 2: 0, 3: 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "No such file"),
        ("empty", "cannot identify image file"),
        ("truncated", "truncated"),
    ],
)
def test_an_image_that_cannot_be_used(cfg, tmp_path, damage, message, workers):
    record = image(tmp_path, 1)
    path = tmp_path / "1.png"
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        Image.effect_noise((16, 12), 50).save(path)
        path.write_bytes(path.read_bytes()[:-60])
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(DataError) as error:
        next(iter(build_train_loader(cfg, [record])))
    assert not multiprocessing.active_children()
    text = str(error.value)
    assert text.startswith(f"cannot use image {path}: ") and re.search(message, text) and "Restore the file" in text
    assert "Traceback" not in text and "\n" not in text


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("training", [True, False])
def test_gray_pixels_of_more_than_8_bits_are_refused(cfg, tmp_path, mode, training):
    """Pillow makes those of 16 bits white, in training and in whatever uses the student."""
    pixels = np.linspace(0, 65535, 16 * 12).reshape(12, 16)
    path = tmp_path / "deep.tif"
    Image.fromarray(pixels.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(path)
    record = {**image(tmp_path, 1), "file_name": str(path)}
    message = rf"^image {path} has gray pixels of more than 8 bits \(mode {mode}\), .* convert it to 8 bits$"
    build = build_train_loader if training else lambda cfg, dicts: build_test_loader(cfg, "none", dicts)
    with pytest.raises(DataError, match=message):
        next(iter(build(cfg, [record])))
    with pytest.raises(DataError, match=message):
        Preprocess(cfg)(path)


def test_what_the_annotations_say_is_not_blamed_on_the_picture(cfg, tmp_path):
    wrong = {**image(tmp_path, 1), "width": 5}
    with pytest.raises(DataError, match=r"got \(16, 12\), expect \(5, 12\)\. Please check the width/height") as error:
        next(iter(build_train_loader(cfg, [wrong])))
    assert "Restore" not in str(error.value) and str(tmp_path / "1.png") in str(error.value)
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    code = {"size": [12, 16], "counts": "o" * 40}  # of some 10**60 pixels
    coded = image(tmp_path, 2, annotations=[box(1, 1, 5, 5, segmentation=code)])
    with pytest.raises(DataError, match=r"2\.png can be read, but not prepared: .*; check its annotations") as error:
        next(iter(build_train_loader(cfg, [coded])))
    assert "Restore" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_test_loader_gives_every_image_once(digits_cfg, monkeypatch, workers):
    digits_cfg.DATALOADER.NUM_WORKERS = workers
    sizes = []
    for rank in range(3):
        processes(monkeypatch, rank, 3)
        loader = build_test_loader(digits_cfg, "digits_coco_val")
        batches = list(loader)
        assert len(loader) == len(batches) and all(len(batch) == 1 for batch in batches)
        sizes += [batch[0]["image_id"] for batch in batches]
    assert sizes == list(range(1, 41))
    first = DatasetMapper(digits_cfg, is_train=False)({"file_name": batches[0][0]["file_name"]})
    assert torch.equal(batches[0][0]["image"], first["image"])
