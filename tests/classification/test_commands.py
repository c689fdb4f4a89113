"""The command lines, as a user types them, on tiny data in the real formats."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2distill.classification.config import load_cfg
from d2distill.classification.models import build_model
from d2distill.classification.trainer import evaluate, train
from d2distill.common.errors import CheckpointError
from tests.dataset_files import write_cifar100, write_image_folder

ROOT = Path(__file__).resolve().parents[2]
FAST = ["SOLVER.EPOCHS", "1", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


def call(tool, *arguments, fails=False):
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A tiny CIFAR-100 and a teacher's checkpoint as MDistiller publishes them."""
    root = tmp_path_factory.mktemp("cifar")
    write_cifar100(root)
    torch.save({"model": build_model("resnet32x4", 100).state_dict(), "epoch": 240}, root / "teacher.pth")
    return root


def test_evaluation_needs_no_training_images(cifar, tmp_path):
    shutil.copytree(cifar / "cifar-100-python", tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "train").unlink()
    opts = ["DATASETS.ROOT", str(tmp_path), "MODEL.STUDENT.NAME", "resnet32x4", *FAST[2:]]
    accuracy = evaluate(load_cfg("", [*opts, "MODEL.STUDENT.WEIGHTS", str(cifar / "teacher.pth")]))
    assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 100
    with pytest.raises(CheckpointError, match=rf"OUTPUT_DIR {tmp_path} has no student_best\.pth: .*WEIGHTS$"):
        evaluate(load_cfg("", [*opts, "OUTPUT_DIR", str(tmp_path)]))
    weights = build_model("resnet32x4", 100).state_dict()
    weights["fc.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "student_best.pth")
    with pytest.raises(CheckpointError, match=r"student_best\.pth: .* logits of 16 of 16 test images are not finite"):
        evaluate(load_cfg("", [*opts, "OUTPUT_DIR", str(tmp_path)]))


def test_warnings_of_the_data_are_in_the_log_once(tmp_path):
    write_image_folder(tmp_path / "imagenet")
    opts = ["DATASETS.NAME", "imagenet", "DATASETS.ROOT", str(tmp_path), "OUTPUT_DIR", str(tmp_path / "run")]
    opts += ["MODEL.STUDENT.NAME", "resnet8", "INPUT.SIZE", "32"]
    train(load_cfg("", [*opts, *FAST]))
    assert (tmp_path / "run" / "log.txt").read_text().count("as published has 1000") == 1


@pytest.mark.slow
def test_distil_on_cifar100_and_evaluate(cifar, tmp_path):
    config = "configs/cls/cifar100_r32x4_r8x4_dkd.yaml"
    opts = ["DATASETS.ROOT", cifar, "MODEL.TEACHER.WEIGHTS", cifar / "teacher.pth", "OUTPUT_DIR", tmp_path / "run"]
    call("train_cls.py", "--config-file", config, *opts, "SOLVER.IMS_PER_BATCH", 16, *FAST)
    names = {path.name.split(".")[0] for path in (tmp_path / "run").iterdir()}
    assert names >= {
        "config",
        "environment",
        "metrics",
        "events",
        "log",
        "student_final",
        "student_best",
        "model_0000002",
    }
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["parameters"] == 1233540 and 0 <= results["top1"] <= results["best_top1"] <= 100
    student = torch.load(tmp_path / "run" / "student_final.pth", weights_only=True)
    assert list(student) == ["model"]
    build_model("resnet8x4", 100).load_state_dict(student["model"])
    printed = call(
        "eval_cls.py", "-m", "resnet8x4", "-d", "cifar100", "-c", tmp_path / "run" / "student_final.pth",
        "DATASETS.ROOT", cifar, *FAST[2:],
    )  # fmt: skip
    assert f"top-1 {results['top1']:.2f}, top-5 {results['top5']:.2f}" in printed
    printed = call("train_cls.py", "--config-file", config, "--eval-only", *opts, *FAST)
    assert f"top-1 {results['best_top1']:.2f}" in printed


@pytest.mark.slow
def test_what_is_missing_is_said(cifar, tmp_path):
    config = ("--config-file", "configs/cls/cifar100_r32x4_r8x4_dkd.yaml", "OUTPUT_DIR", tmp_path / "run")
    error = call("train_cls.py", *config, "DATASETS.ROOT", tmp_path, fails=True)
    assert f"{tmp_path}/cifar-100-python/train" in error and "torchvision.datasets.CIFAR100" in error
    error = call("train_cls.py", *config, "DATASETS.ROOT", cifar, fails=True)
    assert "MODEL.TEACHER.WEIGHTS" in error and "download_ckpts/cifar_teachers/resnet32x4_vanilla" in error
    error = call("train_cls.py", *config, "SOLVER.BASE_RL", "1", fails=True)
    assert error.strip().startswith("error: unknown config key SOLVER.BASE_RL (did you mean SOLVER.BASE_LR")
    error = call("train_cls.py", *config, "--num-gpus", "99", fails=True)
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "model_0000001.pth").exists()


@pytest.mark.slow
def test_imagenet_pair_on_a_few_images(tmp_path):
    write_image_folder(tmp_path / "imagenet")
    torch.save(build_model("imagenet/ResNet34", 3).state_dict(), tmp_path / "teacher.pth")
    call(
        "train_cls.py", "--config-file", "configs/cls/imagenet_r34_r18_dkd.yaml", "DATASETS.ROOT", tmp_path,
        "MODEL.TEACHER.WEIGHTS", tmp_path / "teacher.pth", "OUTPUT_DIR", tmp_path / "run",
        "SOLVER.IMS_PER_BATCH", 8, *FAST,
    )  # fmt: skip
    student = torch.load(tmp_path / "run" / "student_final.pth", weights_only=True)["model"]
    assert student["fc.weight"].shape == (3, 512)
    assert "NUM_CLASSES: 3" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("split", "workers"), [("train", 0), ("train", 2), ("val", 2)])
def test_an_image_that_cannot_be_read_is_said_in_one_line(tmp_path, split, workers):
    write_image_folder(tmp_path / "data")
    image = sorted((tmp_path / "data" / split).rglob("*.*"))[-1]
    image.write_bytes(image.read_bytes()[:-40])
    error = call(
        "train_cls.py", "DATASETS.NAME", "folder", "DATASETS.ROOT", tmp_path / "data",
        "MODEL.STUDENT.NAME", "cifar/resnet8", "INPUT.SIZE", 32, "OUTPUT_DIR", tmp_path / "run",
        *FAST, "DATALOADER.NUM_WORKERS", workers, fails=True,
    )  # fmt: skip
    (line,) = [line for line in error.splitlines() if "CUDA" not in line]
    assert line.startswith(f"error: cannot read image {image}: ")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"cannot read image {image}: ") == 1 and "Traceback" not in log
