"""How far runs are, as their logs say."""

import builtins
import json

import pytest

from d2distill.configs import find_config
from d2distill.tools.comparison import CLASSIFICATION, DETECTION
from d2distill.tools.progress import LastLine


@pytest.fixture
def opened(monkeypatch):
    """What is read of files of metrics, from the time on that they are opened."""
    found, real = [], builtins.open

    def open_counted(path, *arguments, **options):
        found.append(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", open_counted)
    return found


def test_a_log_is_opened_when_it_has_grown(tmp_path, opened):
    file, last = tmp_path / "metrics.json", LastLine(tmp_path)
    assert last.read() == {} and not opened
    file.write_text('{"iteration": 1}\n{"iteration": 2}\n')
    assert [last.read() for _ in range(5)] == [{"iteration": 2}] * 5 and len(opened) == 1
    with file.open("a") as log:
        log.write('{"iteration": 3}\n{"itera')
    assert [last.read() for _ in range(5)] == [{"iteration": 3}] * 5 and len(opened) == 2
    with file.open("a") as log:
        log.write('tion": 4}\n')
    assert last.read() == {"iteration": 4} and len(opened) == 3


def test_a_resumed_run_has_dropped_lines(tmp_path):
    file, last = tmp_path / "metrics.json", LastLine(tmp_path)
    lines = [json.dumps({"iteration": number}) + "\n" for number in range(9)]
    file.write_text("".join(lines))
    assert last.read() == {"iteration": 8}
    file.write_text("".join(lines[:3]))
    assert last.read() == {"iteration": 2}
    file.write_text("".join(lines[:5]) + "not a line\n")
    assert last.read() == {"iteration": 2}
    file.write_text("".join(lines))
    assert last.read() == {"iteration": 8}


def test_shares():
    cfg = CLASSIFICATION.load_cfg("", ["MODEL.STUDENT.NAME", "resnet8", "SOLVER.EPOCHS", "8"])
    assert CLASSIFICATION.share({"iteration": 3, "epoch": 2.0}, cfg) == 0.25
    # Lines of evaluations before the training have no epoch.
    assert CLASSIFICATION.share({"iteration": 3}, cfg) == 0
    cfg = DETECTION.load_cfg(find_config("det/digits_r18.yaml"), ["SOLVER.MAX_ITER", "8"])
    assert DETECTION.share({"iteration": 3}, cfg) == 0.5
