"""Average precision: of each class, of as many detections as are kept, without annotations, and of the teacher."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import coco_evaluation
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from d2distill.common.engine.folder_lock import lock_folder
from d2distill.common.errors import ConfigError, OutputError
from d2distill.detection.config import get_cfg, teacher_cfg
from d2distill.detection.data import check_test_sets
from d2distill.detection.evaluation import (
    EvaluationData,
    best_metric,
    check_evaluators,
    evaluate_detector,
    measure_teacher,
)
from d2distill.detection.teacher import TeacherAdapter
from tests.detection.tiny_training import count_reads

#: Objects of the two test images, by category id: boxes as COCO's, 40 pixels wide and high.
OBJECTS = {1: [(3, [10, 10, 40, 40]), (7, [60, 20, 40, 40])], 2: [(3, [30, 30, 40, 40])]}
CLASSES = {3: "cat", 7: "dog", 9: "emu"}
FASTER = find_spec("faster_coco_eval") is not None
#: Of the predictions of a student and of its teacher.
FOLDERS = ("inference", "inference/teacher")


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Three classes, `seen` with objects of two, `unseen` without annotations; forgotten after the test."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cfg, before = get_cfg(), set(DatasetCatalog)
    for number in OBJECTS:
        # The channels tell RGB from BGR.
        Image.new("RGB", (120, 100), (200, 100, number)).save(tmp_path / f"{number}.png")
    boxes = [(image, *found) for image, objects in OBJECTS.items() for found in objects]
    content = {
        "images": [{"id": number, "file_name": f"{number}.png", "height": 100, "width": 120} for number in OBJECTS],
        "categories": [{"id": number, "name": name} for number, name in CLASSES.items()],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": 1600, "iscrowd": 0}
            for n, (image, category, box) in enumerate(boxes, 1)
        ],
    }
    for name, missing in (("seen", {}), ("unseen", {"annotations": None}), ("empty", {"annotations": []})):
        kept = {key: value for key, value in {**content, **missing}.items() if value is not None}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
        cfg.DATASETS.REGISTER[name] = type(cfg)({"JSON": f"{name}.json", "IMAGES": str(tmp_path)})
    cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / "run"), "MODEL.ROI_HEADS.NUM_CLASSES", 3])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 100, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", ("seen",)])
    yield cfg
    for name in set(DatasetCatalog) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def detector(classes=(3, 7), wrong_first=0):
    """Finds the objects of these categories, after `wrong_first` detections of nothing with higher scores."""

    def detect(batched_inputs):
        results = []
        for record in batched_inputs:
            found = [(category, box) for category, box in OBJECTS[record["image_id"]] if category in classes]
            nothing = [(3, [0, 90, 5, 5])] * wrong_first
            instances = Instances((record["height"], record["width"]))
            corners = [[x, y, x + w, y + h] for _, (x, y, w, h) in nothing + found]
            instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
            instances.pred_classes = torch.tensor([list(CLASSES).index(category) for category, _ in nothing + found])
            instances.scores = torch.linspace(0.9, 0.1, len(corners))
            results.append({"instances": instances})
        return results

    return detect


def test_ap_of_each_class(cfg):
    check_test_sets(cfg)
    per_class = {}
    metrics = evaluate_detector(cfg, detector(classes=[3]), per_class=per_class)
    assert per_class == {"per_class": {"cat": pytest.approx(100), "dog": 0.0, "emu": None}}
    assert metrics["bbox/AP"] == pytest.approx(50) and set(metrics) == {
        f"bbox/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")
    }
    # Of no detection at all, too, AP is defined where there are objects: none is small, large, or an emu.
    metrics = evaluate_detector(cfg, detector(classes=[]), per_class=per_class)
    assert per_class == {"per_class": {"cat": 0.0, "dog": 0.0, "emu": None}}
    assert metrics["bbox/AP"] == metrics["bbox/AP50"] == metrics["bbox/AP75"] == metrics["bbox/APm"] == 0
    assert math.isnan(metrics["bbox/APs"]) and math.isnan(metrics["bbox/APl"])


def test_ap_of_a_single_class(cfg, tmp_path):
    content = json.loads((tmp_path / "seen.json").read_text())
    content["categories"] = content["categories"][:1]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 3]
    (tmp_path / "seen.json").write_text(json.dumps(content))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    check_test_sets(cfg)
    per_class = {}
    evaluate_detector(cfg, detector(classes=[3]), per_class=per_class)
    assert per_class == {"per_class": {"cat": pytest.approx(100)}}


def test_as_many_detections_count_as_are_kept(cfg, log):
    """The right one is the 151st of each image: precision 1/151 at every recall, or none at all."""
    check_test_sets(cfg)
    check_evaluators(cfg)
    assert evaluate_detector(cfg, detector([3], wrong_first=150))["bbox/AP"] == 0 and "AP is of" not in log.text
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    check_evaluators(cfg)
    per_class = {}
    evaluate_detector(cfg, detector([3], wrong_first=150), per_class=per_class)
    # Scores are alike in both images, so that two are found among 302.
    assert per_class["per_class"]["cat"] == pytest.approx(100 * 2 / 302, rel=1e-3)
    assert "AP is of at most 200 detections per image, COCO's own of 100" in log.text


@pytest.mark.parametrize("name", ["coco_instances_results.json", "instances_predictions.pth"])
def test_predictions_on_a_full_disk_are_one_line(cfg, tmp_path, name):
    check_test_sets(cfg)
    folder = tmp_path / "run/inference/seen"
    folder.mkdir(parents=True)
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(OutputError, match=f"^{folder} cannot be written: No space left on device; check free space"):
        evaluate_detector(cfg, detector())


def test_predictions_do_not_make_a_removed_run_folder_again(cfg, tmp_path):
    check_test_sets(cfg)
    detect, run = detector(), tmp_path / "run"

    def remove(batched_inputs):
        shutil.rmtree(run, ignore_errors=True)
        return detect(batched_inputs)

    with lock_folder(run), pytest.raises(OutputError, match=f"^{run} was removed"):
        evaluate_detector(cfg, remove)
    assert not run.exists()


@pytest.mark.parametrize("name", ["unseen", "empty"])
def test_a_test_set_without_annotations(cfg, tmp_path, log, name):
    cfg.DATASETS.TEST = (name,)
    check_test_sets(cfg)
    assert f"DATASETS.TEST: {name} has 2 images and no annotations; classes in order: cat, dog, emu" in log.text
    assert evaluate_detector(cfg, detector()) == {} and f"{name} has no annotations, so there is no AP" in log.text
    found = json.loads((tmp_path / "run" / "inference" / name / "coco_instances_results.json").read_text())
    expected = [(image, *found) for image, objects in OBJECTS.items() for found in objects]
    assert [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in found] == expected
    with pytest.raises(ConfigError, match=rf"DATASETS.TEST \['{name}'\] has no annotations, by which .* --eval-only"):
        best_metric(cfg)
    cfg.DATASETS.TEST, per_class = (name, "seen"), {}
    check_test_sets(cfg)
    assert best_metric(cfg) == "seen/bbox/AP"
    assert evaluate_detector(cfg, detector(), per_class=per_class)["seen/bbox/AP"] == pytest.approx(100)
    assert per_class["per_class"] == {"seen": {"cat": pytest.approx(100), "dog": pytest.approx(100), "emu": None}}


def test_each_set_is_read_once_for_all_evaluations(cfg, tmp_path, monkeypatch):
    read = count_reads(monkeypatch)
    data = EvaluationData(cfg, check_test_sets(cfg))
    teacher = TeacherAdapter(teacher_cfg(cfg), Teacher(detector([3])), "", "", swap_rgb_bgr=False)
    measure_teacher(cfg, teacher, data)
    found = [evaluate_detector(cfg, detector(), data=data)["bbox/AP"] for _ in range(2)]
    assert found == pytest.approx([100, 100])
    assert read == {"seen.json": 2}  # by Detectron2's loader and by its evaluator
    files = {folder: tmp_path / "run" / folder / "seen" / "coco_instances_results.json" for folder in FOLDERS}
    assert [len(json.loads(file.read_text())) for file in files.values()] == [3, 2]
    # What is written meanwhile is another run's.
    content = json.loads((tmp_path / "seen.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, 5, 5]
    (tmp_path / "seen.json").write_text(json.dumps(content))
    assert [evaluate_detector(cfg, detector(), data=kept)["bbox/AP"] < 99 for kept in (data, None)] == [False, True]


def test_ap_of_faster_coco_eval(cfg, tmp_path, log, monkeypatch):
    """With crowds, masks, detections of nothing and of nothing at all, in one evaluator: that of pycocotools."""
    pytest.importorskip("faster_coco_eval")
    content = json.loads((tmp_path / "seen.json").read_text())
    for number, entry in enumerate(content["annotations"]):
        x, y, w, h = entry["bbox"]
        entry |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": int(number == 1)}
    (tmp_path / "seen.json").write_text(json.dumps(content))

    def evaluated():
        data, classes = EvaluationData(cfg, check_test_sets(cfg)), {}
        check_evaluators(cfg)
        kinds = (detector(), detector([3], wrong_first=2), detector([]), detector([7]))
        found = [evaluate_detector(cfg, with_masks(detect), per_class=classes, data=data) for detect in kinds]
        return [
            {key: math.nan if ap is None else ap for key, ap in part.items()} for part in (*found, *classes.values())
        ]

    faster = evaluated()
    monkeypatch.setattr("d2distill.detection.evaluation.find_spec", lambda name: None)
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", coco_evaluation.COCOeval)  # as in a process without it
    for one, other in zip(faster, evaluated(), strict=True):
        assert one == pytest.approx(other, rel=1e-12, nan_ok=True)
    assert "segm/AP" in faster[0] and 0 < faster[1]["bbox/AP"] < 100
    assert log.text.count("AP is computed by faster-coco-eval") == log.text.count("AP is computed by pycocotools") == 1


def test_images_named_by_words(cfg, tmp_path, log):
    """Which pycocotools takes, and faster-coco-eval does not."""
    content = json.loads((tmp_path / "seen.json").read_text())
    for entry, key in [(e, "id") for e in content["images"]] + [(e, "image_id") for e in content["annotations"]]:
        entry[key] = f"image {entry[key]}"
    content["categories"].pop()
    (tmp_path / "seen.json").write_text(json.dumps(content))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_test_sets(cfg)

    def detect(batched_inputs):
        return detector()([{**record, "image_id": int(record["image_id"].split()[1])} for record in batched_inputs])

    assert evaluate_detector(cfg, detect)["bbox/AP"] == pytest.approx(100)
    assert (
        "seen names images or classes by words, or by numbers below 0: its AP is computed by pycocotools" in log.text
    ) == FASTER


@pytest.mark.parametrize("with_faster", [True, False])
def test_annotations_named_by_0_or_by_words_and_no_crowds(cfg, tmp_path, monkeypatch, with_faster):
    """COCO's evaluation takes one with the id 0 for none, and then its detection for wrong."""
    if not with_faster:
        monkeypatch.setattr("d2distill.detection.evaluation.find_spec", lambda name: None)
        monkeypatch.setattr(coco_evaluation, "COCOeval_opt", coco_evaluation.COCOeval)
    content = json.loads((tmp_path / "seen.json").read_text())
    content["info"] = json.loads("[" * 900 + "]" * 900)  # read, but too deep to be copied
    for ids in ([0, 1, 2], ["a", "b", "c"]):
        for entry, number in zip(content["annotations"], ids, strict=True):
            entry["id"] = number
            entry.pop("iscrowd", None)
        (tmp_path / "seen.json").write_text(json.dumps(content))
        assert evaluate_detector(cfg, detector(), data=EvaluationData(cfg, check_test_sets(cfg)))["bbox/AP"] > 99.9


def with_masks(detect):
    """The detector, with each box as the mask."""

    def detect_masks(batched_inputs):
        results = detect(batched_inputs)
        for result in results:
            found = result["instances"]
            masks = torch.zeros(len(found), *found.image_size, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, found.pred_boxes.tensor.int().tolist(), strict=True):
                mask[y0:y1, x0:x1] = True
            found.pred_masks = masks
        return results

    return detect_masks


def test_keypoints_of_ones_own_have_their_own_tolerances(cfg, tmp_path):
    """Both are five pixels off: near enough for one tolerance, too far for the other."""
    content, points = json.loads((tmp_path / "seen.json").read_text()), {}
    for entry in content["annotations"]:
        x, y, _, _ = entry["bbox"]
        entry |= {"keypoints": [x, y, 2, x + 20, y + 20, 2], "num_keypoints": 2}
        points[tuple(entry["bbox"][:2])] = [[x + 5, y, 1], [x + 25, y + 20, 1]]
    content["categories"].pop()
    (tmp_path / "seen.json").write_text(json.dumps(content))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    check_test_sets(cfg)

    def detect(batched_inputs):
        results = detector()(batched_inputs)
        for result in results:
            corners = result["instances"].pred_boxes.tensor[:, :2].int().tolist()
            result["instances"].pred_keypoints = torch.tensor([points[tuple(corner)] for corner in corners]).float()
        return results

    found = []
    for sigma in (1.0, 0.01):
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [sigma, sigma]
        found.append(evaluate_detector(cfg, detect)["keypoints/AP"])
    assert found == pytest.approx([100, 0])


class Teacher(nn.Module):
    def __init__(self, detect):
        super().__init__()
        self.weight, self.detect, self.seen = nn.Parameter(torch.zeros(1)), detect, []

    def forward(self, batched_inputs):
        self.seen += [record["image"][:, 0, 0].tolist() for record in batched_inputs]
        return self.detect(batched_inputs)


def test_the_teacher_is_measured_once(cfg, log):
    check_test_sets(cfg)
    cfg.INPUT.FORMAT = "RGB"
    network = Teacher(detector([3]))
    teacher = TeacherAdapter(teacher_cfg(cfg), network, "", "", swap_rgb_bgr=True)
    found = measure_teacher(cfg, teacher)
    assert found["teacher_bbox/AP"] == pytest.approx(50) and found["teacher_bbox/APl"] is None
    assert network.seen == [[1, 100, 200], [2, 100, 200]]  # BGR of the student's RGB
    assert measure_teacher(cfg, teacher) == found and len(network.seen) == 2
    assert log.text.count("bbox/AP 50.00") == 2 and "check their order" not in log.text
    # Other images, or weights, are another measurement.
    cfg.INPUT.MIN_SIZE_TEST = 50
    measure_teacher(cfg, teacher)
    assert len(network.seen) == 4
    network.weight.data += 1
    network.detect = detector([])
    assert measure_teacher(cfg, teacher)["teacher_bbox/AP"] == 0 and len(network.seen) == 6
    assert "bbox/AP is 0.00, as of a network not trained on these classes: check their order" in log.text
