"""The design, held by tests: which way imports point, what a method touches, how far a step is from its command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2distill.classification.config import load_cfg
from d2distill.classification.modeling import build_distiller
from d2distill.common.distillers import DISTILLERS
from tests.goldens.fill import array

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "classification", "detection", "tools")
CODE = [path for folder in (*FOLDERS, "d2distill") for path in (ROOT / folder).rglob("*.py")]
METHODS = [path for path in (ROOT / "common" / "distillers").glob("[a-z]*.py") if path.stem != "base"]


def test_imports(tmp_path):
    """The contracts of import-linter in pyproject.toml."""
    package = tmp_path / "d2distill"
    package.mkdir()
    for path in (ROOT / "d2distill").glob("*.py"):
        (package / path.name).symlink_to(path)
    for folder in FOLDERS:
        (package / folder).symlink_to(ROOT / folder)
    command = [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml", "--no-cache"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 3 kept, 0 broken" in done.stdout


def test_no_method_is_named_outside_its_own_file():
    names = [name for name, _ in DISTILLERS]
    assert sorted(name.lower() for name in names) == sorted(path.stem for path in METHODS)
    # DOT is an optimizer; in lower case some methods are words of the language that we write in.
    quoted = "|".join(f"{name}|{name.lower()}|loss_{name.lower()}" for name in names)
    pattern = re.compile(rf"""["'](?:{quoted})["']|\b(?:{"|".join(f"{path.stem}_loss" for path in METHODS)})\b""")
    found = {path: pattern.findall(path.read_text()) for path in CODE if path not in METHODS}
    assert not {path: hits for path, hits in found.items() if hits and path.name != "__init__.py"}


def test_files_are_short():
    assert not [path for path in CODE if path.read_text().count("\n") > 350]
    assert not [path for path in (ROOT / "configs").rglob("*.yaml") if path.read_text().count("\n") > 20]


def test_nothing_names_a_package_index_or_unsafe_loading():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    hosts = ("py" + "pi.org", "python" + "hosted", "weights_only=" + "False", "allow_unsafe=" + "True")
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".sh", ".md", ".txt", ".toml", ".yaml", "") and path.is_file():
            assert not any(host in path.read_text() for host in hosts), name


BROKEN_LOSS = """
from d2distill.common.distillers import dkd

def fail(*arguments):
    raise RuntimeError("here is the loss")

dkd.dkd_loss = fail
"""


def calls_to_the_loss(folder, script, config, *opts):
    """Own frames of the traceback of a loss that fails: (file, function) from the command's function on."""
    (folder / "broken.py").write_text(BROKEN_LOSS)
    command = [sys.executable, ROOT / script, "--debug", "--config-file", ROOT / config]
    command += ["IMPORTS", f"['{folder}/broken.py']", "OUTPUT_DIR", folder / "run", "MODEL.DEVICE", "cpu", *opts]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "RuntimeError: here is the loss" in done.stderr, done.stderr
    frames = re.findall(r'File "(.+)", line \d+, in (\S+)', done.stderr[done.stderr.rindex("Traceback") :])
    own = [(file, name) for file, name in frames if file.startswith(str(ROOT)) and "/.venv/" not in file]
    return [frame for frame in own if frame[1] != "<module>"]


@pytest.mark.slow
def test_a_loss_is_at_most_nine_calls_and_six_files_from_the_command_line(tmp_path):
    config = "configs/cls/digits_vgg8_r8_dkd.yaml"
    calls = calls_to_the_loss(tmp_path, "tools/train_cls.py", config, "MODEL.TEACHER.WEIGHTS", "''")
    # The loss itself is the stand-in's, in the file of its method.
    assert len(calls) + 1 <= 9 and len({file for file, _ in calls}) <= 6, calls


METHOD = '''
"""A method that knows no file but its own."""

from d2distill.common.distillers.base import DISTILLERS, Distiller


def half_loss(logits_student, logits_teacher):
    return 0.5 * (logits_student - logits_teacher.detach()).square().mean()


@DISTILLERS.register()
class Halved(Distiller):
    @classmethod
    def defaults(cls):
        return {"WEIGHT": 3.0, "POWER": 2}

    def forward(self, student, teacher, batch):
        return half_loss(student.logits, teacher.logits)
'''

CONFIG = """
_BASE_: {base}
IMPORTS: [half.py]
MODEL:
  TEACHER: {{NAME: resnet20}}
  DEVICE: cpu
DISTILL:
  METHODS: [Halved]
  HALVED: {{WEIGHT: 5}}
"""


def test_a_method_needs_one_file_and_one_yaml(tmp_path):
    (tmp_path / "half.py").write_text(METHOD)
    (tmp_path / "half.yaml").write_text(CONFIG.format(base=ROOT / "configs/cls/digits_r8.yaml"))
    try:
        cfg = load_cfg(str(tmp_path / "half.yaml"), ["DISTILL.HALVED.WARMUP", "2"])
        assert cfg.DISTILL.HALVED == {"WEIGHT": 5.0, "WARMUP": 2, "TEACHER": 0, "POWER": 2}
        model = build_distiller(cfg)
        batch = {"image": array(0, 4, 3, 32, 32) * 50 + 120, "label": torch.arange(4), "index": torch.arange(4)}
        losses = model(batch, 1)
        assert list(losses) == ["loss_ce", "loss_halved"] and list(model.distillers) == ["halved"]
        losses["loss_halved"].backward()
        assert all(p.grad is not None for p in model.student.parameters())
    finally:
        DISTILLERS._obj_map.pop("Halved", None)
