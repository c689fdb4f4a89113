"""Wrong settings of detectors: one line that names the setting, before anything is trained."""

import re

import pytest
from detectron2.utils.events import EventStorage

from d2distill.common.errors import ConfigError, MissingDependencyError
from d2distill.detection.trainer import build_trainer, train
from tests.detection.tiny_detectors import batch, small_cfg

RECORD = {"file_name": "no.png", "width": 64, "height": 48, "annotations": []}
CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
CLIPPING = {"SOLVER.CLIP_GRADIENTS.ENABLED": True}

#: Settings, and how the line about them begins.
R_CNNS = [
    ({"MODEL.PIXEL_MEAN": [128.0], "MODEL.PIXEL_STD": [50.0]}, r"MODEL.PIXEL_MEAN \[128.0\] .* INPUT.FORMAT RGB, 3"),
    ({"MODEL.PIXEL_STD": [50.0]}, r"MODEL.PIXEL_MEAN .* and PIXEL_STD \[50.0\] must have a number for each channel"),
    ({"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [128.0]}, "MODEL.PIXEL_MEAN .* channel of INPUT.FORMAT L, 1"),
    ({"TEACHER.MODEL.PIXEL_MEAN": [128.0]}, r"TEACHER.MODEL.PIXEL_MEAN \[128.0\] .* TEACHER.INPUT.FORMAT BGR, 3"),
    ({"MODEL.PIXEL_STD": []}, r"MODEL.PIXEL_STD is \[\], but must be a list of at least one number"),
    ({"INPUT.FORMAT": "XYZ"}, "INPUT.FORMAT is XYZ, but must be BGR, RGB or L"),
    ({"INPUT.FORMAT": "P"}, "INPUT.FORMAT is P, but must be"),
    ({"INPUT.FORMAT": ""}, "INPUT.FORMAT is , but must be"),
    ({"INPUT.MIN_SIZE_TRAIN": []}, r"INPUT.MIN_SIZE_TRAIN is \(\), but must be a list of at least one number"),
    ({"MODEL.PIXEL_STD": [50.0, 50.0, 0.0]}, r"MODEL.PIXEL_STD is .*, but must be .*, all above 0"),
    ({"INPUT.MASK_FORMAT": "Foo"}, "INPUT.MASK_FORMAT is 'Foo', but must be polygon or bitmask"),
    ({"TEST.AUG.MIN_SIZES": [-1]}, "TEST.AUG.MIN_SIZES is .*, none below 0"),
    ({"MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [1]}, "MODEL.ROI_BOX_CASCADE.* takes a list of lists, but was"),
    ({"MODEL.RPN.PRE_NMS_TOPK_TEST": -1}, "MODEL.RPN.PRE_NMS_TOPK_TEST is -1, but must be at least 0"),
    ({"SOLVER.WARMUP_FACTOR": -1.0}, "SOLVER.WARMUP_FACTOR is -1.0, but must be at least 0"),
    ({"SOLVER.WEIGHT_DECAY_BIAS": "Foo"}, "SOLVER.WEIGHT_DECAY_BIAS is 'Foo', but must be at least 0, or None"),
    ({"SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR"}, "SOLVER.LR_SCHEDULER_NAME Warmup.*: fvcore's"),
    ({"DATALOADER.RANDOM_SUBSET_RATIO": 0.0}, "DATALOADER.RANDOM_SUBSET_RATIO is 0.0, but must be above 0 and at most"),
    ({"SOLVER.REFERENCE_WORLD_SIZE": -1}, "SOLVER.REFERENCE_WORLD_SIZE is -1, but must be at least 0"),
    ({"SOLVER.REFERENCE_WORLD_SIZE": 3}, "SOLVER.IMS_PER_BATCH 8 must be a multiple of .*REFERENCE_WORLD_SIZE 3"),
    ({"TEST.EXPECTED_RESULTS": [["bbox", "AP"]]}, "TEST.EXPECTED_RESULTS is .*, but must be a list of .task, metric"),
    ({"MODEL.META_ARCHITECTURE": "Foo"}, "MODEL.META_ARCHITECTURE: no Foo"),
    ({"MODEL.META_ARCHITECTURE": "ProposalNetwork"}, "MODEL.META_ARCHITECTURE ProposalNetwork does not detect"),
    ({"MODEL.BACKBONE.NAME": "Foo"}, "MODEL.BACKBONE.NAME Foo: No object named 'Foo' found in 'BACKBONE' registry"),
    ({"MODEL.BACKBONE.NAME": "build_resnet_backbone"}, "MODEL.RPN.IN_FEATURES .*: p2 is unknown"),
    ({"MODEL.PROPOSAL_GENERATOR.NAME": "Foo"}, "MODEL.PROPOSAL_GENERATOR.NAME Foo: "),
    ({"MODEL.ANCHOR_GENERATOR.NAME": "Foo"}, "MODEL.ANCHOR_GENERATOR.NAME Foo: "),
    ({"MODEL.RPN.HEAD_NAME": "Foo"}, "MODEL.RPN.HEAD_NAME Foo: "),
    ({"MODEL.ROI_HEADS.NAME": "Foo"}, "MODEL.ROI_HEADS.NAME Foo: "),
    ({"MODEL.ROI_BOX_HEAD.NAME": "Foo"}, "MODEL.ROI_BOX_HEAD.NAME Foo: "),
    ({"MODEL.MASK_ON": True, "MODEL.ROI_MASK_HEAD.NAME": "Foo"}, "MODEL.ROI_MASK_HEAD.NAME Foo: "),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "Foo"}, "MODEL.ROI_BOX_HEAD.POOLER_TYPE Foo: Unknown pooler type"),
    ({"MODEL.RESNETS.NORM": "Foo"}, "MODEL.RESNETS.NORM Foo: Foo is unknown"),
    ({"MODEL.RESNETS.NORM": "GN"}, r"MODEL.RESNETS.STEM_OUT_CHANNELS 8: num_channels \(8\) must be divisible"),
    ({"MODEL.FPN.NORM": "Foo"}, "MODEL.FPN.NORM Foo: Foo is unknown"),
    ({"MODEL.FPN.FUSE_TYPE": "Foo"}, "MODEL.FPN: assert fuse_type in "),
    ({"MODEL.FPN.OUT_CHANNELS": -1}, "MODEL.FPN: Trying to create tensor with negative dimension"),
    ({"MODEL.FPN.IN_FEATURES": ["Foo"]}, r"MODEL.FPN.IN_FEATURES \['Foo'\]: Foo is unknown"),
    ({"MODEL.FPN.IN_FEATURES": ["res2", "res4"]}, "MODEL.FPN: Strides 16 4 are not log2 contiguous"),
    ({"MODEL.RPN.IN_FEATURES": ["p9"]}, r"MODEL.RPN.IN_FEATURES \['p9'\]: p9 is unknown"),
    ({"MODEL.ROI_HEADS.IN_FEATURES": ["p9"]}, r"MODEL.ROI_HEADS.IN_FEATURES \['p9'\]: p9 is unknown"),
    ({"MODEL.RESNETS.OUT_FEATURES": ["Foo"]}, "MODEL.*: Available children: stem"),
    ({"MODEL.RESNETS.DEPTH": 51}, "MODEL.RESNETS.DEPTH 51: 51 is unknown"),
    ({"MODEL.RESNETS.DEPTH": 18}, "MODEL.*: Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64"),
    ({"MODEL.RESNETS.RES5_DILATION": 3}, "MODEL.*: res5_dilation cannot be 3"),
    ({"MODEL.RESNETS.NUM_GROUPS": -1}, "MODEL.*: Trying to create tensor with negative dimension"),
    ({"MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64]]}, "MODEL.*: Got sizes of length 2 in anchor generator"),
    ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": []}, "MODEL.*: aspect_ratios in anchor generator cannot be empty"),
    ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0]]}, "MODEL.*: float division by zero"),
    ({"MODEL.ANCHOR_GENERATOR.OFFSET": 2.0}, "MODEL.ANCHOR_GENERATOR.OFFSET 2.0, .*: 2.0 "),
    ({"MODEL.RPN.IOU_LABELS": [1]}, "MODEL.RPN: assert len"),
    ({"MODEL.ROI_HEADS.IOU_THRESHOLDS": [-1]}, "MODEL.ROI_HEADS: assert thresholds"),
    ({"MODEL.ROI_BOX_HEAD.NUM_FC": 0}, "MODEL.*: assert len.conv_dims. . len.fc_dims. > 0"),
    ({"MODEL.ROI_BOX_HEAD.USE_FED_LOSS": True}, "MODEL.*: Please use sigmoid cross entropy loss"),
    (
        {**CASCADE, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False},
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG False: CascadeROIHeads only support class-agnostic",
    ),
    ({**CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.5]}, "MODEL.*: assert len.cascade_bbox_reg_weights."),
    (
        {**CASCADE, "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.4, 0.5, 0.6]},
        r"MODEL.ROI_HEADS.IOU_THRESHOLDS \[0.5\]: assert cascade_ious.0. ==",
    ),
    ({"SOLVER.LR_SCHEDULER_NAME": "Foo"}, "SOLVER.LR_SCHEDULER_NAME Foo: Unknown LR scheduler"),
    ({"SOLVER.WARMUP_METHOD": "Foo"}, "SOLVER.WARMUP_METHOD Foo: Unknown warmup method"),
    ({**CLIPPING, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "Foo"}, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE Foo: 'Foo' is not a "),
    ({"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.BASE_LR": 0.0}, "SOLVER.BASE_LR.*division by zero"),
    ({"DATALOADER.SAMPLER_TRAIN": "Foo"}, "DATALOADER.SAMPLER_TRAIN is Foo"),
    (
        {"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "DATALOADER.RANDOM_SUBSET_RATIO": 0.3},
        "DATALOADER.RANDOM_SUBSET_RATIO 0.3: assert self._size_subset > 0",
    ),
    ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "Foo"}, "INPUT.MIN_SIZE_TRAIN_SAMPLING Foo: Foo "),
    ({"INPUT.MIN_SIZE_TRAIN": [-1]}, "INPUT.MIN_SIZE_TRAIN is .*, none below 0"),
    ({"INPUT.MAX_SIZE_TRAIN": 0}, "INPUT.*: height and width must be > 0"),
    ({"INPUT.RANDOM_FLIP": "Foo"}, "INPUT.*: At least one of horiz or vert"),
    ({"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "Foo"}, "INPUT.CROP: assert crop_type in"),
    ({"INPUT.CROP.ENABLED": True, "INPUT.CROP.SIZE": [2.0, 2.0, 2.0]}, "INPUT: operands could not be broadcast"),
]
RETINANETS = [
    ({"MODEL.RETINANET.NORM": "Foo"}, "MODEL.RETINANET.NORM Foo: Foo is unknown"),
    ({"MODEL.RETINANET.IN_FEATURES": ["p9"]}, r"MODEL.RETINANET.IN_FEATURES \['p9'\]: p9 is unknown"),
    ({"MODEL.RETINANET.IOU_THRESHOLDS": [0.5]}, "MODEL.RETINANET: assert len.labels."),
]
#: What only the first call of a network shows.
FIRST_CALLS = [
    ({"MODEL.RPN.BBOX_REG_LOSS_TYPE": "Foo"}, "MODEL.RPN.BBOX_REG_LOSS_TYPE Foo: Invalid dense box regression loss"),
    ({"MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "Foo"}, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE Foo: Invalid dense box"),
    ({"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [1]}, "MODEL.*: .*out of bounds"),
    ({"MODEL.ANCHOR_GENERATOR.SIZES": [[0]]}, "MODEL: Input boxes to Box2BoxTransform are not valid"),
    ({"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated"}, "MODEL.*: assert rois.dim.. == 2"),
]


def built(name, folder, settings):
    """A trainer, of one record of an image that is not there."""
    return build_trainer(small_cfg(name, **settings, OUTPUT_DIR=str(folder)), [RECORD])


def line_about(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize(
    ("name", "settings", "message"), [("r18", *case) for case in R_CNNS] + [("retinanet_r50", *c) for c in RETINANETS]
)
def test_what_does_not_fit(tmp_path, name, settings, message):
    with pytest.raises(ConfigError) as error:
        built(name, tmp_path, settings)
    assert re.match(message, line_about(error)), line_about(error)


def test_a_teachers(tmp_path):
    with pytest.raises(ConfigError, match=r"^TEACHER.MODEL.FPN.NORM Foo: Foo is unknown"):
        built("review_dkd_r101_r18", tmp_path, {"TEACHER.MODEL.FPN.NORM": "Foo"})
    cascade = {f"TEACHER.{key}": value for key, value in CASCADE.items()}
    cascade["TEACHER.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"] = False
    with pytest.raises(ConfigError, match=r"^TEACHER.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG False: Cascade"):
        built("review_dkd_r101_r18", tmp_path, cascade)


@pytest.mark.parametrize(("settings", "message"), FIRST_CALLS)
def test_the_first_call(tmp_path, settings, message):
    trainer = built("r18", tmp_path, settings)
    with pytest.raises(ConfigError) as error, EventStorage(0):
        trainer.model.train()(batch())
    assert re.match(message, line_about(error)), line_about(error)


def test_later_calls_are_no_settings_fault(tmp_path):
    trainer = built("r18", tmp_path, {})
    with EventStorage(0):
        trainer.model.train()(batch())
        with pytest.raises(KeyError):
            trainer.model([{}])


def test_deformable_convolutions_without_the_extension(tmp_path, monkeypatch):
    monkeypatch.setattr("d2distill.detection.rules.find_spec", lambda name: None)
    for prefix in ("", "TEACHER."):
        key = f"{prefix}MODEL.RESNETS.DEFORM_ON_PER_STAGE"
        with pytest.raises(MissingDependencyError, match=f"^{key}: deformable convolutions need .* extension"):
            small_cfg("r18", **{key: [False, False, False, True]})


def test_a_schedule_that_cannot_be_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr("d2distill.detection.trainer.comm.get_world_size", lambda: 4)
    scaled = {"SOLVER.REFERENCE_WORLD_SIZE": 1, "SOLVER.CHECKPOINT_PERIOD": 1}
    with pytest.raises(ConfigError, match=r"WORLD_SIZE 1 scaled to 4 processes: SOLVER.CHECKPOINT_PERIOD is 0"):
        train(small_cfg("r18", **scaled, OUTPUT_DIR=str(tmp_path)))


@pytest.mark.parametrize(
    "settings",
    [
        {"DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler"},  # of all images, by default
        {"INPUT.FORMAT": "L", "MODEL.PIXEL_MEAN": [128.0], "MODEL.PIXEL_STD": [50.0]},
        {"INPUT.FORMAT": "L"},  # three channels, alike
        {**CASCADE},
        {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [900, 900]},
    ],
)
def test_settings_that_work(tmp_path, settings):
    trainer = built("r18", tmp_path, settings)
    gray = settings.get("INPUT.FORMAT") == "L"
    images = [{**x, "image": x["image"][:1] if gray else x["image"]} for x in batch()]
    with EventStorage(0):
        losses = trainer.model.train()(images)
    assert all(loss.isfinite() for loss in losses.values())
