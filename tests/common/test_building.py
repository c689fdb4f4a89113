"""What libraries raise while something is built: one line that names the setting, and where to look."""

import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.solver import build_lr_scheduler, build_optimizer

from d2distill.common.building import building
from d2distill.common.config import import_extensions
from d2distill.common.errors import ConfigError, DataError

DEBUG = r"; --debug shows the traceback\)$"


def build(node, cfg):
    with building(node, cfg):
        if node == "SOLVER":
            build_lr_scheduler(cfg, build_optimizer(cfg, torch.nn.Linear(1, 1)))
        else:
            build_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("MODEL.BACKBONE.NAME", "resnet", r"^MODEL.BACKBONE.NAME resnet: No object .*\(KeyError in fvcore.common.reg"),
        # A table's KeyError says nothing but the value.
        (
            "MODEL.RESNETS.DEPTH",
            77,
            r"^MODEL.RESNETS.DEPTH 77: 77 is unknown \(KeyError in detectron2.mod",
        ),
        (
            "MODEL.RESNETS.NORM",
            "XN",
            r"^MODEL.RESNETS.NORM XN: XN is unknown \(KeyError in detectron2.layers",
        ),
        ("MODEL.RESNETS.OUT_FEATURES", ["res9"], r"^MODEL: .* \(AssertionError in detectron2.modeling.backbone.resnet"),
        (
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            -1,
            r"^MODEL.RESNETS.STEM_OUT_CHANNELS -1: .*negative dimension .* \(RuntimeError in detectron2",
        ),
        (
            "SOLVER.LR_SCHEDULER_NAME",
            "Step",
            r"^SOLVER.LR_SCHEDULER_NAME Step: Unknown LR scheduler: Step \(ValueError",
        ),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x", r"^SOLVER.CLIP_GRADIENTS.CLIP_TYPE x: 'x' is not a valid Gradient"),
        ("SOLVER.WARMUP_METHOD", "no", r"^SOLVER.WARMUP_METHOD no: Unknown warmup method: no "),
    ],
)
def test_detectron2_and_torch(key, value, error):
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=error + ".*" + DEBUG):
        build(key.partition(".")[0], cfg)


def test_errors_for_users_pass():
    for error in (DataError("label 3"), FileNotFoundError("no such file"), PermissionError(13, "denied", "x")):
        with pytest.raises(type(error)) as caught, building("MODEL", {}):
            raise error
        assert caught.value is error
    for kind in (KeyboardInterrupt, FloatingPointError):  # the latter says that a training diverged
        with pytest.raises(kind), building("MODEL", {}):
            raise kind


def test_what_processes_say_to_each_other_is_no_settings_fault():
    with pytest.raises(ValueError, match="process group has not been initialized"), building("MODEL", {}):
        torch.distributed.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("torch.nn.Linear(-1, 1)", "Trying to create tensor with negative dimension .*RuntimeError"),
        # Without words of its own.
        ("assert 1 == 2", r"assert 1 == 2 \(AssertionError"),
    ],
)
def test_own_code_is_named_with_its_line(tmp_path, line, error):
    (tmp_path / "own.py").write_text(f"import torch\ndef build():\n    {line}\n")
    import_extensions([str(tmp_path / "own.py")])
    own = sys.modules[f"imported_by_config_{tmp_path}/own.py"]
    error = rf"^MODEL: .*{error} in {tmp_path}/own.py, line 3{DEBUG}"
    with pytest.raises(ConfigError, match=error), building("MODEL", {}):
        own.build()


def test_a_script_in_imports_does_not_end_the_run_silently(tmp_path):
    (tmp_path / "own.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError, match=rf"^IMPORTS: {tmp_path}/own.py, line 2: SystemExit: 0$"):
        import_extensions([str(tmp_path / "own.py")])
