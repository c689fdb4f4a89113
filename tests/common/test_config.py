"""The DISTILL node and checked merging."""

import os

import pytest

from common.config import CfgNode, add_distill_defaults, import_extensions, read_cfg
from common.distillers import DISTILLERS, LogitDistiller
from common.errors import ConfigError


@pytest.fixture
def cfg():
    cfg = CfgNode({"SOLVER": {"BASE_LR": 0.1, "EPOCHS": 3, "STEPS": [1, 2]}, "NAME": ""})
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


@pytest.mark.parametrize("opts", [["SOLVER", "3"], ["SOLVER.EPOCHS.X", "3"], ["SOLVER.EPOCHS"]])
def test_impossible_settings(cfg, opts):
    with pytest.raises(ConfigError):
        cfg.merge_from_list(opts)


def test_wrong_type(cfg):
    with pytest.raises(ValueError, match="EPOCHS"):
        cfg.merge_from_list(["SOLVER.EPOCHS", "many"])


def test_yaml_runs_no_code(cfg, tmp_path):
    (tmp_path / "c.yaml").write_text(f"NAME: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
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
    assert cfg.OUTPUT_DIR == "output/c" and cfg.IMPORTS == [str(tmp_path / "own.py"), "json"]
