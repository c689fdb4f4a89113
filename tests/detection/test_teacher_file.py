"""TEACHER.CONFIG_FILE: which file it names."""

from pathlib import Path

import pytest

from d2distill.detection.config import load_cfg

SET = "VERSION: 2\nDATASETS: {TRAIN: [a], TEST: [a]}"


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
