"""What the README and the pages show, run as it stands."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
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
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
EVERYTHING = "\n".join([README, *PAGES.values()])
EXAMPLES = PAGES["extending.md"] + PAGES["detection.md"]
FILES = dict(re.findall(r"```(?:python|yaml)\n# (my_\w+\.(?:py|yaml))\n(.*?)```", EXAMPLES, re.DOTALL))
(STOCK,) = re.findall(r"```python\n(# stock Detectron2 .*?)```", PAGES["detection.md"], re.DOTALL)
ENTRY_POINTS = dict(re.findall(r'"(d2distill-[\w-]+) = ([\w.:]+)"', (ROOT / "setup.py").read_text()))
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
    page = PAGES["detection.md"]
    table = page[page.index("## Which methods") :].split("\n\n")[1].splitlines()[2:]
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
    """Each has its place in the page, by method and pair."""
    page = PAGES["detection.md"]
    table = page[page.index("## Configurations") :].split("\n\n")[2].splitlines()
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
    assert len(README.splitlines()) <= 150


def test_every_method_and_named_file_exists():
    for name, _ in DISTILLERS:
        assert f"`{name}`" in README and f"[`{name}`]({name.lower()}.md)" in PAGES["index.md"]
    files = r"(?:configs/\w+/\w+\.yaml|(?:tools|benchmarks)/\w+\.\w+|tests/[\w/]+\.py|common/\w+/\w+\.py)"
    for path in re.findall(files, EVERYTHING):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / path).exists() or path == "docs/api.md", path
    for path, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", EVERYTHING):
        assert f"\ndef {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
    for targets in re.findall(r"^make ([\w-]+)", EVERYTHING, re.MULTILINE):
        assert f"\n{targets}:" in (ROOT / "Makefile").read_text()


def test_the_library_example():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 6
    names = {"images": torch.randn(2, 3, 32, 32), "target": torch.tensor([3, 99])}
    exec(example, names)
    assert names["loss"].ndim == 0 and names["loss"] > 0 and names["loss"].requires_grad


@pytest.mark.slow
def test_getting_started(tmp_path, monkeypatch, command):
    """Its commands word for word, with fewer epochs and smaller networks behind them."""
    monkeypatch.chdir(tmp_path)
    page = PAGES["getting_started.md"]
    blocks = re.findall(r"```\n(d2distill-.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 10
    short = ["MODEL.DEVICE", "cpu", "SOLVER.EPOCHS", "1", "SOLVER.STEPS", "[]", "DATALOADER.NUM_WORKERS", "0"]
    short += ["SOLVER.IMS_PER_BATCH", "16", "DATASETS.TRAIN_SIZE", "16"]
    for line in lines:
        name, *arguments = shlex.split(line)
        module, _, function = ENTRY_POINTS[name].partition(":")
        settings = short if name == "d2distill-train-cls" else []
        if name == "d2distill-sweep":
            settings = [f"{key}={value}" for key, value in zip(short[::2], short[1::2], strict=True)]
        code, _, error = command(getattr(import_module(module), function), *arguments, *settings)
        assert code == 0, f"{line}: {error}"
    assert {path.name for path in Path("pictures").iterdir()} >= {"curves.png", "curves.svg", "tsne.png", "tsne.svg"}
    assert Path("output/sweep/leaderboard.html").is_file()
    assert "report.html" in page and Path("output/digits_vgg8_r8_dkd/report.html").is_file()
    names = {}
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example, names)
    assert names["student"].classes == [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def site_pages():
    spec = spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_card(site_pages):
    """Each setting is explained, beside its default in the code; there is a measured row, and advice."""
    assert set(site_pages.when_to_use()) == {name for name, _ in DISTILLERS}
    for name, method in DISTILLERS:
        text = site_pages.card(name)
        for key, value in {**method.common_defaults(), **method.defaults()}.items():
            (meaning,) = re.findall(rf"^\| `{key}` \| `{re.escape(str(value))}` \| (.+) \|$", text, re.MULTILINE)
            assert len(meaning.split()) > 1
        assert re.search(r"\*\*\d\d\.\d\d ± \d\.\d\d\*\*", text) and "    * `configs/" in text
    dkd, uskd = site_pages.card("DKD"), site_pages.card("USKD")
    assert "| `BETA` | `8.0` | Weight of the other classes." in dkd
    assert "::: d2distill.common.distillers.dkd.dkd_loss" in dkd
    assert "| in detectors | R-CNN |" in dkd and "| in detectors | R-CNN, RetinaNet |" in site_pages.card("PKD")
    assert "| teacher | none |" in uskd and "| in detectors | no |" in uskd


def test_the_tables_of_results(site_pages):
    """The pages' tables are those of the files that the commands wrote."""
    for name, page in (("digits_methods_cpu", "results.md"), ("digits_demo_cpu", "results.md")):
        rows = site_pages.measured_rows((ROOT / "benchmarks" / "results" / f"{name}.md").read_text())
        for label, (last, best, *_) in rows.items():
            assert f"| {label} | {last} | {best} |" in PAGES[page]
            assert name != "digits_demo_cpu" or f"| {label} | {last} | {best} |" in README


def test_the_picture_of_a_table(tmp_path):
    draw = [sys.executable, str(ROOT / "benchmarks" / "draw_results.py")]
    results, picture = ROOT / "benchmarks" / "results" / "digits_demo_cpu.md", tmp_path / "demo.svg"
    subprocess.run([*draw, str(results), str(picture), "--title", "On digits"], check=True, capture_output=True)
    # In an SVG letters are paths, and each text a comment before them.
    texts = re.findall(r"<!-- (.*?) -->", picture.read_text())
    assert {"On digits", "student with DKD", "95.13 ± 0.70", "99.20"} <= set(texts)


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
        assert report["suite"]["cases to do"] == (minutes == 0 and task == "classification")
        # The second time they are there already.
        assert ("against_cpu:" in output.read_text()) == (minutes == 0)
    # Of the CPU to itself.
    assert report["against_cpu"]["largest"] < 1e-4
    assert all(facts["finite"] for facts in report["steps"].values())
    assert (tmp_path / f"{task}_cpu.md").read_text().count("| 1       |") == 2
