"""Registering and loading data sets, and the errors for those that a model cannot be trained on."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2distill.common.errors import ConfigError, DataError
from d2distill.detection.config import get_cfg, load_cfg
from d2distill.detection.data import check_test_sets, load_test_set, load_training_set, register_datasets
from tests.detection.coco_files import annotation, coco, own_cfg, write


def test_own_data_set(root):
    write(root, "pets")
    cfg = own_cfg()
    for _ in range(2):
        dicts = load_training_set(cfg)
    assert [d["file_name"] for d in dicts] == [str(root / "pets/1.png"), str(root / "pets/2.png")]
    assert [d["annotations"][0]["category_id"] for d in dicts] == [0, 1]
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "dog"] and metadata.evaluator_type == "coco"
    check_test_sets(cfg)


def test_registered_in_a_yaml_file(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root / "home"))
    (root / "c.yaml").write_text(
        "DATASETS:\n  TRAIN: [a]\n  TEST: [b]\n  REGISTER:\n"
        "    a: {JSON: ~/a.json, IMAGES: /images}\n    b: {JSON: sub/b.json, IMAGES: sub}\n"
    )
    cfg = load_cfg(str(root / "c.yaml"), ["MODEL.DEVICE", "cpu"])
    register_datasets(cfg)
    a, b = MetadataCatalog.get("a"), MetadataCatalog.get("b")
    assert (a.json_file, a.image_root) == (str(root / "home/a.json"), "/images")
    assert (b.json_file, b.image_root) == (str(root / "sub/b.json"), str(root / "sub"))


def test_registered_on_the_command_line(root):
    keys = {"JSON": ["DATASETS.REGISTER.pets.JSON", "pets.json"], "IMAGES": ["DATASETS.REGISTER.pets.IMAGES", "/pets"]}
    sets = ["DATASETS.TRAIN", "[pets]", "DATASETS.TEST", "[pets]", "MODEL.DEVICE", "cpu"]
    cfg = load_cfg(opts=[*sets, *keys["JSON"], *keys["IMAGES"]])
    assert cfg.DATASETS.REGISTER.pets == {"JSON": str(root / "pets.json"), "IMAGES": "/pets"}
    again = load_cfg(opts=[*sets, "DATASETS.REGISTER", "{pets: {JSON: pets.json, IMAGES: /pets}}"])
    assert again == cfg == load_cfg(opts=[*sets, "DATASETS.REGISTER.pets", "{'JSON': 'pets.json', 'IMAGES': '/pets'}"])


def test_without_the_variable_data_sets_are_in_datasets(root, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(root)
    register_datasets(own_cfg())
    assert MetadataCatalog.get("pets").json_file == str(root / "datasets/pets.json")


@pytest.mark.parametrize("entry", ["pets.json", {"JSON": "a"}, {"JSON": 3, "IMAGES": "a"}, {"JSON": "a", "IMAGE": "b"}])
def test_malformed_entries(entry):
    cfg = get_cfg()
    cfg.DATASETS.REGISTER.pets = type(cfg)(entry) if isinstance(entry, dict) else entry
    with pytest.raises(ConfigError, match=r"REGISTER.pets must be {JSON: annotation file, IMAGES: .*}, but is .*"):
        register_datasets(cfg)


def test_a_name_belongs_to_one_data_set(root):
    cfg = own_cfg()
    register_datasets(cfg)
    register_datasets(cfg)
    cfg.DATASETS.REGISTER.pets.JSON = "others.json"
    with pytest.raises(ConfigError, match=r"the name is taken by .*/pets.json and images .*/pets;"):
        register_datasets(cfg)
    with pytest.raises(ConfigError, match=r"REGISTER.coco_2017_val: the name is taken by .*instances_val2017"):
        register_datasets(own_cfg(["coco_2017_val"]))


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
def test_unknown_names(root, load):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("digits_coco_vall",)
    with pytest.raises(
        ConfigError, match=r"DATASETS.T.*no data set digits_coco_vall .*did you mean digits_coco_val or"
    ):
        load(cfg)
    assert "digits_coco_vall" not in MetadataCatalog


@pytest.mark.parametrize("missing", ["pets.json", "pets/1.png"])
def test_missing_files(root, missing):
    write(root, "pets")
    (root / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_training_set(own_cfg())
    message = str(error.value)
    assert f"data set pets: {root / missing} does not exist" in message and str(root) in message
    assert "DETECTRON2_DATASETS" in message and "DATASETS.REGISTER.pets" in message and "cocodataset.org" in message


def test_missing_builtin_sets(root):
    cfg = get_cfg()
    for name, part in (("coco_2017_train", "instances_train2017.json"), ("voc_2007_val", "VOC2007")):
        cfg.DATASETS.TRAIN = (name,)
        with pytest.raises(FileNotFoundError, match=rf"data set {name}: /.*{part}.* does not exist"):
            load_training_set(cfg)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "AssertionError"),
        ("[" * 100_000, "RecursionError"),
        ("\x00\xff", "Error"),
    ],
)
def test_damaged_annotations(root, content, message):
    write(root, "pets")
    (root / "pets.json").write_text(content, encoding="latin1")
    for load in (load_training_set, check_test_sets):
        with pytest.raises(DataError, match=rf"pets: cannot use /.*pets.json .*{message}"):
            load(own_cfg())


def test_nothing_to_train_on(root):
    write(root, "crowds", coco(annotations=[annotation(1, 1, iscrowd=1)]))
    cfg = own_cfg(["crowds"])
    with pytest.raises(DataError, match=r"crowds: there is nothing to train on: its 2 images have no object"):
        load_training_set(cfg)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(load_training_set(cfg)) == 2
    check_test_sets(cfg)


def test_images_without_annotations_are_filtered(root):
    write(root, "pets", coco(annotations=[annotation(1, 2)]))
    cfg = own_cfg()
    assert [d["image_id"] for d in load_training_set(cfg)] == [2]
    assert [d["image_id"] for d in load_test_set(cfg, "pets")] == [1, 2]
    assert not any("annotations" in d for d in load_test_set(cfg, "pets"))  # most of a large set's memory


def test_images_with_few_key_points_are_filtered(root):
    seen, hidden = [2, 2, 2, 3, 3, 1], [2, 2, 0, 3, 3, 1]
    write(root, "pets", coco(annotations=[annotation(1, 1, keypoints=seen), annotation(2, 2, keypoints=hidden)]))
    cfg = own_cfg()
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 2
    assert [d["image_id"] for d in load_training_set(cfg)] == [1, 2]
    cfg.MODEL.KEYPOINT_ON = True
    assert [d["image_id"] for d in load_training_set(cfg)] == [1]


def test_the_number_of_classes(root):
    write(root, "pets")
    cfg = own_cfg(num_classes=80)
    message = r"MODEL.{}.NUM_CLASSES is 80, but the annotations of pets have 2 classes \(cat, dog\): set .* to 2"
    for name in ("ROI_HEADS", "RETINANET"):
        with pytest.raises(ConfigError, match=message.format(name)):
            load_training_set(cfg)
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"


def test_a_test_set_that_lists_some_of_the_classes(root):
    """No message sends to a setting that the next one would have back."""
    write(root, "pets", coco(("cat", "dog", "emu")))
    write(root, "cats", coco(("cat",), annotations=[annotation(1, 1)]))
    cfg = own_cfg(["pets"], ["cats"], num_classes=3)
    load_training_set(cfg)
    with pytest.raises(ConfigError) as error:
        check_test_sets(cfg)
    text = str(error.value)
    assert "cats has other classes than pets: 3 classes (cat, dog, emu) there, 1 class (cat) here" in text
    assert "'categories' must list the same" in text and "NUM_CLASSES" not in text
    del MetadataCatalog.get("pets").thing_classes  # as where a student is evaluated
    with pytest.raises(ConfigError, match=r"cats have 1 class \(cat\): 'categories' of a test set must list every"):
        check_test_sets(cfg)


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
@pytest.mark.parametrize("name", ["ROI_HEADS", "RETINANET"])
def test_the_number_of_classes_of_the_data(root, load, name):
    """A teacher's, too, where its configuration leaves it open; one of other classes keeps its own."""
    write(root, "pets")
    cfg = own_cfg(num_classes=80)
    for node in (cfg, cfg.TEACHER):
        node.MODEL.META_ARCHITECTURE = {"ROI_HEADS": "GeneralizedRCNN", "RETINANET": "RetinaNet"}[name]
        node.MODEL[name].NUM_CLASSES = 0
    load(cfg)
    assert cfg.MODEL[name].NUM_CLASSES == cfg.TEACHER.MODEL[name].NUM_CLASSES == 2
    cfg.MODEL[name].NUM_CLASSES, cfg.TEACHER.MODEL[name].NUM_CLASSES = 0, 7
    load(cfg)
    assert (cfg.MODEL[name].NUM_CLASSES, cfg.TEACHER.MODEL[name].NUM_CLASSES) == (2, 7)


@pytest.mark.parametrize("load", [load_training_set, check_test_sets])
def test_the_log_names_classes_and_their_numbers(root, load, log):
    write(root, "pets", coco(("cat", "dog", "emu"), annotations=[annotation(n, 1, n // 2 + 1) for n in (1, 2, 3)]))
    load(own_cfg(num_classes=3))
    key, images, empty = ("DATASETS.TRAIN", 1, 0) if load is load_training_set else ("DATASETS.TEST", 2, 1)
    assert f"{key}: pets has {images} images, {empty} of them without objects; classes in order" in log.text
    assert "images: cat: 1 in 1, dog: 2 in 1, emu: 0 in 0" in log.text


def test_sets_with_other_classes(root):
    write(root, "pets")
    write(root, "swapped", coco(classes=("dog", "cat")))
    write(root, "again")
    with pytest.raises(ConfigError, match=r"swapped has other classes than pets: cat there is dog here"):
        load_training_set(own_cfg(["pets", "swapped"]))
    cfg = own_cfg(["pets"], ["again", "swapped"])
    load_training_set(cfg)
    with pytest.raises(ConfigError, match=r"swapped has other classes than pets"):
        check_test_sets(cfg)
    assert len(load_training_set(own_cfg(["pets", "again"]))) == 4


def test_annotations_that_the_mapper_cannot_use(root):
    write(root, "pets", coco(annotations=[annotation(1, 1, segmentation=None)]))
    cfg = own_cfg()
    load_training_set(cfg)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ConfigError, match=r"MODEL.MASK_ON is True, but pets has .*1.png\) without a segmentation"):
        load_training_set(cfg)
    rle = {"size": [8, 9], "counts": [0, 4, 68]}
    write(root, "coded", coco(annotations=[annotation(1, 1, segmentation=rle)]))
    cfg = own_cfg(["coded"])
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ConfigError, match=r"coded has .* with a run-length encoded mask: set INPUT.MASK_FORMAT"):
        load_training_set(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    load_training_set(cfg)
    # COCO's crowds are run-length encoded, and no mask is made of them.
    write(root, "crowd", coco(annotations=[annotation(1, 1), annotation(2, 1, iscrowd=1, segmentation=rle)]))
    cfg = own_cfg(["crowd"])
    cfg.MODEL.MASK_ON = True
    load_training_set(cfg)


def test_proposals_are_refused(root):
    cfg = own_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    with pytest.raises(ConfigError, match="LOAD_PROPOSALS"):
        load_training_set(cfg)


def test_own_function(root):
    def load():
        return [{"file_name": "none.png", "height": 8, "width": 9, "image_id": 1, "annotations": [{"bbox": [0] * 4}]}]

    DatasetCatalog.register("function", load)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("function",)
    assert len(load_training_set(cfg)) == 1
    check_test_sets(cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
    with pytest.raises(ConfigError, match=r"MODEL.ROI_HEADS.NUM_CLASSES is 0, .* but function does not name its"):
        load_training_set(cfg)
    DatasetCatalog.data["function"] = lambda: {}["bug"]
    with pytest.raises(KeyError, match="bug"):
        load_training_set(cfg)
