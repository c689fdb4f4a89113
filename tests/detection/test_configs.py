"""Detection configs: all are loaded, one of a kind is built at its real widths and stepped; how settings are read."""

from itertools import permutations
from pathlib import Path

import pytest
import torch

from d2distill.common.distillers import DISTILLERS
from d2distill.common.errors import ConfigError
from d2distill.detection.config import CfgNode, add_distill_config, get_cfg, load_cfg, teacher_cfg, validate
from tests.detection.tiny_detectors import batch, build, step

CONFIGS = sorted(Path("configs/det").glob("*.yaml"))
RUNNABLE = [path for path in CONFIGS if not path.stem.startswith("base_")]
SETS = "DATASETS: {TRAIN: [a], TEST: [a]}\n"
# Few proposals and classes: the widths stay.
FEW = {
    "MODEL.WEIGHTS": "",
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 10,
}


def few(path, **settings):
    opts = {"MODEL.DEVICE": "cpu", **FEW, **{f"TEACHER.{key}": value for key, value in FEW.items()}, **settings}
    return load_cfg(str(path), [item for pair in opts.items() for item in pair])


def one_of_a_kind():
    """One configuration for each list of methods on each kind of detector, and one for each student without a teacher.

    Building a ResNet-101 takes seconds, and the others differ in numbers alone.
    """
    kinds = {}
    for path in RUNNABLE:
        model, methods = (CfgNode.load_yaml_with_base(str(path)).get(key, {}) for key in ("MODEL", "DISTILL"))
        kind = (model["META_ARCHITECTURE"], str(methods.get("METHODS", path.stem)), model.get("MASK_ON"))
        kinds.setdefault(kind, path)
    return list(kinds.values())


@pytest.mark.slow
@pytest.mark.parametrize("path", one_of_a_kind(), ids=lambda path: path.stem)
def test_a_config_is_built_and_stepped(path):
    cfg = few(path)
    model = build(cfg)
    losses = step(model, batch(masks=cfg.MODEL.MASK_ON))
    assert {f"loss_{method.lower()}" for method in cfg.DISTILL.METHODS} <= set(losses)
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(losses[f"loss_{method.lower()}"] > 0 for method in cfg.DISTILL.METHODS)


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_every_config_is_loaded(path):
    cfg = load_cfg(str(path))
    assert not cfg.DISTILL.METHODS or teacher_cfg(cfg).MODEL.MASK_ON == cfg.MODEL.MASK_ON
    if cfg.INPUT.FORMAT == "RGB":
        assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.280, 103.530] and cfg.MODEL.PIXEL_STD == [58.395, 57.120, 57.375]
    else:
        assert cfg.MODEL.PIXEL_MEAN == [103.530, 116.280, 123.675] and cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]


def test_the_configs_of_the_published_pairs_are_there():
    names = {path.stem for path in CONFIGS}
    pairs = ["r101_r18", "r101_r50", "r50_mv2"]
    assert {f"{method}_{pair}" for method in ("dkd", "reviewkd", "review_dkd") for pair in pairs} < names
    assert {f"reviewkd_{pair}_mask" for pair in pairs} | {"kd_r101_r18", "pkd_r101_r50"} < names
    assert {"r18", "r50", "mv2", "r18_mask", "r50_mask", "mv2_mask", "retinanet_r50"} < names
    used = {
        method
        for path in CONFIGS
        for method in CfgNode.load_yaml_with_base(str(path)).get("DISTILL", {}).get("METHODS", [])
    }
    assert used == {"DKD", "ReviewKD", "KD", "DIST", "NKD", "RLD", "FitNet", "PKD", "CWD", "MGD", "BCKD"}


def test_the_starter_configs_follow_the_data_and_each_other():
    own = {name: load_cfg(f"configs/det/own_{name}.yaml") for name in ("teacher", "student", "dkd")}
    for cfg in own.values():
        assert cfg.DATASETS == own["teacher"].DATASETS and list(cfg.DATASETS.REGISTER) == ["own_train", "own_val"]
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0 and cfg.SOLVER.STEPS == (0.7, 0.9)
    assert own["teacher"].MODEL.WEIGHTS.startswith("detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/")
    taught, teacher = own["dkd"], own["dkd"].TEACHER
    assert own["student"].SOLVER == taught.SOLVER and own["student"].MODEL.RESNETS == taught.MODEL.RESNETS
    assert teacher.MODEL.RESNETS == own["teacher"].MODEL.RESNETS and teacher.MODEL.ROI_HEADS.NUM_CLASSES == 0
    assert teacher.MODEL.WEIGHTS == "output/own_teacher/student_best.pth"


R101 = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"


def test_a_zoo_teacher_comes_with_its_trained_weights():
    cfg = load_cfg("configs/det/dkd_r101_r18.yaml")
    assert cfg.TEACHER.MODEL.RESNETS.DEPTH == 101 and cfg.TEACHER.INPUT.FORMAT == "BGR"
    assert cfg.TEACHER.MODEL.WEIGHTS.endswith("faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl")


def test_a_teachers_file_may_be_one_of_ours_or_a_runs(tmp_path):
    """Its weights are where its training began: no teacher."""
    cfg = load_cfg("configs/det/dkd_r101_r18.yaml", ["TEACHER.CONFIG_FILE", "configs/det/r50.yaml"])
    assert cfg.TEACHER.MODEL.RESNETS.DEPTH == 50 and cfg.TEACHER.MODEL.WEIGHTS == "" and "DISTILL" not in cfg.TEACHER
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_cfg("configs/det/dkd_r50_mv2.yaml", ["TEACHER.CONFIG_FILE", str(tmp_path / "config.yaml")])
    assert again.TEACHER.MODEL.RESNETS.DEPTH == 18 and again.TEACHER.INPUT.FORMAT == "RGB"


@pytest.mark.parametrize(
    "order", list(permutations([("MODEL.WEIGHTS", "x.pth"), ("MODEL.RESNETS.DEPTH", "50"), ("CONFIG_FILE", R101)]))
)
def test_explicit_settings_of_the_teacher_win_in_any_order(order):
    """Even one that is Detectron2's default."""
    opts = [item for key, value in order for item in (f"TEACHER.{key}", value)]
    teacher = load_cfg("configs/det/review_dkd_r50_mv2.yaml", opts).TEACHER
    assert (teacher.MODEL.WEIGHTS, teacher.MODEL.RESNETS.DEPTH, teacher.CONFIG_FILE) == ("x.pth", 50, R101)
    assert teacher.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and teacher.MODEL.FPN.IN_FEATURES


def test_a_file_on_the_command_line_keeps_the_yamls_settings_of_the_teacher(tmp_path):
    yaml_file = tmp_path / "student.yaml"
    heads = "ROI_HEADS: {NUM_CLASSES: 80}"
    yaml_file.write_text(f"{SETS}TEACHER: {{CONFIG_FILE: {R101}, MODEL: {{WEIGHTS: mine.pth, {heads}}}}}\n")
    (tmp_path / "other.yaml").write_text("MODEL: {ROI_HEADS: {NUM_CLASSES: 3}, RESNETS: {DEPTH: 34}}\n")
    given = ["TEACHER.CONFIG_FILE", str(tmp_path / "other.yaml")]
    teacher = load_cfg(str(yaml_file), given).TEACHER
    assert (teacher.MODEL.WEIGHTS, teacher.MODEL.ROI_HEADS.NUM_CLASSES) == ("mine.pth", 80)
    assert (teacher.MODEL.RESNETS.DEPTH, teacher.CONFIG_FILE) == (34, given[1])
    # A run's config.yaml has the same settings, among all the others.
    (tmp_path / "config.yaml").write_text(load_cfg(str(yaml_file)).dump())
    teacher.MODEL.ROI_HEADS.NUM_CLASSES = 3  # which R101 had said as well
    assert load_cfg(str(tmp_path / "config.yaml"), given).TEACHER == teacher


def test_a_runs_configuration_is_the_same_from_any_folder(tmp_path, monkeypatch):
    start, sets = tmp_path / "start", "REGISTER: {own: {JSON: own.json, IMAGES: /images}}"
    (start / "configs").mkdir(parents=True)
    for name in ("configs/teacher.yaml", "configs/own.py", "student.pth", "teacher.pth"):
        (start / name).touch()
    (start / "configs" / "base.yaml").write_text(
        f"IMPORTS: [own.py]\nDATASETS: {{TRAIN: [own], TEST: [own], {sets}}}\nTEACHER: {{CONFIG_FILE: teacher.yaml}}\n"
    )
    (start / "student.yaml").write_text("_BASE_: configs/base.yaml\n")
    monkeypatch.chdir(start)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    opts = ["MODEL.WEIGHTS", "student.pth", "TEACHER.MODEL.WEIGHTS", "teacher.pth", "TEACHER.MODEL.KEYPOINT_ON", "True"]
    cfg = load_cfg("student.yaml", opts)
    assert cfg.IMPORTS == [str(start / "configs/own.py")]
    assert cfg.TEACHER.CONFIG_FILE == str(start / "configs/teacher.yaml")
    assert (cfg.MODEL.WEIGHTS, cfg.TEACHER.MODEL.WEIGHTS) == (str(start / "student.pth"), str(start / "teacher.pth"))
    assert cfg.DATASETS.REGISTER.own == {"JSON": str(start / "datasets/own.json"), "IMAGES": "/images"}
    (tmp_path / "config.yaml").write_text(cfg.dump())
    monkeypatch.chdir("/")
    assert load_cfg(str(tmp_path / "config.yaml")) == cfg
    # It names every setting: the teacher's file may be gone.
    (start / "configs" / "teacher.yaml").unlink()
    assert load_cfg(str(tmp_path / "config.yaml")) == cfg


def test_the_teachers_file_is_found_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "teacher.yaml").write_text("MODEL: {MASK_ON: True}\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "student.yaml").write_text(f"{SETS}TEACHER: {{CONFIG_FILE: teacher.yaml}}\n")
    monkeypatch.chdir(tmp_path)
    for cfg in (
        load_cfg("configs/student.yaml"),
        load_cfg(opts=["TEACHER.CONFIG_FILE", "teacher.yaml", "DATASETS.TRAIN", "[a]", "DATASETS.TEST", "[a]"]),
    ):
        assert cfg.TEACHER.MODEL.MASK_ON and cfg.TEACHER.CONFIG_FILE == str(tmp_path / "teacher.yaml")


def test_detectron2s_own_config_node_works_too():
    from detectron2.config import get_cfg as stock

    cfg = stock()
    add_distill_config(cfg)
    cfg.merge_from_list(["TEACHER.CONFIG_FILE", "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"])
    cfg.merge_from_list(["TEACHER.MODEL.ROI_HEADS.NUM_CLASSES", "7", "MODEL.DEVICE", "cpu"])
    teacher = teacher_cfg(cfg)
    assert teacher.MODEL.RESNETS.DEPTH == 50 and teacher.MODEL.ROI_HEADS.NUM_CLASSES == 7
    assert teacher.MODEL.DEVICE == "cpu" and "R_50_FPN_3x" in teacher.MODEL.WEIGHTS
    assert cfg.DISTILL.REVIEWKD.FIRST == 0  # of a pyramid all levels
    assert set(cfg.DISTILL) >= {"METHODS", "DKD"} and len(DISTILLERS._obj_map) + 2 == len(cfg.DISTILL)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LRS", "1"], r"unknown config key SOLVER\.BASE_LRS \(did you mean SOLVER\.BASE_LR"),
        (["TEACHER.MODEL.WEIGHT", "x"], r"TEACHER\.MODEL\.WEIGHT \(did you mean TEACHER\.MODEL\.WEIGHTS"),
        (["DISTILL.METHODS", "['DKT']"], "no method DKT .*DKD"),
        (["TEACHER.CONFIG_FILE", "COCO-Detection/faster_rcnn_R_101.yaml"], "neither a file"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], r"\['DKD'\] need MODEL\.META_ARCHITECTURE DistillRCNN or"),
        (["MODEL.META_ARCHITECTURE", "DistilRCNN"], "no DistilRCNN .did you mean DistillRCNN"),
        (["SEED", "-1"], "SEED is -1"),
        (["DISTILL.CE_WEIGHT", "0.1"], "CE_WEIGHT"),
        (["MODEL.DEVICE", "cuda:99"], "cuda:99"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN"),
        (["TEST.PRECISE_BN.ENABLED", "True"], "PRECISE_BN"),
        (["DISTILL.METHODS", "KD"], r"takes a list, but was given KD; write \[KD\]"),
        (["DATASETS.TRAIN", "[1]"], "a list of names"),
        (["SOLVER.BASE_LR", "-1"], "SOLVER.BASE_LR is -1.0, but must be at least 0"),
        (["SOLVER.STEPS", "[3, 2]"], "SOLVER.STEPS is .* increasing"),
        (["SOLVER.STEPS", "[0.5, 2]"], "SOLVER.STEPS is .* all between 0 and 1"),
        (["MODEL.PIXEL_STD", "[0.229, 0.224, 0.225]"], r"^MODEL.PIXEL_STD \[0.229.* in 0..1, .* multiply .* by 255"),
        (["TEACHER.MODEL.PIXEL_STD", "[0.2, 0.2, 0.2]"], r"TEACHER.MODEL.PIXEL_STD \[0.2.* in 0..1"),
        (["TEST.DETECTIONS_PER_IMAGE", "-1"], "DETECTIONS_PER_IMAGE is -1"),
        (["SOLVER.STEPS", "[2, 5]", "SOLVER.MAX_ITER", "5"], r"SOLVER\.STEPS \(2, 5\) holds MAX_ITER"),
        (["SOLVER.WEIGHT_DECAY", "-1"], "SOLVER.WEIGHT_DECAY is -1"),
        (["INPUT.MIN_SIZE_TRAIN", "[a]"], "INPUT.MIN_SIZE_TRAIN"),
        (["TEACHER.MODEL.RPN.NMS_THRESH", ".nan"], "takes a number"),
    ],
)  # fmt: skip
def test_mistakes_in_a_config(opts, message):
    with pytest.raises(ConfigError, match=message):
        load_cfg("configs/det/dkd_r101_r18.yaml", opts)


def test_steps_that_no_schedule_looks_at():
    opts = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "[5]"]
    assert load_cfg("configs/det/r18.yaml", opts).SOLVER.MAX_ITER == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n", ": config key MODEL is a node with keys below it, but was given nothing"),
        ("SOLVER: {BASE_LRS: 1}\n", r": unknown config key SOLVER\.BASE_LRS \(did you mean SOLVER\.BASE_LR"),
        (
            "SOLVER:\n  MAX_ITER: 1\n  MAX_ITER: 2\n",
            " cannot be read as YAML: MAX_ITER is there twice, first in line 2",
        ),
        ('MODEL: {RESNETS: {DEPTH: !!python/object/apply:eval ["50"]}}', " cannot .*object/apply:eval.* line 1"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    """The student's or the teacher's."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{file}{message}"):
        load_cfg(str(file))
    with pytest.raises(ConfigError, match=rf"{file}{message}"):
        load_cfg("configs/det/dkd_r101_r18.yaml", ["TEACHER.CONFIG_FILE", str(file)])


def test_methods_without_a_teacher():
    with pytest.raises(ConfigError, match=r"\['DKD'\] need a teacher: name its configuration in TEACHER.CONFIG_FILE"):
        load_cfg("configs/det/r18.yaml", ["MODEL.META_ARCHITECTURE", "DistillRCNN", "DISTILL.METHODS", "['DKD']"])


def test_the_default_configuration_is_checked():
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("a",), ("b",)
    validate(cfg)
    assert cfg.MODEL.DEVICE in ("cpu", "cuda")
