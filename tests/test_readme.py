"""What the README shows, run as it stands."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from classification.config import load_cfg
from classification.data import DATASET_REGISTRY
from classification.models import registry
from classification.trainer import train
from common.distillers import DISTILLERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (my_\w+\.(?:py|yaml))\n(.*?)```", README, re.DOTALL))
FAST = ["SOLVER.EPOCHS", "1", "SOLVER.IMS_PER_BATCH", "8", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def registries():
    """Puts the registries back as they were."""
    kept = [dict(maps) for maps in (DISTILLERS._obj_map, DATASET_REGISTRY._obj_map, registry._BUILDERS)]
    yield
    for maps, before in zip((DISTILLERS._obj_map, DATASET_REGISTRY._obj_map, registry._BUILDERS), kept, strict=True):
        maps.clear()
        maps.update(before)


@pytest.mark.parametrize("name", ["my_method", "my_model", "my_data"])
def test_worked_examples(tmp_path, registries, name):
    assert len(FILES[f"{name}.py"].strip().splitlines()) <= 25
    for suffix in ("py", "yaml"):
        (tmp_path / f"{name}.{suffix}").write_text(FILES[f"{name}.{suffix}"])
    opts = [*FAST, "OUTPUT_DIR", str(tmp_path / "run")]
    if "digits" in FILES[f"{name}.yaml"]:
        opts += ["DATASETS.TRAIN_SIZE", "16"]
    cfg = load_cfg(str(tmp_path / f"{name}.yaml"), opts)
    results = train(cfg, argparse.Namespace(resume=False, config_file=""))
    assert 0 <= results["top1"] <= 100 and (tmp_path / "run" / "student_final.pth").exists()


def test_make_comes_first():
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].splitlines()
    assert [line.split("#")[0].strip() for line in commands] == ["make demo", "make test"]
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_every_method_and_named_file_exists():
    for name, _ in DISTILLERS:
        assert f"`{name}`" in README
    for path in re.findall(r"(?:configs/\w+/[\w]+\.yaml|tools/\w+\.\w+|tests/[\w/]+\.py|common/\w+/\w+\.py)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_the_gpu_script_runs_on_what_there_is(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--device",
        "cpu",
        "--quick",
        "--output",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=300)
    report = json.loads((tmp_path / "device_cpu.json").read_text())
    parts = ("methods_against_cpu", "models_against_cpu", "step_times", "training_table")
    assert not [part for part in parts if str(report[part]).startswith("failed")]
