"""d2distill-benchmark: that it compares like with like, and what it writes."""

import inspect
import json
import os
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.utils.events import EventStorage

from d2distill.classification import config as classification_config
from d2distill.common import distillers
from d2distill.common.errors import ConfigError
from d2distill.configs import find_config
from d2distill.detection import config as detection_config
from d2distill.tools import benchmark_classification, benchmark_detection, usual_losses
from d2distill.tools.benchmark import SUITES, main
from d2distill.tools.benchmark_losses import loss_pairs, loss_tensors, peak_memory, use_usual_losses
from d2distill.tools.benchmark_runs import parse_variants, ratios
from tests.detection.tiny_detectors import SMALL, TEACHER

ROOT = Path(__file__).resolve().parents[2]
PAIRS = {name: pair for name, *pair in loss_pairs()}
TINY = ["MODEL.DEVICE", "cpu", "MODEL.TEACHER.NAME", "resnet14", "MODEL.TEACHER.WEIGHTS", "", "SOLVER.IMS_PER_BATCH"]
# A benchmark is a long run, which would compile its teacher.
TINY += ["8", "DATASETS.TRAIN_SIZE", "32", "DATALOADER.NUM_WORKERS", "0", "SOLVER.COMPILE", ""]
CONFIG = find_config("cls/digits_vgg8_r8_dkd.yaml")


@pytest.fixture
def usual(monkeypatch):
    """The formulas as usually written, within the test."""
    for name, _ in inspect.getmembers(usual_losses, inspect.isfunction):
        module = import_module(f"{distillers.__name__}.{name}")
        monkeypatch.setattr(module, f"{name}_loss", getattr(module, f"{name}_loss"))
    return use_usual_losses()


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_usual_formulas_are_ours(name):
    usual, ours, names = PAIRS[name]
    tensors = loss_tensors(names, 8, 20, bank=(50, 16))
    if "target" in names:  # two classes below the target's, where the usual RLD is defined
        tensors[1].scatter_(1, tensors[2][:, None], 1.0)
    values = [loss(*tensors) for loss in (usual, ours)]
    assert values[1].item() == pytest.approx(values[0].item(), rel=1e-5, abs=1e-6)
    gradients = [torch.autograd.grad(value, tensors[0])[0] for value in values]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, (*_, names) in PAIRS.items() if "logits_student" in names])
def test_memory_of_losses_on_logits(name):
    """Linear in the classes, 10 copies of the logits at most, and for what is published with masks less than there."""
    usual, ours, names = PAIRS[name]
    copies = {}
    for classes in (500, 2000):
        tensors = loss_tensors(names, 16, classes)
        copies[classes] = [
            peak_memory(lambda loss=loss, t=tensors: loss(*t).backward()) / tensors[0].nbytes for loss in (usual, ours)
        ]
    assert copies[2000][1] < 10 and copies[2000][1] == pytest.approx(copies[500][1], rel=0.05)
    if name in ("dkd", "nkd", "dist"):
        assert copies[2000][1] < copies[2000][0]


def test_plain_and_ours_compute_the_same_losses(tmp_path, usual):
    assert {"dkd", "kd", "rkd"} <= usual
    cfg, trainer, notes = benchmark_classification.trainer_for(CONFIG, TINY, False, str(tmp_path))
    assert notes == []  # real digits
    dataset = benchmark_classification.load_datasets(cfg)[0]
    loop = benchmark_classification.PlainLoop(cfg, dataset)
    loop.model.load_state_dict(trainer.task.model.state_dict())
    loop.model.teacher.load_state_dict(trainer.task.model.teacher.state_dict())
    images, label, index = next(loop.batches)
    model, shape = trainer.task.model.train(), (-1, 1, 1)
    mean, std = (getattr(model.student_norm, name).view(shape) for name in ("mean", "std"))
    pixels = (images * std + mean).round()
    expected = model({"image": pixels, "label": label, "index": index}, epoch=1)
    found = loop.losses(images, label, index)
    assert list(found) == list(expected) == ["loss_ce", "loss_dkd"]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4)
    bare = benchmark_classification.BareStep(trainer, live=False)
    known = bare.known.logits.clone()
    bare.step()
    assert torch.equal(bare.known.logits, known)
    steps = benchmark_classification.TrainerSteps(trainer)
    for _ in range(2):
        steps.step()
    assert trainer.iter == 1
    steps.restart()
    steps.step()
    assert trainer.iter == 0
    steps.close()


def test_synthetic_images_have_the_shape_of_the_data(tmp_path):
    opts = ["MODEL.DEVICE", "cpu", "DATASETS.ROOT", str(tmp_path), "DATASETS.TRAIN_SIZE", "12"]
    config = find_config("cls/cifar100_r32x4_r8x4_dkd.yaml")
    cfg, (dataset, _), notes = benchmark_classification.prepare(config, opts, False, str(tmp_path))
    assert dataset.images.shape == (12, 3, 32, 32) and dataset.num_classes == 100 and not cfg.MODEL.TEACHER.WEIGHTS
    assert notes == ["random uint8 images 12x3x32x32 of 100 classes, networks of random weights"]
    opts += ["SOLVER.IMS_PER_BATCH", "4"]
    imagenet = find_config("cls/imagenet_r34_r18_dkd.yaml")
    cfg, (dataset, _), _ = benchmark_classification.prepare(imagenet, opts, True, str(tmp_path))
    assert dataset.images.shape == (12, 3, 224, 224) and cfg.MODEL.NUM_CLASSES == 1000
    cfg.DATALOADER.NUM_WORKERS = 0
    images, *_ = next(benchmark_classification.plain_batches(cfg, dataset))
    assert images.shape == (4, 3, 224, 224)


def test_the_published_loop_of_detectors_computes_our_losses(tmp_path):
    small = [item for pair in {**SMALL, **TEACHER, "MODEL.RESNETS.DEPTH": 50}.items() for item in pair]
    arguments = {"config": find_config("det/dkd_r101_r18.yaml"), "opts": [str(item) for item in small]}
    cfg, batch = benchmark_detection.prepare(**arguments, folder=str(tmp_path), shape=[2, 64, 96])
    loop = benchmark_detection.TwoHeads(cfg, batch)
    found = []
    for losses in (loop.losses, lambda: loop.model(batch)):
        torch.manual_seed(3)
        with EventStorage(), torch.jit.optimized_execution(False):
            found.append({name: value.item() for name, value in losses().items()})
    assert found[0] == pytest.approx(found[1], rel=1e-4) and "loss_dkd" in found[0]
    runner = benchmark_detection.ours(**arguments, folder=str(tmp_path), shape=[2, 64, 96])
    runner.step()
    runner.close()
    assert runner.images == 2


def test_ratios_are_medians_of_rounds():
    rounds = {"plain": [4.0, 2.0, 9.0], "ours": [2.0, 2.0, 3.0], "limit": [1.0, 1.0, 1.0]}
    results = {name: {"kind": name, "rounds": seconds} for name, seconds in rounds.items()}
    results["full"] = {"kind": "ours", "failed": "no such key"}
    assert ratios(results) == {"ours/plain": 2.0, "ours/limit": 0.5}
    (variant,) = parse_variants(["a b: KEY '' OTHER {tmp}"], True).items()
    assert variant[0] == "a b" and variant[1].opts == ["KEY", "", "OTHER", "{tmp}"] and variant[1].again


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_suites_are_configurations(name):
    device = {"cpu": "cpu", "gpu": "cuda"}[name]
    for case in yaml.safe_load(SUITES.read_text())[name].values():
        load = (detection_config if case["task"] == "detection" else classification_config).load_cfg
        assert f"MODEL.DEVICE {device}" in case["settings"]
        opts = shlex.split(case["settings"].replace(f"MODEL.DEVICE {device}", "MODEL.DEVICE cpu"))
        cfg = load(find_config(case["config"]), [*opts, "TEACHER.MODEL.WEIGHTS", ""] if "shape" in case else opts)
        assert cfg.DISTILL.METHODS == ["DKD"]
        for variant in parse_variants([*case.get("with", []), *case.get("again", [])], False).values():
            assert variant.opts
            load(find_config(case["config"]), [*opts, *variant.opts])


def test_user_errors_are_found_before_anything_is_measured(capsys, monkeypatch):
    for line, words in {
        f"--config-file {CONFIG} SOLVER.NIX 2": "unknown config key SOLVER.NIX",
        "--suite cpu --only zebra": "--only zebra: none of the cases has it: res32x4",
        "--suite cpu --losses": "name one of --config-file, --suite and --losses",
        "--suite cpu SOLVER.AMP bf16": "a suite is a fixed list",
    }.items():
        monkeypatch.setattr(sys, "argv", ["d2distill-benchmark", *line.split()])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(ConfigError, match="NAME: KEY VALUE"):
        parse_variants(["SOLVER.AMP bf16"], False)


@pytest.mark.slow
def test_the_command_writes_every_field(tmp_path):
    line = [sys.executable, ROOT / "tools/benchmark.py", "--config-file", CONFIG, "--quick", "--threads", "1"]
    line += [
        "--with",
        "parts: SOLVER.ACCUMULATE 2",
        "--again",
        "twice: SEED 1",
        "--output",
        tmp_path / "b" / "all.json",
    ]
    done = subprocess.run([*map(str, line), *TINY], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads((tmp_path / "b" / "all.json").read_text())
    assert report["machine"]["cores"] and "--quick" in report["machine"]["command"]
    step, data = report["cases"].values()
    assert list(step["variants"]) == ["plain", "ours", "compute", "limit", "parts", "twice"]
    assert list(data["ratios"]) == ["ours/plain"]
    for case in (step, data):
        assert case["steps"] == case["rounds"] == 2
        for facts in case["variants"].values():
            assert len(facts["rounds"]) == 2 and facts["peak_mb"] > 10
            assert facts["images_per_second"] == pytest.approx(8 / facts["seconds_per_step"])
    others = ("plain", "compute", "limit")
    assert set(step["ratios"]) == {f"{own}/{other}" for own in ("ours", "parts", "twice") for other in others}
    assert b"x plain" in done.stdout and b"ms/step" in done.stdout
