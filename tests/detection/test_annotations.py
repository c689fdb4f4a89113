"""Annotations that are refused or left out before a training starts, and how many the log says there were."""

import json
import re

import pytest
from detectron2.data.datasets import load_coco_json

from d2distill.common.errors import DataError
from d2distill.detection.data import check_test_sets, load_training_set
from tests.detection.coco_files import POLYGON, annotation, coco, own_cfg, write

#: JSON's own, which Python's reader takes.
NAN, INFINITE = float("nan"), float("inf")
RLE = {"size": [8, 9], "counts": [0, 4, 68]}


def without(entry, key):
    return {name: value for name, value in entry.items() if name != key}


def ids_of(dicts):
    """Of each image the boxes by which the annotations are told apart."""
    return {record["image_id"]: [entry["bbox"][0] for entry in record["annotations"]] for record in dicts}


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"bbox": box}, r"1 of 3 annotations have a bbox that is not \[x, y, width, height\] in finite numbers")
            for box in ([1, 1, NAN, 4], [1, 1, INFINITE, 4], [1e308, 1, 4, 4], [1, 1, "4", 4], [1, 2, 3], "box", None)
        ),
        ({"image_id": None}, "1 of 3 annotations have no image_id"),
        ({"image_id": NAN}, "1 of 3 annotations have no image_id"),
        ({"category_id": 7}, "1 of 3 annotations have a category_id that 'categories' does not list"),
        ({"category_id": [1]}, "1 of 3 annotations have a category_id"),
        ({"iscrowd": "0"}, "1 of 3 annotations have an iscrowd that is neither 0 nor 1"),
        ({"ignore": 1}, "1 of 3 annotations are to be ignored"),
        ({"keypoints": ["1", 2, 2]}, "1 of 3 annotations have keypoints"),
        ({"segmentation": "outline"}, "1 of 3 annotations have a segmentation"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "1 of 3 annotations have a segmentation"),
        ({"segmentation": {**RLE, "counts": [10**18]}}, "1 of 3 annotations have a segmentation"),
        ({"segmentation": {**RLE, "counts": [-4, 76]}}, "1 of 3 annotations have a segmentation"),
        ({"segmentation": {**RLE, "size": "8x9"}}, "1 of 3 annotations have a segmentation"),
        ({"segmentation": {"size": [8, 9]}}, "1 of 3 annotations have a segmentation"),
    ],
)
def test_what_cannot_be_read_as_it_is_meant(root, load, changes, message):
    write(root, "pets", coco(annotations=[annotation(5, 1), annotation(6, 2, **changes), annotation(7, 2)]))
    with pytest.raises(DataError, match=rf"^data set pets: {root}/pets\.json: {message}.* \(id 6\)$"):
        load(own_cfg())


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "has no 'images'"),
        ({"categories": []}, "has no 'categories'"),
        ({"categories": 3}, "'categories' is not a list of objects"),
        ({"annotations": [[1]]}, "'annotations' is not a list of objects"),
        ({"categories": [{"id": 1}, {"id": 2}]}, r"2 of 2 categories have no name \(id 1, 2\)"),
        ({"categories": [{"name": "cat"}]}, r"1 of 1 categories have no id, .* \(id {'name': 'cat'}\)"),
        *(
            ({"images": [{**image, "id": value} for image in coco()["images"]]}, r"2 of 2 images have no id, ")
            for value in (NAN, INFINITE, 10**40, 1.5, True, None, [1])
        ),
        ({"images": [*coco()["images"], {**coco()["images"][0], "id": "3"}]}, r"1 of 3 images have an id in text"),
        ({"categories": [{"id": 1, "name": n} for n in "ab"]}, r"2 of 2 categories share their id .* \(id 1\)"),
        (
            {"images": [without(i, "file_name") for i in coco()["images"]]},
            r"2 of 2 images have no file_name \(id 1, 2\)",
        ),
        ({"images": [{**i, "width": "9"} for i in coco()["images"]]}, r"2 of 2 images have no width and height"),
        ({"images": coco()["images"] * 2}, r"4 of 4 images share their id with another \(id 1, 2\); give each"),
        ({"annotations": [annotation(1, 1), annotation(1, 2)]}, r"2 of 2 annotations share their id .* \(id 1\)"),
        ({"annotations": [without(annotation(n, 1), "id") for n in (1, 2)]}, r"2 of 2 annotations have no id"),
    ],
)
def test_files_that_are_refused(root, load, content, message):
    write(root, "pets", {**coco(), **content})
    with pytest.raises(DataError, match=rf"^data set pets: {root}/pets\.json:? {message}"):
        load(own_cfg())


@pytest.mark.parametrize("key", ["area", "bbox"])
def test_what_average_precision_needs(root, key):
    """Without it the first evaluation would end the training."""
    write(root, "pets", coco(annotations=[annotation(5, 1), without(annotation(6, 2), key)]))
    with pytest.raises(DataError, match=rf"1 of 2 annotations have .*{key}.*\(id 6\)"):
        check_test_sets(own_cfg())
    if key == "area":
        assert len(load_training_set(own_cfg())) == 2


def test_masks_that_average_precision_needs(root):
    cfg = own_cfg()
    cfg.MODEL.MASK_ON = True
    write(root, "pets", coco(annotations=[annotation(5, 1), annotation(6, 2, segmentation=[])]))
    with pytest.raises(DataError, match=r"1 of 2 annotations have no segmentation, .* MODEL.MASK_ON to False \(id 6\)"):
        check_test_sets(cfg)


@pytest.mark.parametrize("counts", ["o" * 40, "\0"])
def test_masks_of_a_test_set_that_cannot_be_decoded(root, counts):
    """Those of a training are decoded as its images are read."""
    for code, name in (("04T2", "good"), (counts, "bad")):
        write(root, name, coco(annotations=[annotation(5, 1), annotation(6, 2, segmentation={**RLE, "counts": code})]))
    cfg = own_cfg(["good"])
    cfg.MODEL.MASK_ON = True
    check_test_sets(cfg)
    cfg = own_cfg(["bad"])
    cfg.MODEL.MASK_ON = True
    with pytest.raises(DataError, match=r"1 of 2 annotations have a segmentation that is neither .* \(id 6\)"):
        check_test_sets(cfg)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 5, NAN, 5, 5]],
        [[1, 1, 5, "1", 5, 5]],
        [[1, 1, 1e9, 1, 5, 5]],  # Detectron2 would draw it pixel by pixel
        {**RLE, "size": [9, 8]},
        {**RLE, "counts": [0, 4, 69]},
    ],
)
def test_masks_that_cannot_be_drawn(root, segmentation):
    write(root, "pets", coco(annotations=[annotation(5, 1), annotation(6, 2, segmentation=segmentation)]))
    cfg = own_cfg()
    assert len(load_training_set(cfg)) == 2  # where none is drawn
    cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = True, "bitmask"
    with pytest.raises(DataError, match=r"1 of 2 annotations have a segmentation that is neither .* \(id 6\)"):
        load_training_set(cfg)


USELESS = {11: [1, 1, 0, 4], 12: [1, 1, 4, -4], 13: [9, 1, 4, 4], 14: [-5, 1, 5, 4], 15: [1, 1, 4, 1e-6]}


def test_boxes_that_cover_nothing(root, log):
    """A training does without them; of a test set they are objects that were not found, as in COCO's evaluation."""
    useless = [annotation(number, 1, bbox=box) for number, box in USELESS.items()]
    partly = [annotation(1, 1, bbox=[-2, -3, 6, 6]), annotation(2, 2, bbox=[8, 7, 9, 9])]
    write(root, "pets", coco(annotations=[*partly, *useless]))
    assert ids_of(load_training_set(own_cfg())) == {1: [-2], 2: [8]}
    check_test_sets(own_cfg())
    warnings = [record.getMessage() for record in log.records if record.levelname == "WARNING"]
    reason = "their boxes cover nothing of their images (no width or height, or outside) (id 11, 12, 13, ...)"
    assert warnings == [
        f"DATASETS.TRAIN: pets: 5 of 7 annotations are left out: {reason}",
        f"DATASETS.TEST: pets: 5 of 7 annotations can be found by no detector, and lower AP: {reason}",
    ]


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
def test_no_box_that_covers_anything(root, load):
    entries = [annotation(n, 1, bbox=[10 + n, 1, 0, 4]) for n in (1, 2)]
    write(root, "pets", coco(annotations=[*entries, annotation(3, 2, iscrowd=1)]))
    cfg = own_cfg()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    message = r"pets\.json: no object has a box with .*, e\.g\. that of id 1 is \[11, 1, 0, 4\] in an image of 9 x 8"
    with pytest.raises(DataError, match=message):
        load(cfg)


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
def test_annotations_of_images_that_are_not_listed(root, load, log):
    write(root, "pets", coco(annotations=[annotation(1, 1), *(annotation(n, 90) for n in range(2, 9))]))
    load(own_cfg())
    assert "pets: 7 of 8 annotations are left out: no such image is listed (id 2, 3, 4, ...)" in log.text


def test_the_log_counts_what_is_filtered_out(root, log):
    entries = [annotation(1, 1), annotation(2, 1, iscrowd=1, segmentation=RLE), annotation(3, 2, bbox=[1, 1, 0, 4])]
    write(root, "pets", coco(images=2, annotations=entries))
    load_training_set(own_cfg())
    left_out = "of pets are left out 1 of 2 images (no object) and 1 crowds among the annotations of the others"
    assert f"DATASETS.TRAIN: {left_out}" in log.text


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
def test_ids_are_escaped_and_shortened(root, load):
    number = "\x1b[2J\n" + "x" * 10_000
    write(root, "pets", coco(annotations=[annotation(number, 1, bbox=None)]))
    with pytest.raises(DataError) as error:
        load(own_cfg())
    assert len(str(error.value)) < 500 and not re.search(r"[\x00-\x1f]", str(error.value))


def test_valid_files_read_as_detectron2_reads_them(root):
    """Crowds, polygons, run-length codes, key points, floats, boxes at the edge, words and keys that nobody knows."""
    entries = [
        annotation(0, "one", segmentation=[POLYGON[0], [1, 2, 3]], score=0.5, attributes={"deep": [[[[]]]]}),
        annotation(2, "one", bbox=[-0.5, 0.25, 100.5, 3.0], segmentation=RLE, keypoints=[1, 2, 2], num_keypoints=1),
        annotation(3, "two", iscrowd=1, segmentation={**RLE, "counts": "04T2"}),
        without(without(annotation(4, "two", segmentation=None), "iscrowd"), "area"),
        annotation(5, "two", segmentation=[]),
        annotation("six", "two", iscrowd=True, ignore=0),
    ]
    images = [{**image, "id": name, "width": 9.0} for image, name in zip(coco()["images"], ("one", "two"), strict=True)]
    content = {**coco(annotations=entries), "images": images, "info": None}
    content["categories"] = [{"id": 70, "name": "dog", "keypoints": ["nose"]}, {"id": 1, "name": "cat"}]
    write(root, "pets", content)
    expected = load_coco_json(str(root / "pets.json"), str(root / "pets"), "read_by_detectron2")
    found = load_training_set(own_cfg())
    assert json.dumps(found, default=str) == json.dumps(expected, default=str)
