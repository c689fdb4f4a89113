"""MDistiller's configurations: converted, they are the published recipes; its keys and flags are answered with ours."""

from pathlib import Path

import pytest
import yaml

from d2distill.classification.config import load_cfg
from d2distill.commands import train_cls, train_det
from d2distill.common.foreign import our_key
from d2distill.detection.config import load_cfg as load_det_cfg
from d2distill.tools.convert_config import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CIFAR = """
EXPERIMENT: {{NAME: "", TAG: "{method},res32x4,res8x4", PROJECT: cifar100_baselines}}
DISTILLER: {{TYPE: {method}, TEACHER: {teacher}, STUDENT: {student}}}
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: {lr}
  LR_DECAY_STAGES: [150, 180, 210]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0005
  MOMENTUM: 0.9
  TYPE: SGD
"""
IMAGENET = """
EXPERIMENT: {{NAME: "", TAG: "a", PROJECT: imagenet_baselines}}
DATASET: {{TYPE: imagenet, NUM_WORKERS: 32, TEST: {{BATCH_SIZE: 128}}}}
DISTILLER: {{TYPE: {method}, TEACHER: ResNet34, STUDENT: ResNet18}}
SOLVER:
  BATCH_SIZE: {batch}
  EPOCHS: 100
  LR: {lr}
  LR_DECAY_STAGES: [30, 60, 90]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0001
  MOMENTUM: 0.9
  TYPE: SGD
LOG: {{TENSORBOARD_FREQ: 50, SAVE_CHECKPOINT_FREQ: 10}}
"""
REVIEWKD = """
REVIEWKD:
  CE_WEIGHT: 1.0
  REVIEWKD_WEIGHT: 1.0
  WARMUP_EPOCHS: 1
  SHAPES: [1,7,14,28,56]
  OUT_SHAPES: [1,7,14,28,56]
  IN_CHANNELS: [64,128,256,512,512]
  OUT_CHANNELS: [64,128,256,512,512]
  STU_PREACT: True
"""
#: Which student comes out does not depend on them.
FREE = ["OUTPUT_DIR", "/o", "DATALOADER.NUM_WORKERS", "4", "TEST.IMS_PER_BATCH", "256", "MODEL.DEVICE", "cpu"]


def cifar(method, teacher="resnet32x4", student="resnet8x4", lr=0.05, more=""):
    return CIFAR.format(method=method, teacher=teacher, student=student, lr=lr) + more


def imagenet(method, batch=512, lr=0.2, more=""):
    return IMAGENET.format(method=method, batch=batch, lr=lr) + more


DOT = "  TRAINER: dot\n  DOT: {DELTA: 0.075}\n"
PUBLISHED = {
    **{f"cifar100_r32x4_r8x4_{name}": cifar(name.upper()) for name in (
        "at", "crd", "dkd", "fitnet", "kd", "kdsvd", "nst", "ofd", "pkt", "rkd", "sp", "vid"
    )},
    "cifar100_r32x4_r8x4_reviewkd": cifar("REVIEWKD", more="REVIEWKD: {REVIEWKD_WEIGHT: 5.0}"),
    "cifar100_r32x4_shuv2_dot": cifar("KD", student="ShuffleV2", lr=0.01, more=DOT),
    "cifar100_wrn40_2_wrn16_2_dkd": cifar("DKD", "wrn_40_2", "wrn_16_2", more="DKD: {BETA: 6.0}"),
    "cifar100_r8x4": cifar("NONE"),
    "imagenet_r34_r18_kd": imagenet("KD", more="KD: {TEMPERATURE: 1, LOSS: {CE_WEIGHT: 0.5, KD_WEIGHT: 0.5}}"),
    "imagenet_r34_r18_dkd": imagenet("DKD", more="DKD: {CE_WEIGHT: 1.0, ALPHA: 1.0, BETA: 0.5, T: 1.0, WARMUP: 1}"),
    "imagenet_r34_r18_reviewkd": imagenet("REVIEWKD", 256, 0.1, REVIEWKD),
    "imagenet_r34_r18_ofd": imagenet("OFD", 128, 0.05, "OFD: {LOSS: {FEAT_WEIGHT: 0.0001}}"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_converted_classifier_is_the_published_one(name, tmp_path, command):
    (tmp_path / "theirs.yaml").write_text(PUBLISHED[name])
    code, out, error = command(main, tmp_path / "theirs.yaml", "-o", tmp_path / "ours.yaml")
    assert code == 0 and out == f"{tmp_path}/ours.yaml: d2distill-train-cls --config-file {tmp_path}/ours.yaml\n"
    published = load_cfg(str(CONFIGS / "cls" / f"{name}.yaml"), FREE)
    converted = load_cfg(str(tmp_path / "ours.yaml"), FREE)
    # MDistiller has one way to log and to save.
    assert converted == published
    assert len((tmp_path / "ours.yaml").read_text().splitlines()) <= 22
    assert ("not converted: LOG.SAVE_CHECKPOINT_FREQ 10: the newest" in error) == name.startswith("imagenet")
    experiment = yaml.safe_load(PUBLISHED[name])["EXPERIMENT"]
    folder = Path("output", experiment["PROJECT"], experiment["TAG"])
    assert load_cfg(str(tmp_path / "ours.yaml"), ["MODEL.DEVICE", "cpu"]).OUTPUT_DIR == str(folder.absolute())


BASE = """
MODEL:
  META_ARCHITECTURE: RCNNKD
  BACKBONE: {NAME: build_resnet_fpn_backbone_kd}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], PRE_NMS_TOPK_TRAIN: 2000, PRE_NMS_TOPK_TEST: 1000}
TEACHER: {MODEL: {META_ARCHITECTURE: GeneralizedRCNN, ROI_HEADS: {NAME: StandardROIHeads}}}
DATASETS:
  TRAIN: ("coco_2017_train",)
  TEST: ("coco_2017_val",)
SOLVER:
  IMS_PER_BATCH: 16
  BASE_LR: 0.02
  STEPS: (60000, 80000)
  MAX_ITER: 90000
INPUT:
  MIN_SIZE_TRAIN: (640, 672, 704, 736, 768, 800)
VERSION: 2
"""
DETECTOR = """
_BASE_: Base-Distillation.yaml
INPUT: {FORMAT: RGB}
MODEL:
  PIXEL_STD: [57.375, 57.120, 58.395]
  WEIGHTS: pretrained/r18-r101.pth
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64}
TEACHER: {MODEL: {RESNETS: {DEPTH: 101}}}
KD: {TYPE: ReviewDKD, REVIEWKD: {LOSS_WEIGHT: 1.2}}
SOLVER: {IMS_PER_BATCH: 8, BASE_LR: 0.01, MAX_ITER: 180000, STEPS: [120000, 160000]}
"""


def test_a_converted_detector_is_the_published_one(tmp_path, command):
    (tmp_path / "Base-Distillation.yaml").write_text(BASE)
    (tmp_path / "theirs.yaml").write_text(DETECTOR)
    code, out, error = command(main, tmp_path / "theirs.yaml", "-o", tmp_path / "ours.yaml")
    assert code == 0 and "d2distill-train-det" in out and "MODEL.WEIGHTS pretrained/r18-r101.pth: holds both" in error
    same = ["OUTPUT_DIR", "/o", "MODEL.DEVICE", "cpu"]
    published = load_det_cfg(str(CONFIGS / "det" / "review_dkd_r101_r18.yaml"), same)
    assert load_det_cfg(str(tmp_path / "ours.yaml"), same) == published
    code, _, error = command(train_det, "--config-file", tmp_path / "theirs.yaml")
    assert code == 2 and "is a configuration of MDistiller: `d2distill-convert-config" in error


def test_what_has_no_place_is_said_and_settings_may_follow(tmp_path, command):
    (tmp_path / "theirs.yaml").write_text(cifar("CRD", more="CRD: {LAYERS: 3, FEAT: {DIM: 64}}\nLOG: {WANDB: False}"))
    code, out, _ = command(main, tmp_path / "theirs.yaml", "SOLVER.LR", "0.01")
    assert code == 0 and out.startswith("# MDistiller's theirs.yaml, by d2distill-convert-config.\n_BASE_: ")
    found = yaml.safe_load(out)
    assert found["_BASE_"] == "cls/base_cifar100.yaml" and found["SOLVER"] == {"BASE_LR": 0.01}
    assert found["DISTILL"]["CRD"] == {"FEAT_DIM": 64}
    notes = [line.removeprefix("# Not converted: ") for line in out.splitlines() if line.startswith("# Not")]
    assert notes == [
        "LOG.WANDB False: loggers are chosen by LOGGERS, e.g. LOGGERS: [tensorboard, wandb]",
        "CRD.LAYERS 3: there is no such setting",
    ]
    theirs = imagenet("NONE").replace("ResNet18", "MobileNetV2")
    (tmp_path / "theirs.yaml").write_text(theirs)
    assert (
        "DISTILLER.STUDENT MobileNetV2: no model of imagenet here; timm: and"
        in command(main, tmp_path / "theirs.yaml")[1]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (cifar("MLKD"), "DISTILLER.TYPE MLKD: d2distill has no such method; there are AT, "),
        ("DATASET: {TYPE: svhn}\nDISTILLER: {TYPE: NONE}", "DATASET.TYPE svhn: d2distill has cifar10, "),
        ("SOLVER: {EPOCHS: 2}", "is no configuration of MDistiller"),
        ("KD: {TYPE: FGD}", "KD.TYPE FGD: MDistiller has DKD, ReviewKD, ReviewDKD"),
    ],
)
def test_what_cannot_be_converted_is_an_error(tmp_path, command, text, message):
    (tmp_path / "theirs.yaml").write_text(text)
    code, _, error = command(main, tmp_path / "theirs.yaml")
    assert code == 2 and message in error


def test_the_trainer_names_the_tool(tmp_path, command):
    (tmp_path / "theirs.yaml").write_text(cifar("KD"))
    code, _, error = command(train_cls, "--config-file", tmp_path / "theirs.yaml")
    assert code == 2 and error.count("\n") == 1
    assert f"is a configuration of MDistiller: `d2distill-convert-config {tmp_path}/theirs.yaml -o FILE.yaml`" in error


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["SOLVER.BATCH_SIZE", "64"], "SOLVER.IMS_PER_BATCH"),
        (["SOLVER.LR", "0.1"], "SOLVER.BASE_LR"),
        (["SOLVER.LR_DECAY_STAGES", "[1]"], "SOLVER.STEPS"),
        (["LOG.WANDB", "False"], "LOGGERS"),
        (["DISTILLER.TYPE", "KD"], "DISTILL.METHODS"),
        (["KD.TEMPERATURE", "4"], "DISTILL.KD.T"),
        (["KD.LOSS.CE_WEIGHT", "4"], "DISTILL.CE_WEIGHT"),
        (["--cfg", "x.yaml"], "--config-file FILE"),
        (["--distill", "kd"], "DISTILL.METHODS [NAME]"),
        (["-r", "0.1"], "DISTILL.CE_WEIGHT X"),
    ],
)
def test_keys_and_flags_of_other_libraries_are_answered_with_ours(command, arguments, ours):
    code, _, error = command(train_cls, "--config-file", "cls/digits_r8.yaml", *arguments)
    assert code == 2 and f"here it is {ours}" in error and error.count("\n") == 1


def test_keys_of_detection():
    settings = {"DKD": ["BETA"], "KD": ["T"], "REVIEWKD": ["WEIGHT"]}
    assert our_key("KD.DKD.BETA", settings) == "DISTILL.DKD.BETA"
    assert our_key("KD.REVIEWKD.LOSS_WEIGHT", settings) == "DISTILL.REVIEWKD.WEIGHT"
    assert our_key("KD.TYPE", settings) == "DISTILL.METHODS"
    assert our_key("MINE.X", settings) == our_key("DKD.BTEA", settings) == our_key("DISTILL.DKD.BTEA", settings) == ""
