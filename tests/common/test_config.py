"""The DISTILL node and checked merging."""

import math
import os
from pathlib import Path

import pytest

from d2distill.common.config import CfgNode, add_distill_defaults, import_extensions, read_cfg
from d2distill.common.distillers import DISTILLERS, LogitDistiller
from d2distill.common.errors import ConfigError
from d2distill.common.rules import (
    FRACTION,
    MOMENTUM,
    NUMBERS,
    RISING,
    TEXT_OR_TEXTS,
    TEXTS,
    above,
    at_least,
    check_rules,
    refuse_nan,
)


class _CfgNode(CfgNode):
    LISTABLE = ("SEVERAL",)


@pytest.fixture
def cfg():
    cfg = _CfgNode({"SOLVER": {"BASE_LR": 0.1, "EPOCHS": 3, "STEPS": [1, 2], "NESTEROV": False}, "NAME": ""})
    cfg.SEVERAL = ""
    add_distill_defaults(cfg)
    return cfg


def test_every_method_has_its_node(cfg):
    for name, method in DISTILLERS:
        node = cfg.DISTILL[name.upper()]
        assert {"WEIGHT", "WARMUP"} <= set(node) and all(node[k] == v for k, v in method.defaults().items())
        assert ("STANDARDIZE" in node) == (issubclass(method, LogitDistiller) and not method.takes_sigmoid)


def test_published_defaults(cfg):
    assert cfg.DISTILL.METHODS == [] and cfg.DISTILL.CE_WEIGHT == 1.0
    assert cfg.DISTILL.KD == {"WEIGHT": 0.9, "WARMUP": 0, "STANDARDIZE": False, "T": 4.0}
    assert cfg.DISTILL.DKD == {
        "WEIGHT": 1.0,
        "WARMUP": 20,
        "STANDARDIZE": False,
        "ALPHA": 1.0,
        "BETA": 8.0,
        "T": 4.0,
    }


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        ("SOLVERS.EPOCHS", "SOLVER.EPOCHS"),
        ("DISTILL.DKD.BTEA", "DISTILL.DKD.BETA"),
        ("solver.epochs", "SOLVER.EPOCHS"),
    ],
)
@pytest.mark.parametrize("through_file", [False, True])
def test_unknown_key_names_the_nearest(cfg, tmp_path, key, nearest, through_file):
    with pytest.raises(ConfigError, match=f"unknown config key .*did you mean .*{nearest}"):
        if through_file:
            parts = key.split(".")
            lines = [f"{'  ' * i}{part}:" for i, part in enumerate(parts)]
            (tmp_path / "c.yaml").write_text("\n".join(lines) + " 1\n")
            cfg.merge_from_file(str(tmp_path / "c.yaml"))
        else:
            cfg.merge_from_list([key, "1"])


def test_whole_numbers_and_base_files(cfg, tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {BASE_LR: 1, EPOCHS: 7}\n")
    (tmp_path / "c.yaml").write_text("_BASE_: base.yaml\nSOLVER: {EPOCHS: 8}\nDISTILL: {DKD: {BETA: 2}}\n")
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert cfg.SOLVER.BASE_LR == 1.0 and type(cfg.SOLVER.BASE_LR) is float
    assert cfg.SOLVER.EPOCHS == 8 and cfg.DISTILL.DKD.BETA == 2.0
    cfg.merge_from_list(["SOLVER.BASE_LR", "2", "DISTILL.METHODS", "['KD']", "NAME", "", "SOLVER.STEPS", "(1,)"])
    assert cfg.SOLVER.BASE_LR == 2.0 and cfg.DISTILL.METHODS == ["KD"] and cfg.SOLVER.STEPS == [1]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.EPOCHS"], "no value"),
        (["SOLVER", "3"], "SOLVER is a node with keys below it, but was given 3"),
        (["SOLVER.EPOCHS.X", "3"], r"SOLVER\.EPOCHS is a value \(3\), but was given keys below it: X"),
        (["SOLVER.EPOCHS", "many"], r"^SOLVER\.EPOCHS takes a whole number, but was given many; e\.g\. 3$"),
        (["SOLVER.EPOCHS", "1.5"], "takes a whole number"),
        (["SOLVER.EPOCHS", "True"], "takes a whole number"),
        (["SOLVER.EPOCHS", "010"], "takes a whole number"),
        (["SOLVER.EPOCHS", None], "takes a whole number, but was given nothing"),
        (["SOLVER.BASE_LR", "[1]"], "takes a number"),
        (["SOLVER.NESTEROV", "1"], "takes True or False, but was given 1"),
        (["NAME", 5], "NAME takes text, but was given 5; put it in quotes"),
        (["NAME", ["a"]], r"NAME takes text, but was given \['a'\]$"),
        (["DISTILL.METHODS", "KD"], r"^DISTILL\.METHODS takes a list, but was given KD; write \[KD\]$"),
        (["DISTILL.METHODS", "KD,DKD"], r"write \[KD,DKD\]$"),
        (["DISTILL.METHODS", "None"], r"an empty one is \[\]$"),
        (["SOLVER", {"EPOCHS": {1, 2}}], "settings are text, numbers"),
    ],
)
def test_impossible_values(cfg, opts, message):
    with pytest.raises(ConfigError, match=message):
        cfg.merge_from_list(opts)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("DISTILL.METHODS", "[KD]", ["KD"]),
        ("DISTILL.METHODS", "[KD, DKD]", ["KD", "DKD"]),
        ("SOLVER.STEPS", "[]", []),
        ("SOLVER.NESTEROV", "true", True),
        ("SEVERAL", "[a, b]", ["a", "b"]),
        ("SEVERAL", "a", "a"),
        ("SEVERAL", "[a].pth", "[a].pth"),
        ("SEVERAL", "5", "5"),
        ("NAME", "2024", "2024"),
        ("NAME", "007", "007"),
        ("NAME", "'2024'", "2024"),
        ("NAME", "[a]", "[a]"),
        ("NAME", "{[]: 1}", "{[]: 1}"),
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
    ],
)
def test_values_on_a_command_line(cfg, key, text, value):
    cfg.merge_from_list([key, text])
    for part in key.split("."):
        cfg = cfg[part]
    assert cfg == value and type(cfg) is type(value)


def test_what_is_merged_stays_as_it_was(cfg):
    other = CfgNode({"SOLVER": {"BASE_LR": 1}, "NAME": "5"})
    for _ in range(2):
        cfg.merge_from_other_cfg(other)
        assert cfg.NAME == "5" and cfg.SOLVER.BASE_LR == 1.0
        assert other == {"SOLVER": {"BASE_LR": 1}, "NAME": "5"}


@pytest.mark.parametrize("text", ["", "# only\n", "---\n"])
def test_an_empty_file_changes_nothing(cfg, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    before = cfg.clone()
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert cfg == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", ", line 1: settings are lines of `KEY: value`, but this is a list"),
        ("hello\n", ", line 1: .* a single value"),
        ("SOLVER:\n  EPOCHS: 1\n BASE_LR: 3\n", ", line 3: this is no YAML: .* of line 1, .*spaces indent"),
        ("SOLVER:\n\tEPOCHS: 1\n", ", line 2: this is no YAML: .*'.t'"),
        ("SOLVER: {EPOCHS: 1\n", ", line 2: this is no YAML: .*'}'"),
        ("NAME: *nowhere\n", ", line 1: .*undefined alias"),
        ("NAME: \0\n", " is no YAML: unacceptable character"),
        (b"\xff\xfe\x00", " is no text in UTF-8"),
        ("NAME: " + "[" * 5000, " is nested too deeply"),
        ("SOLVER: &a {BASE_LR: *a}\n", r", line 1: SOLVER\.BASE_LR holds itself"),
        ("1: 2\n", ", line 1: key 1 is no text; quotes"),
        ("SOLVER: {[a]: 2}\n", r"key \(a sequence\) is no text"),
        ("NAME: 2001-01-01\n", "NAME: to YAML this is a timestamp; quotes"),
        ("SOLVER: {STEPS: [2001-01-01]}\n", r"SOLVER\.STEPS: to YAML"),
        ("SOLVER: {EPOCHS: !!int many}\n", "'many'"),
        ("NAME: a\nNAME: b\n", ", line 2: NAME is there twice, first in line 1"),
        ("SOLVER:\n  EPOCHS: 1\n  EPOCHS: 1\n", r", line 3: SOLVER\.EPOCHS is there twice, first in line 2"),
        ("SOLVER: {EPOCHS: }\n", r": SOLVER\.EPOCHS takes a whole number, but was given nothing"),
        ("SOLVER:\n", ": .*SOLVER is a node with keys below it, but was given nothing"),
        ("SOLVER.EPOCHS: 3\n", r": .*SOLVER\.EPOCHS: in a file .* as SOLVER: \{EPOCHS: ...\}"),
        ("SOLVR: {EPOCHS: 3, BASE_LR: 1}\n", r": unknown config key SOLVR \(did you mean SOLVER\?"),
        ("_BASE_:\n", ", line 1: _BASE_ takes the path"),
        ("_BASE_: [3]\n", ", line 1: _BASE_ takes the path"),
        ("_BASE_: nope.yaml\n", r"nope\.yaml \(_BASE_ of .*c\.yaml\): no such file"),
        ("_BASE_: .\n", r"\(_BASE_ of .*c\.yaml\): Is a directory"),
        ("_BASE_: c.yaml\n", ": _BASE_ goes round in a circle: .*c.yaml -> .*c.yaml"),
        ("_BASE_: other.yaml\n", r"other\.yaml -> .*c\.yaml"),
        ("_BASE_: base.yaml\nNAME: {A: 1}\n", ": Cannot inherit key 'NAME' from base!"),
    ],
)
def test_a_file_that_holds_no_settings(cfg, tmp_path, text, message):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "other.yaml").write_text("_BASE_: c.yaml\n")
    (tmp_path / "base.yaml").write_text("NAME: a\n")
    with pytest.raises(ConfigError, match=message) as caught:
        cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert "c.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_may_be_read_twice(cfg, tmp_path):
    """Two files with a common base are no circle."""
    (tmp_path / "base.yaml").write_text("SOLVER: {EPOCHS: 7}\n")
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text("_BASE_: base.yaml\n")
    (tmp_path / "c.yaml").write_text("_BASE_: [a.yaml, b.yaml]\n")
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert cfg.SOLVER.EPOCHS == 7


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (at_least(1), [1, 1.5], [0, True, "2", math.inf, math.nan, None]),
        (at_least(0, most=2), [0, 2], [-1, 3, 10**400]),
        (above(0), [1e-9], [0, math.inf]),
        (FRACTION, [0, 1], [-0.1, 1.1]),
        (MOMENTUM, [0, 0.9], [1, -1]),
        (NUMBERS, [[], (1, 2.5)], [["a"], 1, [math.nan], [True]]),
        (RISING, [[], (1, 2)], [[2, 1], [1, 1], [0], ["a"], [[1]]]),
        (TEXTS, [[], ["a"]], ["a", [1]]),
        (TEXT_OR_TEXTS, ["a", ["a"]], [1, [1]]),
    ],
)
def test_rules(rule, right, wrong):
    cfg = CfgNode({"A": {"B": 0}})
    for value in right:
        cfg.A.B = value
        check_rules(cfg, {"A.B": rule})
    for value in wrong:
        cfg.A.B = value
        with pytest.raises(ConfigError, match=f"^A.B is .*, but must be .*{rule.words}$"):
            check_rules(cfg, {"A.B": rule})


@pytest.mark.parametrize("value", [math.nan, [1.0, math.nan]])
def test_nan_is_refused_wherever_it_is(value):
    refuse_nan(CfgNode({"A": {"B": [math.inf]}, "C": "nan", "D": None}))
    with pytest.raises(ConfigError, match=r"^A\.B is .*nan.*, but must be a number"):
        refuse_nan(CfgNode({"A": {"B": value}}))


def test_yaml_runs_no_code(cfg, tmp_path):
    (tmp_path / "c.yaml").write_text(f"NAME: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ConfigError, match=r"c\.yaml, line 1: YAML that would run code: could not determine a"):
        cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert not (tmp_path / "made").exists()


def test_an_own_file_is_run_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", "")
    (tmp_path / "own.py").write_text("import os\nos.environ['RUNS'] += 'x'\n")
    for name in ("own.py", str(tmp_path / "own.py")):
        import_extensions([name], tmp_path)
    assert os.environ["RUNS"] == "x"


def test_an_own_file_that_failed_is_run_again(tmp_path):
    (tmp_path / "own.py").write_text("raise ValueError('half written')\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="half written"):
            import_extensions(["own.py"], tmp_path)


def test_own_files_are_found_from_anywhere(tmp_path):
    """A run folder's copy of the settings, and other processes, begin elsewhere."""
    (tmp_path / "own.py").write_text("")
    (tmp_path / "c.yaml").write_text("IMPORTS: [own.py, json]\n")
    cfg = read_cfg(lambda: CfgNode({"IMPORTS": [], "OUTPUT_DIR": ""}), str(tmp_path / "c.yaml"), [])
    assert cfg.OUTPUT_DIR == str(Path("output/c").resolve()) and cfg.IMPORTS == [str(tmp_path / "own.py"), "json"]
