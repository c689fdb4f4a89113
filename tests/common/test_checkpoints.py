"""A checkpoint that is damaged or was changed is not resumed from, wherever it is damaged."""

import json
import os
import random
import zipfile

import pytest
import torch

from d2distill.common.errors import CheckpointError
from tests.tiny_task import tiny_trainer


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """The two checkpoints of a run."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, checkpoint_periods=[2]).run()
    return {path.name: path.read_bytes() for path in folder.glob("model_*.pth")}


@pytest.fixture
def resumed(tmp_path, content):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    trainer, newest = tiny_trainer(tmp_path), tmp_path / "model_0000004.pth"

    def resume(damaged):
        newest.write_bytes(damaged)
        return trainer.resume()

    return resume


def header_bytes(path):
    """Places of all bytes that are not a record's content, and some that are."""
    with zipfile.ZipFile(path) as archive:
        content = {
            place
            for record in archive.infolist()
            for place in range(record.header_offset + 200, record.header_offset + 200 + record.file_size)
        }
    size = os.path.getsize(path)
    return [place for place in range(size) if place not in content or place % 50 == 0]


def test_a_flipped_bit_anywhere(tmp_path, content, resumed, log):
    whole = content["model_0000004.pth"]
    assert resumed(whole) == 4
    draw, places = random.Random(0), header_bytes(tmp_path / "model_0000004.pth")
    for place in draw.sample(places, 100):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        log.clear()
        assert resumed(damaged) == 2
        assert f"{tmp_path}/model_0000004.pth " in log.text and "; trying the checkpoint before it" in log.text


@pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"", 0, 1, "x"), MemoryError(), KeyError("x"), EOFError])
def test_whatever_a_reader_raises(content, resumed, monkeypatch, log, error):
    class Broken(zipfile.ZipFile):
        def __init__(self, file):
            super().__init__(file)
            if "model_0000004" in file.name:
                raise error

    monkeypatch.setattr(zipfile, "ZipFile", Broken)
    assert resumed(content["model_0000004.pth"]) == 2
    assert "model_0000004.pth is damaged: " in log.text


def without_momentum(data):
    data["trainer"]["optimizer"]["state"].clear()


@pytest.mark.parametrize(
    "change", [without_momentum, lambda data: data["trainer"].update(seconds=1.0), lambda data: data.clear()]
)
def test_a_checkpoint_that_was_changed(tmp_path, content, resumed, log, change):
    path = tmp_path / "model_0000004.pth"
    data = torch.load(path, weights_only=True)
    change(data)
    torch.save(data, path)
    assert resumed(path.read_bytes()) == 2
    assert log.text.count(f"{path} ") == 1
    (tmp_path / "model_0000002.pth").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints") as error:
        resumed(path.read_bytes())
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_a_version_without_digests(tmp_path, resumed, content):
    path = tmp_path / "model_0000004.pth"
    data = torch.load(path, weights_only=True)
    del data["has_digest"]
    torch.save(data, path)
    assert resumed(path.read_bytes()) == 4


def test_what_is_no_file_is_not_opened(tmp_path, resumed, content, log):
    """A pipe would wait for a writer."""
    os.mkfifo(tmp_path / "model_0000006.pth")
    assert resumed(content["model_0000004.pth"]) == 4
    assert "model_0000006.pth is no regular file; trying the checkpoint before it" in log.text


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"steps": 4, "top1": \xff}'])
def test_damaged_results_are_written_anew(tmp_path, damaged):
    tiny_trainer(tmp_path).run()
    whole = (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(damaged)
    tiny_trainer(tmp_path).run(resume=True)
    assert json.loads((tmp_path / "results.json").read_bytes()).keys() == json.loads(whole).keys()
