"""The design, held by tests: which way imports point, what a method touches, how long files are."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import torch

from d2distill.classification.config import load_cfg
from d2distill.classification.modeling import build_distiller
from d2distill.common.distillers import DISTILLERS
from tests.goldens.fill import array

ROOT = Path(__file__).resolve().parents[1]
CODE = [p for folder in ("common", "classification", "detection", "tools") for p in (ROOT / folder).rglob("*.py")]
METHODS = sorted(
    p
    for p in (ROOT / "common" / "distillers").glob("*.py")
    if p.name not in ("__init__.py", "base.py") and p.name[0] != "_"
)


def imported(path):
    """Top-level packages and full names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def named(path):
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at():
    assert len(CODE) > 30 and {"kd.py", "dkd.py"} <= {p.name for p in METHODS}


@pytest.mark.parametrize("path", CODE, ids=named)
def test_imports_point_one_way(path):
    upward = {
        "common": ("classification", "detection", "tools", "tests"),
        "classification": ("detection", "tools", "tests"),
        "detection": ("classification", "tools", "tests"),
        "tools": ("tests",),
    }[path.relative_to(ROOT).parts[0]]
    assert not [name for name in imported(path) if name.removeprefix("d2distill.").split(".")[0] in upward]


@pytest.mark.parametrize("path", [ROOT / "common/outputs.py", *(ROOT / "common/distillers").glob("*.py")], ids=named)
def test_losses_import_torch_and_fvcore_only(path):
    allowed = (
        "torch",
        "fvcore",
        "d2distill.common.outputs",
        "d2distill.common.distillers",
        "typing",
        "dataclasses",
        "importlib",
        "pkgutil",
    )
    allowed += ("math", "functools", "collections", "itertools")
    wrong = [name for name in imported(path) if not any(name == a or name.startswith(a + ".") for a in allowed)]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in CODE if p not in METHODS], ids=named)
def test_no_method_is_named_outside_its_own_file(path):
    names = {name for name, _ in DISTILLERS}
    loss_names = {f"{p.stem}_loss" for p in METHODS} | {f"loss_{p.stem}" for p in METHODS}
    tree = ast.parse(path.read_text())
    identifiers = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    identifiers |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    identifiers |= {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    # In lower case some are words of the language we write in: torch.distributed is imported as dist.
    assert not identifiers & (names | loss_names)
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not strings & (names | {n.lower() for n in names} | {n.upper() for n in names} | loss_names)


@pytest.mark.parametrize("path", CODE, ids=named)
def test_no_module_is_long(path):
    assert path.read_text().count("\n") <= 350


@pytest.mark.parametrize("path", METHODS, ids=named)
def test_a_method_is_one_file(path):
    """Its name is the file's, its loss is a function of its own, its settings are its own."""
    own = [
        (name, method) for name, method in DISTILLERS if method.__module__ == f"d2distill.common.distillers.{path.stem}"
    ]
    assert [name.lower() for name, _ in own] == [path.stem]
    assert any(name.endswith("_loss") for name in re.findall(r"^def (\w+)\(", path.read_text(), re.MULTILINE))
    assert own[0][1].__name__ == own[0][0] and isinstance(own[0][1].defaults(), dict)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=named)
def test_configs_are_short(path):
    assert len(path.read_text().splitlines()) <= 20


def test_nothing_names_a_package_index_or_unsafe_loading():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    hosts = ("py" + "pi.org", "python" + "hosted", "weights_only=" + "False", "allow_unsafe=" + "True")
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".sh", ".md", ".txt", ".toml", ".yaml", "") and path.is_file():
            assert not any(host in path.read_text() for host in hosts), name


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

    def losses(self, student, teacher, target, ctx):
        return {"loss_halved": half_loss(student.logits, teacher.logits)}
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


@pytest.mark.parametrize("imports", ["nowhere.py", "no.such.module"])
def test_an_import_that_is_not_there(tmp_path, imports):
    (tmp_path / "c.yaml").write_text(f"IMPORTS: [{imports}]\n")
    with pytest.raises(ValueError, match="IMPORTS"):
        load_cfg(str(tmp_path / "c.yaml"))
