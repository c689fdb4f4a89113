"""Short runs with every optimizer, schedule and precision; each resumes from a checkpoint as if never stopped."""

import functools
import math
import shutil

import pytest
import torch

from d2distill.classification.config import validate
from d2distill.common.distillers import DISTILLERS
from d2distill.common.errors import ConfigError
from tests.classification.distill_models import WITH_TEACHER, loss_of
from tests.classification.tiny_training import STEPS, run, small_cfg, state
from tests.interruptions import assert_identical

pytestmark = pytest.mark.slow


ALONE = [name for name, _ in DISTILLERS if name not in WITH_TEACHER]
TWO = ["wrn_16_1", "resnet8"]
SETTINGS = {
    "plain": {},
    "bf16": {"SOLVER__AMP": "bf16"},
    "fp16": {"SOLVER__AMP": "fp16"},
    "adamw cosine": {
        "SOLVER__OPTIMIZER": "AdamW",
        "SOLVER__BASE_LR": 0.002,
        "SOLVER__LR_SCHEDULE": "cosine",
        "SOLVER__WARMUP_EPOCHS": 1,
    },
    "clipped": {"SOLVER__CLIP_GRAD_NORM": 0.5},
    "clipped fp16": {"SOLVER__CLIP_GRAD_NORM": 0.5, "SOLVER__AMP": "fp16"},
    "dot": {"SOLVER__OPTIMIZER": "DOT"},
    "dot bf16 cosine": {"SOLVER__OPTIMIZER": "DOT", "SOLVER__AMP": "bf16", "SOLVER__LR_SCHEDULE": "cosine"},
    "ema accumulated": {"SOLVER__EMA_DECAY": 0.9, "SOLVER__ACCUMULATE": 3},
    "mixed": {"INPUT__MIXUP": 0.8, "INPUT__CUTMIX": 1.0, "SOLVER__LABEL_SMOOTHING": 0.1},
    "simkd": {"DISTILL__METHODS": ["SimKD"], "DISTILL__CE_WEIGHT": 0.0, "SOLVER__EMA_DECAY": 0.9},
    "two teachers": {"MODEL__TEACHER__NAME": TWO, "MODEL__TEACHER__SHARES": [2.0, 1.0]},
    "no teacher": {"MODEL__TEACHER__NAME": "", "DISTILL__METHODS": ALONE},
}


def cfg_of(folder, settings):
    # The checkpoint after step 5, in the middle of an epoch, stays.
    always = {"DISTILL__METHODS": ["KD"], "SOLVER__CHECKPOINT_KEEP": 9, "TEST__EVAL_PERIOD": 3}
    return small_cfg(folder, **{**always, **settings})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was not stopped, by the name of its settings; each is made once."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp("run")
        run(cfg_of(path, SETTINGS[name]))
        return path

    return folder


def losses_of(lines, name):
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_ends_finite_and_resumes_exactly(tmp_path, whole, name):
    cfg = cfg_of(tmp_path, SETTINGS[name])
    expected = student, _, lines = state(whole(name))
    assert all(value.isfinite().all() and value.dtype in (torch.float32, torch.int64) for value in student.values())
    for loss in ("total_loss", "loss_ce", *map(loss_of, cfg.DISTILL.METHODS)):
        assert len(losses_of(lines, loss)) == 6 and all(map(math.isfinite, losses_of(lines, loss)))
    shutil.copytree(whole(name), tmp_path, dirs_exist_ok=True)
    for step in (6, STEPS):
        (tmp_path / f"model_{step:07d}.pth").unlink()
    assert max(path.name for path in tmp_path.glob("model_*.pth")) == "model_0000005.pth"
    (tmp_path / "student_final.pth").unlink()
    run(cfg, resume=True)
    assert_identical(state(tmp_path), expected)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("plain", "simkd")])
def test_a_setting_does_something(whole, name):
    one, two = (state(whole(n))[0]["fc.weight"] for n in (name, "plain"))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("name", "full"), [("bf16", "plain"), ("fp16", "plain"), ("clipped fp16", "clipped")])
def test_mixed_precision_trains_as_full_precision_does(whole, name, full):
    (_, last, lines), (_, _, expected) = state(whole(name)), state(whole(full))
    assert losses_of(lines, "loss_ce") == pytest.approx(losses_of(expected, "loss_ce"), rel=0.02)
    # The scale of the losses, 65536, let no step overflow.
    assert last["trainer"]["scaler"].get("_growth_tracker", STEPS) == STEPS


def test_the_schedule_is_what_was_asked_for(tmp_path):
    cfg = cfg_of(tmp_path, {"LOG_PERIOD": 1, **SETTINGS["adamw cosine"]})
    run(cfg)
    rates = [line["lr"] for line in state(tmp_path)[2]]
    # 3 steps of linear warm-up from a thousandth to the cosine's value, then the cosine's.
    expected = [0.002 * 0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    assert rates[0] == pytest.approx(0.002 * 0.001) and rates[0] < rates[1] < rates[2] < rates[3]
    assert rates[3:] == pytest.approx(expected[3:])


def test_methods_without_a_teacher_need_none(tmp_path):
    assert ALONE
    cfg_of(tmp_path, {"MODEL__TEACHER__NAME": "", "DISTILL__METHODS": ALONE})
    taught = WITH_TEACHER[0]
    with pytest.raises(ConfigError, match=rf"\['{taught}'\] need a teacher, but MODEL\.TEACHER\.NAME is empty"):
        cfg_of(tmp_path, {"MODEL__TEACHER__NAME": "", "DISTILL__METHODS": [*ALONE, taught]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOLVER__AMP": "fp8"}, "SOLVER.AMP fp8 is none of"),
        ({"SOLVER__OPTIMIZER": "Adam"}, r"SOLVER\.OPTIMIZER Adam is none of SGD, AdamW, DOT \(did you mean AdamW"),
        ({"SOLVER__OPTIMIZER": "DOT", "SOLVER__DELTA": 0.1}, "DELTA 0.1 must be below"),
        ({"SOLVER__OPTIMIZER": "DOT", "DISTILL__METHODS": []}, "DOT needs a method"),
        ({"SOLVER__OPTIMIZER": "DOT", "SOLVER__CLIP_GRAD_NORM": 1.0}, "no CLIP_GRAD_NORM"),
        ({"SOLVER__OPTIMIZER": "DOT", "SOLVER__AMP": "fp16"}, "fp16"),
        ({"MODEL__TEACHER__NAME": TWO, "MODEL__TEACHER__SHARES": [1.0]}, "SHARES has 1 entries for 2 teachers"),
        ({"MODEL__TEACHER__NAME": TWO, "MODEL__TEACHER__SHARES": [1.0, -1.0]}, "SHARES must be positive"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(cfg_of(tmp_path, settings))


def test_steps_that_a_short_run_never_reaches_are_logged(tmp_path):
    run(cfg_of(tmp_path, {"SOLVER__EPOCHS": 1, "SOLVER__STEPS": [150, 180], "DISTILL__METHODS": []}))
    log = (tmp_path / "log.txt").read_text()
    assert "SOLVER.EPOCHS is 1: the learning rate is not lowered at 150, 180 of SOLVER.STEPS" in log
