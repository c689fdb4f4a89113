"""The detection demo: table, picture, and the whole of it in small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from d2distill.detection.compare import Entry, results_of, table
from d2distill.detection.config import load_cfg
from d2distill.detection.draw import draw_detections
from tests.detection.tiny_training import TINY

ROOT = Path(__file__).resolve().parents[2]
TEACHER, STUDENT = (f"configs/det/digits_{name}.yaml" for name in ("r18", "r50_narrow"))
SETS = {f"tiny_{split}": entry for split, entry in TINY.items()}
SMALL = ["DATASETS.REGISTER", str(SETS), "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]
SET = "VERSION: 2\nDATASETS: {TRAIN: [a], TEST: [a]}"


def write_run(folder, ap, best=None):
    folder.mkdir(parents=True)
    values = {"AP": ap, "AP50": ap + 20, "AP75": ap + 10, "APs": ap - 5, "APm": ap + 5, "APl": float("nan")}
    facts = {f"bbox/{name}": value for name, value in values.items()}
    facts |= {f"best_bbox/{name}": value for name, value in values.items()}
    facts |= {"best_bbox/AP": best or ap, "parameters": 1234567, "seconds": 12.4}
    (folder / "results.json").write_text(json.dumps(facts))


def cells(text):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]


def test_table(tmp_path):
    teacher, student = Entry("teacher", "t.yaml", [0]), Entry("student", "s.yaml", [0, 1, 2])
    write_run(teacher.folders(tmp_path)[0], 50)
    for folder, ap in zip(student.folders(tmp_path), (30, 32, 37), strict=True):
        write_run(folder, ap)
    header, _, *rows = cells(table([teacher, student], tmp_path))
    assert header == ["", "AP", "AP50", "AP75", "APs", "APm", "parameters", "time per run", "seeds"]
    assert rows[0] == ["teacher", "50.00", "70.00", "60.00", "45.00", "55.00", "1.23 M", "12 s", "1"]
    assert rows[1][:3] == ["student", "33.00 ± 3.61", "53.00 ± 3.61"] and rows[1][-1] == "3"
    assert [run["bbox/AP"] for run in results_of(student, tmp_path)] == [30, 32, 37]


def test_table_has_the_best_ap_where_it_is_another(tmp_path):
    entry = Entry("student", "s.yaml", [0])
    write_run(entry.folders(tmp_path)[0], 30, best=31.5)
    header, _, row = cells(table([entry], tmp_path))
    assert header[1:4] == ["AP", "best AP", "AP50"] and row[1:4] == ["30.00", "31.50", "50.00"]


def test_picture(tmp_path, tiny):
    entries = [Entry("teacher", TEACHER, [0], SMALL), Entry("student", STUDENT, [4, 5], SMALL)]
    for seed, entry in enumerate(entries):
        torch.manual_seed(seed)
        model = build_model(load_cfg(entry.config_file, entry.opts))
        folder = entry.folders(tmp_path)[0]
        folder.mkdir()
        torch.save({"model": model.state_dict()}, folder / "student_final.pth")
    # Detectors that have learned nothing are sure of nothing: every score is drawn.
    for threshold in (0.0, 1.0):
        draw_detections(entries, ["one", "other"], tmp_path, tmp_path / f"{threshold}.png", 2, threshold)
    records = json.loads((tiny / "tiny" / "annotations" / "val.json").read_text())["images"][:2]
    heights = sum(round(340 * image["height"] / image["width"]) for image in records)
    busy, empty = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("0.0", "1.0"))
    assert busy.shape == empty.shape and busy.shape[1] == 3 * 352 + 12
    assert abs(busy.shape[0] - (52 + heights + 2 * 12)) <= 2
    panels = [slice(12 + 352 * n, 352 * (n + 1)) for n in range(3)]
    assert (busy[52:, panels[0]] == empty[52:, panels[0]]).all() and (busy[:, panels[2]] != empty[:, panels[2]]).any()
    # The truth has boxes, the columns without detections are the image alone: alike but for the titles.
    below = empty[52:]
    assert (below[:, panels[1]] == below[:, panels[2]]).all() and (below[:, panels[0]] != below[:, panels[1]]).any()


@pytest.mark.parametrize("folder", ["configs", "."])
def test_the_teachers_file_is_found_beside_the_one_that_names_it(tmp_path, monkeypatch, folder):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "teacher.yaml").write_text("VERSION: 2\nMODEL: {MASK_ON: True}\n")
    (tmp_path / "configs" / "base.yaml").write_text(f"{SET}\nTEACHER: {{CONFIG_FILE: teacher.yaml}}\n")
    (tmp_path / "student.yaml").write_text("_BASE_: configs/base.yaml\nSEED: 4\n")
    monkeypatch.chdir(tmp_path / folder)
    cfg = load_cfg("../student.yaml" if folder == "configs" else "student.yaml")
    assert cfg.TEACHER.MODEL.MASK_ON and not cfg.MODEL.MASK_ON
    # A run folder's file is found from the same working directory.
    Path("run").mkdir()
    Path("run", "config.yaml").write_text(cfg.dump())
    again = load_cfg("run/config.yaml").TEACHER
    assert again.CONFIG_FILE == cfg.TEACHER.CONFIG_FILE and again.MODEL.MASK_ON
    # A command line's is a path from the working directory, and so is a file's where nothing lies beside it.
    at_hand = "teacher.yaml" if folder == "configs" else "configs/teacher.yaml"
    Path("run", "other.yaml").write_text(f"{SET}\nTEACHER: {{CONFIG_FILE: {at_hand}}}\n")
    assert load_cfg("run/other.yaml").TEACHER.MODEL.MASK_ON
    opts = ["TEACHER.CONFIG_FILE", at_hand, "DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('a',)"]
    assert load_cfg(opts=opts).TEACHER.MODEL.MASK_ON


@pytest.mark.slow
def test_the_demo(tmp_path, tiny):
    tiny_steps = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    command = [sys.executable, "tools/demo_det.py", *SMALL, *tiny_steps, "--output", str(tmp_path), "--seeds", "0"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert "2/2 runs, 4/4 steps (100 %)" in shown.stderr and "1/1 runs, 2/2 steps (100 %)" in shown.stderr
    rows = cells((tmp_path / "results.md").read_text())[2:]
    assert [row[0] for row in rows] == re.findall(r"\| (teacher|student alone|[\w ]*distilled) ", shown.stdout)
    assert len(rows) == 3 and (tmp_path / "detections.png").read_bytes()[:4] == b"\x89PNG"
