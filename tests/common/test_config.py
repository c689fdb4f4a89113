"""The DISTILL node and checked merging."""

import math
import os
import pickle

import pytest
import yaml

from d2distill.common.config import CfgNode, add_distill_defaults, import_extensions, read_cfg
from d2distill.common.config_node import parse_yaml
from d2distill.common.distillers import DISTILLERS, LogitDistiller
from d2distill.common.errors import ConfigError, DivergedError
from d2distill.common.rules import BELOW_ONE, INCREASING, LIST_OF_STR, NUMBERS, STR_OR_LIST, at_least, check_rules


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


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        ("SOLVERS.EPOCHS", "SOLVER.EPOCHS"),
        ("DISTILL.DKD.BTEA", "DISTILL.DKD.BETA"),
        ("solver.epochs", "SOLVER.EPOCHS"),
        # Not near in letters.
        ("SOLVER.BATCHSIZE", "SOLVER.IMS_PER_BATCH"),
        ("SOLVER.batch_size", "SOLVER.IMS_PER_BATCH"),
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
        (["SOLVER.EPOCHS.X", "3"], r"SOLVER\.EPOCHS takes a whole number, but was given \{'X': '3'\}"),
        (["SOLVER.EPOCHS", "many"], r"^SOLVER\.EPOCHS takes a whole number, but was given many; e\.g\. 3$"),
        (["SOLVER.EPOCHS", "1.5"], "takes a whole number"),
        (["SOLVER.EPOCHS", "True"], "takes a whole number"),
        (["SOLVER.BASE_LR", "[1]"], "takes a number"),
        (["SOLVER.NESTEROV", "1"], "takes True or False, but was given 1"),
        (["NAME", 5], "NAME takes text, but was given 5; put it in quotes"),
        (
            ["DISTILL.METHODS", "KD"],
            r"^DISTILL\.METHODS takes a list, but was given KD; write \[KD\], or \[\] ",
        ),
        (["DISTILL.METHODS", "KD,DKD"], r"write \[KD,DKD\]"),
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
        ("SOLVER.NESTEROV", "true", True),
        ("SEVERAL", "[a, b]", ["a", "b"]),
        ("SEVERAL", "a", "a"),
        ("SEVERAL", "[a].pth", "[a].pth"),
        ("NAME", "007", "007"),
        ("NAME", "'2024'", "2024"),
        ("NAME", "[a]", "[a]"),
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
        ("- a\n", ": settings are lines of `KEY: value`, but this is a list"),
        ("hello\n", ": .* is a str"),
        ("SOLVER:\n  EPOCHS: 1\n BASE_LR: 3\n", " cannot be read as YAML: .* line 3"),
        ("SOLVER: {EPOCHS: 1\n", " cannot be read as YAML: .*'}'.* line 2"),
        (b"\xff\xfe\x00", " cannot be read as YAML: 'utf-8'"),
        ("SOLVER:\n  EPOCHS: 1\n  EPOCHS: 1\n", " cannot be read as YAML: EPOCHS is there twice, first in line 2"),
        ("SOLVER: {EPOCHS: }\n", r": SOLVER\.EPOCHS takes a whole number, but was given nothing"),
        ("SOLVER:\n", ": .*SOLVER is a node with keys below it, but was given nothing"),
        (
            "SOLVER.EPOCHS: 3\n",
            r": config key SOLVER\.EPOCHS: in a file its parts are nested, as SOLVER: \{EPOCHS: \.\.\.\}",
        ),
        ("SOLVR: {EPOCHS: 3, BASE_LR: 1}\n", r": unknown config key SOLVR \(did you mean SOLVER"),
        ("_BASE_: nope.yaml\n", r"nope\.yaml \(_BASE_ of .*c\.yaml\) cannot be .*No such file"),
        ("_BASE_: c.yaml\n", ": _BASE_ goes round in a circle: .*c.yaml -> .*c.yaml"),
    ],
)
def test_a_file_that_holds_no_settings(cfg, tmp_path, text, message):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "other.yaml").write_text("_BASE_: c.yaml\n")
    with pytest.raises(ConfigError, match=message) as caught:
        cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert "c.yaml" in str(caught.value) and "\n" not in str(caught.value)


NESTED = "".join(f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"A0: &a0 [1, 2]\n{NESTED}", "with its aliases it has more than 100000 values .*line 6"),
        (f"A0: &a0 {{b: c}}\n{NESTED.replace('[', '{<<: [').replace(']', ']}')}", "it has more than 100000 values"),
        ("A: &a [*a]\n", "it has more than 100000 values .*line 1"),
        (f"A: {'[' * 2000}", "RecursionError: maximum recursion depth"),
        ("A: 2020-13-13\n", "ValueError: month must be"),
        ("A: !!timestamp x\n", "AttributeError: "),
        ("_BASE_: 5\n", ": _BASE_ must be a file, or a list of files, but is 5"),
    ],
)
def test_yaml_that_has_no_end_or_no_sense(cfg, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/c.yaml.*{message}"):
        cfg.merge_from_file(str(tmp_path / "c.yaml"))


def test_aliases_are_bounded_in_values_and_descriptions_too(cfg, tmp_path):
    with pytest.raises(ConfigError, match=r"^SOLVER.EPOCHS takes a whole number"):
        cfg.merge_from_list(["SOLVER.EPOCHS", f"{{A0: &a0 [1, 2], {', '.join(NESTED.splitlines())}}}"])
    with pytest.raises(yaml.YAMLError, match="more than 100000 values"):
        parse_yaml(f"A0: &a0 [1, 2]\n{NESTED}")
    assert parse_yaml("a: &a {b: 1}\nc: [*a, *a]\n") == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_what_is_no_file(cfg, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "c.yaml").write_text("_BASE_: [pipe.yaml]\n")
    for name in (tmp_path / "pipe.yaml", tmp_path / "c.yaml", "/dev/zero", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read as YAML: is no regular file$"):
            read_cfg(own_cfg, add_distill_defaults, str(name), [])


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
        (at_least(1), [1, 1.5], [0, math.inf, math.nan]),
        (BELOW_ONE, [0, 0.9], [1, -1]),
        (NUMBERS, [[], (1, 2.5)], [["a"], 1, [True], [math.nan], [0, math.inf]]),
        (INCREASING, [[], (1, 2), [0.5, 0.9]], [[2, 1], [1, 1], [0], [0.5, 1], [0.5, 2], ["a"], [[1]]]),
        (LIST_OF_STR, [[], ["a"]], ["a", [1]]),
        (STR_OR_LIST, ["a", ["a"]], [1, [1]]),
    ],
)
def test_rules(rule, right, wrong):
    cfg = CfgNode({"A": {"B": 0}})
    for value in right:
        cfg.A.B = value
        check_rules(cfg, {rule: ["A.B"]})
    for value in wrong:
        cfg.A.B = value
        with pytest.raises(ConfigError, match=f"^A.B is .*, but must be .*{rule.description}$"):
            check_rules(cfg, {rule: ["A.B"]})


def test_yaml_runs_no_code(cfg, tmp_path):
    (tmp_path / "c.yaml").write_text(f"NAME: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ConfigError, match=r"c\.yaml cannot be read as YAML: .*object/apply:os.mkdir.* line 1"):
        cfg.merge_from_file(str(tmp_path / "c.yaml"))
    assert not (tmp_path / "made").exists()


def test_an_own_file_is_run_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", "")
    (tmp_path / "own.py").write_text("import os\nos.environ['RUNS'] += 'x'\n")
    monkeypatch.chdir(tmp_path)
    import_extensions(["own.py", str(tmp_path / "own.py")])
    assert os.environ["RUNS"] == "x"


def test_an_own_file_that_failed_is_run_again(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("x = 1\nraise ValueError('half written')\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"^IMPORTS: {file}, line 2: ValueError: half written$"):
            import_extensions([str(file)])


def own_cfg():
    return CfgNode({"IMPORTS": [], "OUTPUT_DIR": ""})


METHOD = """
from d2distill.common.distillers import DISTILLERS, DKD
@DISTILLERS.register()
class {}(DKD):
    pass
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DKD", r"^IMPORTS: .*own\.py, line 3: AssertionError: An object named 'DKD' was already registered"),
        ("Dkd", r"^method Dkd \(imported_by_config_.*own\.py\): DISTILL\.DKD is taken; rename the class$"),
    ],
)
def test_a_method_takes_no_others_name(tmp_path, name, message):
    (tmp_path / "own.py").write_text(METHOD.format(name))
    (tmp_path / "c.yaml").write_text("IMPORTS: [own.py]\n")

    try:
        with pytest.raises(ConfigError, match=message):
            read_cfg(own_cfg, add_distill_defaults, str(tmp_path / "c.yaml"), [])
    finally:
        DISTILLERS._obj_map.pop("Dkd", None)


def test_own_files_are_found_from_anywhere(tmp_path, monkeypatch):
    """Beside the file that names them, which may be a _BASE_ in another folder; on a command line also from here."""
    for folder in ("base", "child", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.py").write_text("")
    (tmp_path / "base" / "c.yaml").write_text("IMPORTS: [base.py, json]\n")
    (tmp_path / "child" / "c.yaml").write_text("_BASE_: ../base/c.yaml\n")
    monkeypatch.chdir(tmp_path / "here")

    def imports(*opts):
        return read_cfg(own_cfg, add_distill_defaults, "../child/c.yaml", opts).IMPORTS

    assert imports() == [str(tmp_path / "base" / "base.py"), "json"]
    given = imports("IMPORTS", "[child.py, here.py]")
    assert given == [str(tmp_path / "child" / "child.py"), str(tmp_path / "here" / "here.py")]


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(DivergedError("The loss is nan.", "see the log")))
    assert str(error) == "The loss is nan. Lower SOLVER.BASE_LR, warm up, or clip gradients; see the log"
