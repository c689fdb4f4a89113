"""What makes a step faster changes nothing but rounding: compiled networks, memory formats, fused optimizers."""

import logging
import shutil

import pytest
import torch

from d2distill.classification.config import validate
from d2distill.classification.inputs import resolve_inputs
from d2distill.classification.models import resnet
from d2distill.classification.models.registry import MODEL_REGISTRY, register
from d2distill.classification.solver import build_optimizer
from d2distill.classification.speed import networks_to_compile, prepare_networks
from d2distill.classification.trainer import build_trainer, load_datasets
from d2distill.common.distillers import DISTILLERS, Distiller
from d2distill.common.errors import ConfigError
from tests.classification.distill_models import METHODS, build, make_batch, make_cfg, seeded_losses
from tests.classification.tiny_training import run, small_cfg
from tests.interruptions import assert_identical, read_state

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def prepared(methods, *opts, steps=10):
    """A model and its settings, as a training has them."""
    model = build(methods, *opts)
    cfg = resolve_inputs(make_cfg(methods, "INPUT.SIZE", 32, *opts))
    prepare_networks(model, cfg, steps)
    return model, cfg


def test_auto_compiles_the_teacher_of_a_long_run():
    """On a CPU by the multiply-adds of all its steps: here 2e13 / (64 images x 26e6 of a ResNet-14)."""
    model, cfg = prepared("KD")
    few, many = 10_000, 14_000
    assert networks_to_compile(model, cfg, few) == set() and networks_to_compile(model, cfg, many) == {"teacher"}
    for value, chosen in (("", set()), ("teacher", {"teacher"}), ("all", {"teacher", "student"})):
        cfg.SOLVER.COMPILE = value
        assert networks_to_compile(model, cfg, few) == networks_to_compile(model, cfg, many) == chosen
    model.teacher = None
    assert networks_to_compile(model, cfg, many) == {"student"}
    cfg.SOLVER.COMPILE = "auto"
    assert networks_to_compile(model, cfg, many) == set()


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_gives_every_method_the_same_losses(name):
    found = {}
    for kind in ("channels_last", "contiguous"):
        model, _ = prepared(name, "SOLVER.MEMORY_FORMAT", kind)
        assert model.student.layer1[0].conv1.weight.is_contiguous() == (kind == "contiguous")
        for step in range(2):
            losses = seeded_losses(model, make_batch(8, seed=step + 1), step=step)
            sum(losses.values()).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found[kind] = losses, torch.cat(gradients)
        if model.teacher is not None:  # the tests share it
            model.teacher.to(memory_format=torch.contiguous_format)
    (losses, gradient), (expected, expected_gradient) = found.values()
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-5)
    assert (gradient - expected_gradient).norm() <= 1e-2 * expected_gradient.norm()


def test_what_stays_eager_is_logged(caplog):
    class Looking(Distiller):
        needs = ("module:layer1.0.conv1",)

        def forward(self, student, teacher, batch):
            return student.extras["module:layer1.0.conv1"].mean()

    DISTILLERS.register(Looking)
    try:
        with caplog.at_level(logging.INFO, "detectron2.d2distill"):
            model, _ = prepared("Looking", "SOLVER.COMPILE", "all")
        assert model.compiled_student is None and seeded_losses(model, make_batch())["loss_looking"].isfinite()
    finally:
        DISTILLERS._obj_map.pop("Looking")
    assert [line for line in caplog.messages if "eagerly" in line] == [
        "The teacher CifarResNet runs eagerly: a method reads module:layer1.0.conv1, which a compiled network does not "
        "give",
        "The student runs eagerly: a method reads module:layer1.0.conv1, which a compiled network cannot give",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "detectron2.d2distill"):
        prepared("KD", "SOLVER.OPTIMIZER", "DOT", "SOLVER.COMPILE", "all")
    assert any("DOT runs two backward passes" in line for line in caplog.messages)


@pytest.mark.parametrize(("key", "value"), [("COMPILE", "student"), ("MEMORY_FORMAT", "nhwc")])
def test_settings_that_do_not_exist(tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"SOLVER.{key} is '{value}', but must be auto, "):
        validate(small_cfg(tmp_path, **{f"SOLVER__{key}": value}))


def test_a_fused_optimizer_makes_the_same_steps():
    """What a GPU has by default: on a CPU torch has it too."""
    weights = {}
    for fused in (None, True):
        model, cfg = prepared("KD")
        optimizer = build_optimizer(model, cfg.SOLVER)
        assert optimizer.param_groups[0]["fused"] is None
        optimizer.param_groups[0]["fused"] = fused
        for step in range(50):
            optimizer.zero_grad()
            sum(seeded_losses(model, make_batch(2, size=(8, 8), seed=step + 1)).values()).backward()
            optimizer.step()
        weights[fused] = torch.cat([parameter.detach().flatten() for parameter in model.student.parameters()])
    assert (weights[True] - weights[None]).norm() <= 1e-3 * weights[None].norm()


@pytest.fixture
def tiny_network(tmp_path, monkeypatch):
    """``resnet_tiny``, and a folder for what is compiled, which is removed with the test's."""
    register("cifar/resnet_tiny")(
        lambda num_classes: resnet.CifarResNet(num_classes, resnet.BasicBlock, depths=(1,), widths=(4, 4))
    )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch._dynamo.reset()
    yield
    MODEL_REGISTRY._obj_map.pop("cifar/resnet_tiny")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_is_the_eager_one_but_for_rounding_and_resumes_exactly(tmp_path, tiny_network):
    """51 steps. The step after the checkpoint, a resumed run's first, has a smaller batch: an epoch's last."""

    def cfg_of(folder, compiled):
        tiny = {"MODEL__STUDENT__NAME": "resnet_tiny", "MODEL__TEACHER__NAME": "resnet_tiny", "TEST__EVAL_PERIOD": 17}
        last = {"SOLVER__EPOCHS": 17, "SOLVER__CHECKPOINT_STEPS": 17, "SOLVER__CHECKPOINT_PERIOD": 17}
        return small_cfg(tmp_path / folder, SOLVER__COMPILE=compiled, SOLVER__CHECKPOINT_KEEP=9, **tiny, **last)

    run(cfg_of("eager", ""))
    run(cfg_of("compiled", "all"))
    eager, compiled = (read_state(tmp_path / folder, 51) for folder in ("eager", "compiled"))
    assert "eagerly" not in (tmp_path / "compiled/log.txt").read_text()
    losses, expected = (
        [line["total_loss"] for line in lines if "total_loss" in line] for _, _, lines in (compiled, eager)
    )
    assert losses == pytest.approx(expected, rel=1e-3) and losses != expected
    for name, value in eager[0].items():
        torch.testing.assert_close(compiled[0][name], value, rtol=1e-2, atol=1e-3)
    for step in (34, 51):
        (tmp_path / f"compiled/model_{step:07d}.pth").unlink()
    torch._dynamo.reset()
    run(cfg_of("compiled", "all"), resume=True)
    assert_identical(read_state(tmp_path / "compiled", 51), compiled)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("amp", ["", "bf16", "fp16"])
def test_no_step_waits_for_the_gpu(tmp_path, amp):
    # SimKD deploys another student; torch's SVD tells the CPU whether it converged.
    methods = [name for name in METHODS if name not in ("SimKD", "KDSVD")]
    cfg = small_cfg(tmp_path, MODEL__DEVICE="cuda", SOLVER__AMP=amp, DISTILL__METHODS=methods)
    trainer = build_trainer(cfg, *load_datasets(cfg))
    step, steps = trainer.train_step, []

    def watched_step():
        # The first ones tune and allocate, and check what is checked once.
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")
        step()
        torch.cuda.set_sync_debug_mode("default")
        steps.append(trainer.iter)

    trainer.run_step = watched_step
    trainer.run()
    assert len(steps) == 9


@needs_gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize(
    "settings", [{"COMPILE": "all"}, {"COMPILE": "all", "CUDA_GRAPH": True}, {"MEMORY_FORMAT": "channels_last"}]
)
@pytest.mark.parametrize("amp", ["", "bf16"])
def test_switches_on_a_gpu_change_rounding_alone(tmp_path, settings, amp):
    logs, name, usual = [], "".join(settings) + amp, {"COMPILE": "", "MEMORY_FORMAT": "contiguous"}
    for folder, switches in ((f"{name}eager", usual), (f"{name}fast", settings)):
        cfg = small_cfg(
            tmp_path / folder, MODEL__DEVICE="cuda", SOLVER__AMP=amp, SOLVER__EPOCHS=17, TEST__EVAL_PERIOD=17
        )
        cfg.merge_from_list([item for name, value in switches.items() for item in (f"SOLVER.{name}", value)])
        run(cfg)
        assert "eagerly" not in (tmp_path / folder / "log.txt").read_text()
        logs.append([line["loss_ce"] for line in read_state(tmp_path / folder, 51)[2] if "loss_ce" in line])
    assert logs[0][:5] == pytest.approx(logs[1][:5], rel=0.02)


@needs_gpu
@pytest.mark.parametrize(("name", "amp"), [*((name, "") for name in METHODS), ("DKD", "fp16"), ("MGD", "bf16")])
def test_a_replayed_step_is_the_eager_one(tmp_path, monkeypatch, name, amp):
    """All but KDSVD's, whose factorization waits for the GPU. Warm-ups change a weight in each epoch."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    logs, waits = [], name == "KDSVD"
    for graph in (False, True):
        folder = tmp_path / f"{name}{amp}{graph}"
        longer = {"SOLVER__EPOCHS": 8, "TEST__EVAL_PERIOD": 8, "LOG_PERIOD": 1, "CUDNN_BENCHMARK": False}
        cfg = small_cfg(folder, MODEL__DEVICE="cuda", SOLVER__AMP=amp, **longer)
        given = ["DISTILL.METHODS", [name], "SOLVER.CUDA_GRAPH", graph, f"DISTILL.{name.upper()}.WARMUP", 6]
        cfg.merge_from_list([*given, "SOLVER.CLIP_GRAD_NORM", 5.0])
        run(cfg)
        text = (folder / "log.txt").read_text()
        assert ("The step is replayed" in text, "is not replayed" in text) == (graph and not waits, graph and waits)
        logs.append([line["total_loss"] for line in read_state(folder, 24)[2] if "total_loss" in line])
    # Some methods' gradients are atomic additions, with which two eager runs part as well.
    assert logs[1][:12] == pytest.approx(logs[0][:12], rel=2e-3) and len(logs[0]) == 24


def test_mixed_precision_follows_full_precision(tmp_path):
    """51 steps. bf16 has 8 bits, and steps add up."""
    logs = {}
    for amp in ("", "bf16"):
        cfg = small_cfg(tmp_path / f"amp{amp}", SOLVER__AMP=amp, SOLVER__EPOCHS=17, TEST__EVAL_PERIOD=17, LOG_PERIOD=1)
        run(cfg)
        lines = read_state(tmp_path / f"amp{amp}", 51)[2]
        logs[amp] = [line["loss_ce"] for line in lines if "loss_ce" in line]
    assert len(logs[""]) == 51 and logs["bf16"] != logs[""]
    assert logs["bf16"][:4] == pytest.approx(logs[""][:4], rel=0.01)
    assert logs["bf16"] == pytest.approx(logs[""], rel=0.08)
