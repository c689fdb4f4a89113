"""The detection demo: its picture, and the whole of it in small."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from d2distill.detection.config import load_cfg
from d2distill.tools import demo_det
from d2distill.tools.comparison import DETECTION, Comparison, Entry
from d2distill.tools.drawing import draw_detections
from tests.detection.tiny_training import TINY
from tests.processes import exit_code, script, start

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [str(ROOT / "configs" / "det" / f"digits_{name}.yaml") for name in ("r18", "r50_narrow")]
SETS = {f"tiny_{split}": entry for split, entry in TINY.items()}
SMALL = ["DATASETS.REGISTER", str(SETS), "DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val',)"]


@pytest.mark.slow
def test_picture(tmp_path, tiny):
    entries = [Entry(name, file, [4], SMALL) for name, file in zip(("one", "other"), CONFIGS, strict=True)]
    comparison = Comparison(DETECTION, entries, tmp_path)
    for entry in entries:
        torch.manual_seed(0)
        model = build_model(load_cfg(entry.config_file, entry.opts))
        folder = comparison.folder(entry, 4)
        folder.mkdir()
        torch.save({"model": model.state_dict()}, folder / "student_final.pth")
        (folder / "results.json").write_text('{"bbox/AP": 12.34}')
        (folder / "config.yaml").write_text("SEED: 4")
    # Detectors that have learned nothing are sure of nothing: every score is drawn, or none.
    for threshold in (0.0, 1.0):
        draw_detections(comparison, tmp_path / f"{threshold}.png", 2, threshold)
    busy, empty = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("0.0", "1.0"))
    assert busy.shape == empty.shape
    # A third each for the truth, which has boxes, and for the two detectors.
    below, width = slice(70, None), busy.shape[1] // 3
    changed = [(busy != empty)[below, n * width : (n + 1) * width].mean() for n in range(3)]
    assert changed[0] == 0 and min(changed[1:]) > 0.01
    # The ground truth has boxes.
    assert not np.array_equal(empty[below, :width], empty[below, width : 2 * width])


@pytest.mark.slow
def test_the_demo(tmp_path, tiny):
    """Whatever else is in its folder stays."""
    (tmp_path / "thesis.txt").write_text("mine")
    opts = [*SMALL, "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    process = start(script, "tools/demo_det.py", *opts, "--output", tmp_path, "--seeds", 0, output=tmp_path / "shown")
    assert exit_code(process) == 0, (tmp_path / "shown").read_text()
    shown = (tmp_path / "shown").read_text()
    assert "3/3 runs, 100 %" in shown
    rows = [[cell.strip() for cell in row.split("|")] for row in (tmp_path / "results.md").read_text().splitlines()]
    assert [row[1] for row in rows[2:]] == re.findall(r"\| (teacher|student alone|distilled) ", shown)
    assert len(rows) == 5 and (tmp_path / "detections.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    # A second call finds its runs as it left them.
    comparison = Comparison(DETECTION, demo_det.entries([0], opts), tmp_path, demo_det.SETTINGS)
    assert all(comparison.results(entry) for entry in comparison.entries)
