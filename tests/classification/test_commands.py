"""The command lines of classification on tiny data in the real formats."""

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
from d2distill.commands import train_cls
from d2distill.common.errors import CheckpointError
from d2distill.tools.eval_cls import main as eval_cls
from tests.dataset_files import write_cifar100, write_image_folder

ROOT = Path(__file__).resolve().parents[2]
FAST = ("SOLVER.EPOCHS", "1", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu")


def script(name, *arguments):
    """A script of the repository in a process of its own."""
    done = [sys.executable, name, *map(str, arguments)]
    return subprocess.run(done, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A tiny CIFAR-100 and a teacher's checkpoint as MDistiller publishes them."""
    root = tmp_path_factory.mktemp("cifar")
    write_cifar100(root)
    torch.save({"model": build_model("resnet32x4", 100).state_dict(), "epoch": 240}, root / "teacher.pth")
    return root


@pytest.mark.slow
def test_evaluation_needs_no_training_images(cifar, tmp_path):
    shutil.copytree(cifar / "cifar-100-python", tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "train").unlink()
    opts = ["DATASETS.ROOT", str(tmp_path), "MODEL.STUDENT.NAME", "resnet32x4", "MODEL.DEVICE", "cpu"]
    accuracy = evaluate(load_cfg("", [*opts, "MODEL.STUDENT.WEIGHTS", str(cifar / "teacher.pth")]))
    assert 0 <= accuracy["top1"] <= accuracy["top5"] <= 100
    weights = build_model("resnet32x4", 100).state_dict()
    weights["fc.weight"][3] = 3e38
    torch.save(weights, tmp_path / "huge.pth")
    with pytest.raises(CheckpointError, match=r"huge\.pth: .* logits of 16 of 16 test images are not finite"):
        evaluate(load_cfg("", [*opts, "MODEL.STUDENT.WEIGHTS", str(tmp_path / "huge.pth")]))


def test_warnings_of_the_data_are_in_the_log_once(tmp_path):
    write_image_folder(tmp_path / "imagenet")
    opts = ["DATASETS.NAME", "imagenet", "DATASETS.ROOT", str(tmp_path), "OUTPUT_DIR", str(tmp_path / "run")]
    train(load_cfg("", [*opts, "MODEL.STUDENT.NAME", "resnet8", "INPUT.SIZE", "32", *FAST]))
    assert (tmp_path / "run" / "log.txt").read_text().count("as published has 1000") == 1


@pytest.mark.slow
def test_distill_on_cifar100_and_evaluate(cifar, tmp_path, command):
    run = tmp_path / "run"
    config = ("--config-file", "configs/cls/cifar100_r32x4_r8x4_dkd.yaml", "OUTPUT_DIR", run, "DATASETS.ROOT", cifar)
    opts = ("MODEL.TEACHER.WEIGHTS", cifar / "teacher.pth", "SOLVER.IMS_PER_BATCH", 16, *FAST)
    # Before there is a student the weights of a training to come are not taken for one.
    code, _, error = command(train_cls, *config, *opts, "MODEL.STUDENT.WEIGHTS", "", "--eval-only")
    assert code == 2 and f"OUTPUT_DIR {run} has no student_best.pth" in error and "MODEL.STUDENT.WEIGHTS" in error
    done = script("tools/train_cls.py", *config, *opts)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ("config", "environment", "metrics", "events", "log", "student_final", "student_best", "model_0000002")
    assert {path.name.split(".")[0] for path in run.iterdir()} >= set(names)
    results = json.loads((run / "results.json").read_text())
    assert results["parameters"] == 1233540 and 0 <= results["top1"] <= results["best_top1"] <= 100
    student = torch.load(run / "student_final.pth", weights_only=True)
    assert list(student) == ["model", "d2distill"]
    build_model("resnet8x4", 100).load_state_dict(student["model"])
    final = ("-m", "resnet8x4", "-d", "cifar100", "-c", run / "student_final.pth")
    _, printed, _ = command(eval_cls, *final, "DATASETS.ROOT", cifar, *FAST[2:])
    assert f"resnet8x4 on cifar100: top1 {results['top1']:.2f}, top5 {results['top5']:.2f}" in printed
    _, printed, _ = command(train_cls, *config, *opts, "--eval-only")
    assert f"{run / 'student_best.pth'}: top1 {results['best_top1']:.2f}" in printed
    (run / "student_best.pth").unlink()
    _, printed, _ = command(train_cls, *config, *opts, "--eval-only")
    assert f"{run / 'student_final.pth'}: top1 {results['top1']:.2f}" in printed


def test_errors_name_what_is_missing(cifar, tmp_path, command):
    def error(*opts):
        config = ("--config-file", "configs/cls/cifar100_r32x4_r8x4_dkd.yaml", "OUTPUT_DIR", tmp_path / "run")
        code, _, printed = command(train_cls, *config, "MODEL.DEVICE", "cpu", *opts)
        assert code == 2 and printed.startswith("error: ") and "Traceback" not in printed
        return printed

    message = error("DATASETS.ROOT", tmp_path)
    assert f"{tmp_path}/cifar-100-python/train" in message and "torchvision.datasets.CIFAR100" in message
    message = error("DATASETS.ROOT", cifar)
    assert "MODEL.TEACHER.WEIGHTS" in message and "download_ckpts/cifar_teachers/resnet32x4_vanilla" in message
    assert "unknown config key SOLVER.BASE_RL (did you mean SOLVER.BASE_LR" in error("SOLVER.BASE_RL", 1)
    if not torch.cuda.is_available():
        message = error("--num-gpus", 2)
        assert "--num-gpus 2, but this machine has 0 GPUs" in message and "torchrun" in message
    assert not (tmp_path / "run" / "model_0000001.pth").exists()


@pytest.mark.slow
def test_imagenet_pair_on_a_few_images(tmp_path, command):
    write_image_folder(tmp_path / "imagenet")
    torch.save(build_model("imagenet/ResNet34", 3).state_dict(), tmp_path / "teacher.pth")
    code, _, error = command(
        train_cls, "--config-file", "configs/cls/imagenet_r34_r18_dkd.yaml", "DATASETS.ROOT", tmp_path,
        "MODEL.TEACHER.WEIGHTS", tmp_path / "teacher.pth", "OUTPUT_DIR", tmp_path / "run",
        "SOLVER.IMS_PER_BATCH", 8, *FAST,
    )  # fmt: skip
    assert code == 0, error
    student = torch.load(tmp_path / "run" / "student_final.pth", weights_only=True)["model"]
    assert student["fc.weight"].shape == (3, 512)
    assert "NUM_CLASSES: 3" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("split", "workers"), [("train", 2), ("val", 0)])
def test_an_unreadable_image_is_one_line(tmp_path, split, workers, command):
    """With live workers too, which end with the process and print nothing."""
    write_image_folder(tmp_path / "data")
    image = sorted((tmp_path / "data" / split).rglob("*.*"))[-1]
    image.write_bytes(image.read_bytes()[:-40])
    arguments = (
        "DATASETS.NAME", "folder", "DATASETS.ROOT", tmp_path / "data", "MODEL.STUDENT.NAME", "cifar/resnet8",
        "INPUT.SIZE", 32, "OUTPUT_DIR", tmp_path / "run", *FAST, "DATALOADER.NUM_WORKERS", workers,
    )  # fmt: skip
    if workers:
        done = script("tools/train_cls.py", *arguments)
        code, error = done.returncode, done.stderr
    else:
        code, _, error = command(train_cls, *arguments)
    (line,) = [line for line in error.splitlines() if "CUDA" not in line]
    assert code == 2 and line.startswith(f"error: cannot read image {image}: ")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count(f"cannot read image {image}: ") == 1 and "Traceback" not in log
