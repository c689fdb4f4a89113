"""What the README shows, run as it stands."""

import json
import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY

from d2distill.classification.config import load_cfg
from d2distill.classification.data import DATASET_REGISTRY
from d2distill.classification.models.registry import MODEL_REGISTRY
from d2distill.classification.trainer import train
from d2distill.common.distillers import DISTILLERS
from d2distill.common.errors import ConfigError
from d2distill.detection.config import load_cfg as load_det_cfg
from d2distill.detection.data.digits_coco import generate_split
from d2distill.detection.trainer import train as train_detector
from tests.detection.tiny_detectors import SMALL, batch, build, small_cfg, step
from tests.processes import exit_code, script, start

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml)\n# (my_\w+\.(?:py|yaml))\n(.*?)```", README, re.DOTALL))
(STOCK,) = re.findall(r"```python\n(# stock Detectron2 .*?)```", README, re.DOTALL)
FAST = ["SOLVER.EPOCHS", "1", "SOLVER.IMS_PER_BATCH", "8", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def registries():
    """Puts the registries back as they were."""
    maps = [registry._obj_map for registry in (DISTILLERS, DATASET_REGISTRY, MODEL_REGISTRY)]
    kept = [dict(entries) for entries in maps]
    yield
    for entries, before in zip(maps, kept, strict=True):
        entries.clear()
        entries.update(before)


@pytest.mark.parametrize("name", ["my_method", "my_model", "my_data"])
def test_worked_examples(tmp_path, registries, name):
    assert len(FILES[f"{name}.py"].strip().splitlines()) <= 25
    for suffix in ("py", "yaml"):
        (tmp_path / f"{name}.{suffix}").write_text(FILES[f"{name}.{suffix}"])
    opts = [*FAST, "OUTPUT_DIR", str(tmp_path / "run")]
    if "digits" in FILES[f"{name}.yaml"]:
        opts += ["DATASETS.TRAIN_SIZE", "16"]
    cfg = load_cfg(str(tmp_path / f"{name}.yaml"), opts)
    results = train(cfg)
    assert 0 <= results["top1"] <= 100 and (tmp_path / "run" / "student_final.pth").exists()


@pytest.fixture
def detectors(tmp_path, monkeypatch):
    """The detectors' examples in a folder with the repository's configs and a data set of two digits' pictures."""
    for name in ("my_teacher.yaml", "my_student.yaml", "my_backbone.py"):
        (tmp_path / name).write_text(FILES[name])
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    for split in ("train", "val"):
        generate_split(tmp_path / "datasets" / "my", split, 2, seed=0)
    yield
    for name in ("my_train", "my_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    BACKBONE_REGISTRY._obj_map.pop("build_narrow_fpn_backbone", None)


@pytest.mark.slow
def test_detectors(detectors):
    """A teacher on one's own data, a student of it with one's own backbone, and stock Detectron2 with that student."""
    few = {key: value for key, value in SMALL.items() if "NUM_CLASSES" not in key and "RESNETS" not in key}
    few |= {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": "(1,)", "SOLVER.IMS_PER_BATCH": 2, "DATALOADER.NUM_WORKERS": 0}
    few |= {"INPUT.MIN_SIZE_TRAIN": "(96,)", "INPUT.MIN_SIZE_TEST": 96}
    for name in ("my_teacher", "my_student"):
        assert len(FILES[f"{name}.yaml"].splitlines()) <= 15
        cfg = load_det_cfg(f"{name}.yaml", [item for pair in few.items() for item in pair])
        assert cfg.OUTPUT_DIR == str(Path("output", name).resolve())
        results = train_detector(cfg)
        assert 0 <= results["bbox/AP"] <= 100
    assert cfg.TEACHER.MODEL.RESNETS.DEPTH == 50 and cfg.TEACHER.MODEL.FPN.OUT_CHANNELS == 16
    names = {}
    exec(STOCK, names)
    model = names["model"]
    saved = torch.load("output/my_student/student_final.pth", weights_only=True)["model"]
    assert type(model).__module__.startswith("detectron2.") and saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_which_methods_work_in_detectors():
    """The table's rows; what is in none of them or in the last is refused."""
    table = README[README.index("### Which methods") :].split("\n\n")[1].splitlines()[2:]
    rows = {line.split("|")[1].strip(): re.findall(r"`(\w+)`", line.split("|")[2]) for line in table}
    refused = rows.pop("not in detectors")
    softmax = rows["class logits, a softmax"]
    assert sorted([*chain(*rows.values()), *refused]) == sorted(name for name, _ in DISTILLERS)
    kinds = {"review_dkd_r101_r18": refused, "retinanet_bckd_r101_r50": [*refused, *softmax]}
    for config, wrong in kinds.items():
        for name, _ in DISTILLERS:
            cfg = small_cfg(config, **{"DISTILL.METHODS": [name]})
            if name in wrong:
                # One of them is found out in the first step only.
                with pytest.raises((ConfigError, TypeError)):
                    step(build(cfg), batch())
                continue
            model = build(cfg)
            if "retinanet" not in config:
                assert torch.isfinite(step(model, batch())[f"loss_{name.lower()}"])


def test_the_tables_of_detection_configs():
    """Each has its place in the README, by method and pair."""
    table = README[README.index("### Configurations") :].split("\n\n")[2].splitlines()
    pairs = re.findall(r"`(\w+)`", table[0])
    named = {path.stem for path in (ROOT / "configs" / "det").glob("*_r*_*.yaml")}
    found = set()
    for line in table[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:]]
        methods = [name for name in re.findall(r"`([^`]+)`", cells[0]) if "<pair>" not in name]
        if "{" in methods[0]:
            methods = [f"retinanet_{name}" for name in re.findall(r"\w+", methods[0].partition("{")[2])]
        for pair, mark in zip(pairs, cells[1:], strict=False):
            found |= {f"{method}_{pair}" for method in methods if mark == "x"}
            found |= {f"reviewkd_{pair}_mask" for name in re.findall(r"`([^`]+)`", cells[0]) if "_mask" in name}
    ours = {name for name in named if any(pair in name for pair in pairs)}
    assert found == ours


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
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_the_gpu_script_continues_where_it_stopped(tmp_path, task):
    line = [script, "benchmarks/gpu.py", task, "--device", "cpu", "--quick", "--processes", 2]
    line += ["--runs", tmp_path / "runs", "--output", tmp_path, "--minutes"]
    for minutes, left in ((0, 2), (5, 0)):
        output = tmp_path / f"output{minutes}.txt"
        assert exit_code(start(*line, minutes, output=output)) == 0, output.read_text()
        report = json.loads((tmp_path / f"{task}_cpu.json").read_text())
        assert report["table"] == {"runs to do": left, "failed": ""}
        # The second time they are there already.
        assert ("against_cpu:" in output.read_text()) == (minutes == 0)
    # Of the CPU to itself.
    assert report["against_cpu"]["largest"] < 1e-4
    assert all(facts["finite"] for facts in report["steps"].values())
    assert (tmp_path / f"{task}_cpu.md").read_text().count("| 1       |") == 2
