"""digits_coco: the same pixels everywhere, valid COCO, generated once even by several processes."""

import hashlib
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances, polygons_to_bitmask
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import binary_fill_holes

from d2distill.common.data.digits import load_digits_split
from d2distill.common.errors import DataError
from d2distill.detection.data import digits_coco as module
from d2distill.detection.data.digits_coco import ensure_generated, generate_split
from d2distill.detection.data.digits_scene import draw_scene, outline


def digest(folder, split):
    """Of decoded pixels and of the annotations; a PNG's own bytes depend on the zlib that packed them."""
    result = hashlib.sha256((folder / "annotations" / f"{split}.json").read_bytes())
    for path in sorted((folder / split).iterdir()):
        result.update(pixels(path).tobytes())
    return result.hexdigest()


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", "e71b89fbfcb0554cec79687a69276d6516cc3cd1163a2ade4e9fa213a331b0c1"),
        ("val", "36cfce41663089f7994a1afe1b8117c7a64014b14d22922f993b5da0302d36ee"),
    ],
)
def test_pixels_and_annotations_are_the_same_everywhere(tmp_path, split, expected):
    generate_split(tmp_path / "a", split, 6, seed=0)
    assert digest(tmp_path / "a", split) == expected


def test_an_image_depends_on_seed_split_and_number(tmp_path):
    for name, split, number, seed in (("few", "val", 2, 0), ("more", "val", 3, 0), ("other", "val", 2, 1)):
        generate_split(tmp_path / name, split, number, seed)
    first, second, other = (pixels(tmp_path / name / "val/000001.png") for name in ("few", "more", "other"))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


@pytest.fixture(scope="module")
def annotations(digits_coco):
    folder = digits_coco / "digits_coco" / "annotations"
    return {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val")}


def test_it_is_valid_coco(digits_coco, annotations, capsys):
    coco = COCO(digits_coco / "digits_coco/annotations/train.json")
    assert len(coco.getImgIds()) == 60 and len(coco.getCatIds()) == 10
    for annotation in annotations["train"]["annotations"]:
        x, y, w, h = annotation["bbox"]
        image = coco.imgs[annotation["image_id"]]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        assert annotation["iscrowd"] == 0 and 0 < annotation["area"] <= w * h
        assert all(len(polygon) >= 8 and len(polygon) % 2 == 0 for polygon in annotation["segmentation"])
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in annotation["segmentation"]])
        assert [*points.min(0), *np.ptp(points, 0)] == annotation["bbox"]


def test_no_digit_is_in_both_splits(annotations):
    sources = {split: {a["source"] for a in annotations[split]["annotations"]} for split in annotations}
    assert not sources["train"] & sources["val"]
    for split in sources:
        _, labels, positions = load_digits_split(split)
        label = dict(zip(positions.tolist(), labels.tolist(), strict=True))
        assert all(a["category_id"] == label[a["source"]] + 1 for a in annotations[split]["annotations"])


def test_ground_truth_as_predictions_is_perfect(digits_coco):
    dicts = DatasetCatalog.get("digits_coco_val")
    evaluator = COCOEvaluator("digits_coco_val", tasks=("bbox", "segm"), distributed=False)
    evaluator.reset()
    for record in dicts:
        size = record["height"], record["width"]
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(size, pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        masks = [polygons_to_bitmask([np.float64(p) for p in a["segmentation"]], *size) for a in record["annotations"]]
        instances.pred_masks = torch.from_numpy(np.stack(masks))
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100) and results["segm"]["AP"] == pytest.approx(100)


def test_digits_do_not_cover_each_other():
    digits, _, _ = load_digits_split("val")
    for number in range(20):
        image, drawn = draw_scene(np.random.RandomState(number), digits)
        rles = [mask_util.merge(mask_util.frPyObjects(d.polygons, *image.shape[:2])) for d in drawn]
        assert mask_util.decode(rles).sum(axis=-1).max() == 1


def test_outline():
    ring = np.ones((4, 5), bool)
    ring[1:3, 1:4] = False
    assert [p.tolist() for p in outline(ring)] == [[[0, 0], [5, 0], [5, 4], [0, 4]]]
    # Two that touch by a corner are two.
    assert [p.tolist() for p in outline(np.eye(2, dtype=bool))] == [
        [[0, 0], [1, 0], [1, 1], [0, 1]],
        [[1, 1], [2, 1], [2, 2], [1, 2]],
    ]
    assert outline(np.zeros((3, 3), bool)) == []
    steps = np.array([[0, 1, 0], [1, 1, 1]], bool)
    assert [p.tolist() for p in outline(steps)] == [
        [[0, 1], [1, 1], [1, 0], [2, 0], [2, 1], [3, 1], [3, 2], [0, 2]],
    ]


def test_outlines_give_the_mask_back():
    rng = np.random.RandomState(0)
    for _ in range(20):
        mask = rng.rand(12, 15) < 0.6
        rle = mask_util.merge(mask_util.frPyObjects([p.ravel().tolist() for p in outline(mask)], 12, 15))
        # Ink is connected by sides, so what is around it is by corners too.
        assert np.array_equal(mask_util.decode(rle), binary_fill_holes(mask, structure=np.ones((3, 3))))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(module.SETS, "digits_coco", {"train": 12, "val": 4})
    return tmp_path / "digits_coco"


def visible(folder):
    return sorted(path.name for path in folder.parent.iterdir())


def test_generated_on_first_use_and_once(small):
    assert ensure_generated("digits_coco") == small
    assert visible(small) == ["digits_coco", "digits_coco.lock"] and len(list((small / "train").iterdir())) == 12
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*.png")}
    ensure_generated("digits_coco")
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("*.png")}


def test_other_files_are_not_removed(small):
    (small / "train").mkdir(parents=True)
    (small / "train/mine.png").write_text("precious")
    with pytest.raises(DataError, match=r"digits_coco is not a complete digits_coco: move it away"):
        ensure_generated("digits_coco")
    assert (small / "train/mine.png").read_text() == "precious"


def test_several_processes_at_once(small):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_generated, args=("digits_coco",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert visible(small) == ["digits_coco", "digits_coco.lock"] and len(list((small / "val").iterdir())) == 4


def test_a_killed_process_leaves_nothing_that_counts(small, monkeypatch):
    monkeypatch.setitem(module.SETS, "digits_coco", {"train": 2000, "val": 4})
    process = multiprocessing.get_context("fork").Process(target=ensure_generated, args=("digits_coco",))
    process.start()
    deadline = time.monotonic() + 30
    while not (begun := list(small.parent.glob(".digits_coco.*.tmp/train/000003.png"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not small.exists() and begun[0].exists()
    monkeypatch.setitem(module.SETS, "digits_coco", {"train": 12, "val": 4})
    ensure_generated("digits_coco")
    assert visible(small) == ["digits_coco", "digits_coco.lock"] and len(list((small / "train").iterdir())) == 12
    assert not begun[0].exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot generate .* in .*Set DETECTRON2_DATASETS"):
        ensure_generated("digits_coco")


def test_without_scikit_learn(small, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="comes with scikit-learn: pip install it"):
        ensure_generated("digits_coco")
    assert visible(small) == ["digits_coco.lock"]


def test_registered_sets_follow_the_environment_variable(digits_coco, tmp_path, monkeypatch):
    assert {f"digits_coco{size}_{split}" for size in ("", "_large") for split in ("train", "val")} <= set(
        DatasetCatalog
    )
    before = MetadataCatalog.get("digits_coco_val")
    try:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        monkeypatch.setitem(module.SETS, "digits_coco", {"train": 2, "val": 3})
        dicts = DatasetCatalog.get("digits_coco_val")
        assert len(dicts) == 3 and dicts[0]["file_name"] == str(tmp_path / "digits_coco/val/000000.png")
        assert before.json_file == str(tmp_path / "digits_coco/annotations/val.json")
        assert before.evaluator_type == "coco" and before.thing_classes == [str(d) for d in range(10)]
    finally:
        monkeypatch.undo()
        assert len(DatasetCatalog.get("digits_coco_val")) == 40
