"""The wheel holds the packages and their configs, and works beside a user's own `common` package."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import d2distill
from d2distill.common.errors import MissingDependencyError, require_detectron2
from d2distill.configs import find_config

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
USE = """
import sys
import common  # the user's
import d2distill

assert common.MINE and "torch" not in sys.modules
help(d2distill.common.distillers.dkd_loss)
assert "detectron2" not in sys.modules
sys.argv = ["train", "--config-file", "configs/cls/digits_vgg8_r8_dkd.yaml", "SOLVER.EPOCHS", "1",
            "SOLVER.IMS_PER_BATCH", "10", "DATASETS.TRAIN_SIZE", "20", "MODEL.TEACHER.NAME", "resnet8",
            "MODEL.TEACHER.WEIGHTS", "", "--num-gpus", "0"]
d2distill.commands.train_cls()

from d2distill.detection.config import load_cfg
from d2distill.configs import find_config
assert load_cfg(find_config("det/dkd_r101_r18.yaml")).DISTILL.METHODS == ["DKD"]
print("FROM", d2distill.detection.__file__)
"""


def run(*command, cwd):
    env = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Wheel and source distribution, built from a copy: setuptools leaves files in the folder that it builds from."""
    source = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    (source / "dist").mkdir()
    run(sys.executable, "-c", BUILD, cwd=source)
    return source / "dist"


def test_contents(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    configs = {f"d2distill/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*/*.yaml")}
    assert configs <= names and len(configs) > 100
    assert {f"d2distill/tools/{name}.yaml" for name in ("mdistiller", "published")} <= names
    assert {name.split("/")[0] for name in names} == {"d2distill", f"d2distill-{d2distill.__version__}.dist-info"}
    folders = {name.split("/")[1] for name in names if name.startswith("d2distill/") and name.count("/") > 1}
    assert folders == {"common", "classification", "detection", "tools", "configs"}
    with tarfile.open(next(dist.glob("*.tar.gz"))) as source:
        names = source.getnames()
    assert not [name for name in names if "/tests" in name] and any("constraints.txt" in name for name in names)


@pytest.mark.slow
def test_the_wheel_trains_beside_a_users_own_common(dist, tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("MINE = True\n")
    install = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path)
    run(sys.executable, *install, next(dist.glob("*.whl")), cwd=tmp_path)
    printed = run(sys.executable, "-c", USE, cwd=tmp_path)
    assert "Decoupled" in printed and f"FROM {tmp_path}" in printed
    assert "top1" in json.loads((tmp_path / "output" / "digits_vgg8_r8_dkd" / "results.json").read_text())
    for command in ("d2distill-train-cls", "d2distill-train-det", "d2distill-eval", "d2distill-check-data"):
        assert run(tmp_path / "bin" / command, "--version", cwd=tmp_path) == f"d2distill {d2distill.__version__}\n"


def test_a_config_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = str(ROOT / "configs" / "cls" / "digits_r8.yaml")
    assert find_config("cls/digits_r8.yaml") == find_config("configs/cls/digits_r8.yaml") == packaged
    assert find_config("cls/none.yaml") == "cls/none.yaml" and find_config("") == ""
    (tmp_path / "cls").mkdir()
    (tmp_path / "cls" / "digits_r8.yaml").touch()
    assert find_config("cls/digits_r8.yaml") == "cls/digits_r8.yaml"


def test_a_missing_detectron2_is_answered_with_how_to_get_it(monkeypatch):
    require_detectron2()
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(MissingDependencyError, match="setup_env --detectron2"):
        require_detectron2()
    monkeypatch.delitem(sys.modules, "d2distill.detection", raising=False)
    with pytest.raises(ImportError, match="setup_env --detectron2"):
        import d2distill.detection  # noqa: F401
