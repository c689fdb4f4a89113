"""Settings that a library refuses, or that only a computation shows to be wrong: one line before the training."""

import pytest

from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.config import import_extensions
from d2distill.common.errors import ConfigError
from tests.classification.tiny_training import small_cfg

OWN = """
from d2distill.classification.models.registry import register

@register("cifar/own_{name}")
def build(num_classes):
    return {value}
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"INPUT__SIZE": 1}, r"^INPUT.SIZE 1 with RESIZE 1: .* \(RuntimeError in torch\."),
        (
            {"INPUT__RESIZE": 10**11},
            r"^INPUT.SIZE 16 with RESIZE 100000000000: Storage size .*overflowed .* \(RuntimeError",
        ),
        ({"INPUT__RESIZE": 10**20}, r"^INPUT.SIZE 16 with .*Overflow when unpacking long long \(TypeError in torch\."),
        (
            {"MODEL__TEACHER__CACHE": "cache", "MODEL__TEACHER__CACHE_GB": 1e300},
            r"^MODEL.TEACHER.CACHE_GB 1e\+300: cannot convert float infinity to integer",
        ),
        ({"SOLVER__EPOCHS": 10**20}, "^SOLVER: cannot fit 'int' into an index-sized integer .*OverflowError in d2dist"),
        ({"DISTILL__METHODS": ["CRD"], "DISTILL__CRD__K": 10**11}, "^DISTILL.CRD: CRD takes K from 1 to 10,000,000"),
        ({"DISTILL__METHODS": ["CRD"], "DISTILL__CRD__FEAT_DIM": 10**17}, r"^DISTILL.CRD: .* \(RuntimeError in torch"),
    ],
)
def test_what_a_library_refuses(tmp_path, settings, message):
    cfg = small_cfg(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        build_trainer(cfg, *load_datasets(cfg))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "error"),
    [("num_classes['x']", "TypeError"), ("{}['resnet']", "KeyError"), ("1 / 0", "ZeroDivisionError")],
)
def test_an_own_network_that_fails_is_named_with_its_line(tmp_path, value, error):
    (tmp_path / "own.py").write_text(OWN.format(name=error, value=value))
    import_extensions([str(tmp_path / "own.py")])
    cfg = small_cfg(tmp_path, MODEL__STUDENT__NAME=f"own_{error}")
    with pytest.raises(ConfigError, match=rf"^MODEL.STUDENT.NAME: .* \({error} in {tmp_path}/own.py, line 6; --debug"):
        build_trainer(cfg, *load_datasets(cfg))
