"""tools/check_data.py: what it says of good and of faulty data."""

import shutil

import numpy as np
import pytest
from PIL import Image

from d2distill.tools.check_data import main
from tests.dataset_files import write_image_folder


@pytest.fixture
def folder(tmp_path):
    write_image_folder(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_faulty_folder(folder, workers, command):
    train, val = folder / "train" / "class_0000", folder / "val" / "class_0001"
    (train / "00001.jpg").write_bytes((train / "00001.jpg").read_bytes()[:-200])
    (val / "empty.png").write_bytes(b"")
    (val / "notes.txt").write_text("")
    shutil.copy(train / "00002.jpg", val / "again.jfif")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("L", (7, 300)).save(val / "turned.jpg", exif=exif)
    Image.fromarray(np.zeros((5, 9), np.uint16)).save(val / "deep.tif")
    code, out, error = command(main, "--folder", folder, "--num-workers", workers)
    assert code == 1 and not error
    lines = out.splitlines()
    assert "12 training images: class_0000 4, class_0001 4, class_0002 4" in lines
    assert "10 test images: class_0000 2, class_0001 6, class_0002 2" in lines
    assert f"Files that are passed over, by ending: 1 .txt (e.g. {val}/notes.txt)" in lines
    assert "width: 7 to 56 pixels, median 56" in lines and "height: 5 to 300 pixels, median 40" in lines
    assert "modes: RGB 18, I;16 1, L 1" in lines or "modes: RGB 18, L 1, I;16 1" in lines
    assert "1 have an EXIF orientation; INPUT.EXIF_ORIENTATION False leaves them as they are stored" in lines
    assert f"1 test images are also training images\n  {val}/again.jfif = {train}/00002.jpg" in out
    assert "2 images cannot be read" in lines
    assert f"  cannot read image {train}/00001.jpg: " in out and f"  cannot read image {val}/empty.png: " in out


def test_a_good_folder_and_one_without_a_split(folder, command):
    code, out, _ = command(main, "--folder", folder, "--num-workers", 0)
    assert code == 0 and "0 test images are also training images\n0 images cannot be read\n" in out
    code, out, _ = command(main, "--folder", folder / "train", "--num-workers", 0)
    assert code == 0 and "12 training images" in out and "test images:" not in out
    code, out, _ = command(main, "--folder", folder / "train", "DATASETS.VAL_FRACTION", 0.25, "--num-workers", 0)
    assert code == 0 and "9 training images" in out and "3 test images" in out


def test_names_are_shown_escaped(folder, command):
    shown = r"a\n\x1b[2J\udcff"
    for split in ("train", "val"):
        (folder / split / "class_0000").rename(folder / split / "a\n\x1b[2J\udcff")
    shutil.copy(folder / "train" / "a\n\x1b[2J\udcff" / "00000.jpg", folder / "val" / "class_0001" / "again.jpg")
    (folder / "train" / "a\n\x1b[2J\udcff" / "00001.jpg").write_bytes(b"")
    code, out, _ = command(main, "--folder", folder, "--num-workers", 0)
    assert code == 1 and f"images: {shown} 4, class_0001 4" in out and "\x1b" not in out
    assert f"again.jpg = {folder}/train/{shown}/00000.jpg\n" in out
    assert f"cannot read image {folder}/train/{shown}/00001.jpg" in out


def test_the_data_set_of_a_configuration(folder, command):
    config = ("--config-file", "cls/digits_r8.yaml")
    code, out, _ = command(main, *config)
    assert code == 0 and "500 test images: 0 50, 1 51" in out and "keeps its images together" in out
    opts = ("DATASETS.NAME", "folder", "DATASETS.ROOT", folder, "DATASETS.CLASSES", "['a']", "--num-workers", 0)
    code, _, error = command(main, *config, *opts)
    assert code == 2 and error.startswith("error: DATASETS.CLASSES must name the classes of the train images")
    code, _, error = command(main)
    assert code == 2 and "name either --config-file or --folder" in error
