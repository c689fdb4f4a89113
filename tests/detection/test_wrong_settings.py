"""Wrong settings of detectors: one line that names the setting, before anything is trained."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from d2distill.commands import train_det
from d2distill.common.errors import ConfigError, UserError
from d2distill.detection.data import build_train_loader, check_test_sets, load_training_set
from d2distill.detection.trainer import build_trainer
from tests.detection.tiny_detectors import small_cfg

#: Settings of one detector, and what the line must say.
NETWORKS = [
    ("r18", {"MODEL.META_ARCHITECTURE": "Foo"}, "MODEL.META_ARCHITECTURE: no Foo"),
    ("r18", {"MODEL.BACKBONE.NAME": "build_resnet"}, "MODEL.BACKBONE.NAME build_resnet: .*BACKBONE"),
    ("r18", {"MODEL.PROPOSAL_GENERATOR.NAME": "Foo"}, "MODEL.PROPOSAL_GENERATOR.NAME Foo: "),
    ("r18", {"MODEL.ANCHOR_GENERATOR.NAME": "Foo"}, "MODEL.ANCHOR_GENERATOR.NAME Foo: "),
    ("r18", {"MODEL.RPN.HEAD_NAME": "Foo"}, "MODEL.RPN.HEAD_NAME Foo: "),
    ("r18", {"MODEL.ROI_HEADS.NAME": "Foo"}, "MODEL.ROI_HEADS.NAME Foo: "),
    ("r18", {"MODEL.ROI_BOX_HEAD.NAME": "Foo"}, "MODEL.ROI_BOX_HEAD.NAME Foo: "),
    ("r18", {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "Foo"}, "MODEL.ROI_BOX_HEAD.POOLER_TYPE Foo: Unknown pooler type"),
    ("r18", {"MODEL.RESNETS.NORM": "Foo"}, "MODEL.RESNETS.NORM Foo: Foo is unknown"),
    ("r18", {"MODEL.FPN.NORM": "Foo"}, "MODEL.FPN.NORM Foo: Foo is unknown"),
    ("r18", {"MODEL.FPN.FUSE_TYPE": "Foo"}, "MODEL: assert fuse_type in "),
    ("r18", {"MODEL.RESNETS.DEPTH": 51}, "MODEL.RESNETS.DEPTH 51: 51 is unknown"),
    ("r18", {"MODEL.RESNETS.DEPTH": 18}, "MODEL: Must set MODEL.RESNETS.RES2_OUT_CHANNELS = 64"),
    ("r18", {"MODEL.RESNETS.OUT_FEATURES": ["res9"]}, "MODEL.*: Available children: stem, res2"),
    ("r18", {"MODEL.FPN.IN_FEATURES": ["res9"]}, "MODEL.FPN.IN_FEATURES"),
    ("r18", {"MODEL.FPN.IN_FEATURES": []}, "MODEL"),
    ("r18", {"MODEL.RPN.IN_FEATURES": ["p9"]}, "MODEL.RPN.IN_FEATURES"),
    ("r18", {"MODEL.ROI_HEADS.IN_FEATURES": ["p9"]}, "MODEL.ROI_HEADS.IN_FEATURES"),
    ("r18", {"MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64]]}, "MODEL: Got sizes of length 2 in anchor generator"),
    ("r18", {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": []}, "MODEL: aspect_ratios in anchor generator cannot be empty"),
    ("r18", {"MODEL.RESNETS.RES5_DILATION": 3}, "MODEL: res5_dilation cannot be 3"),
    ("retinanet_r50", {"MODEL.RETINANET.NORM": "Foo"}, "MODEL.RETINANET.NORM Foo"),
    ("retinanet_r50", {"MODEL.RETINANET.IN_FEATURES": ["p9"]}, "MODEL.RETINANET.IN_FEATURES"),
]
