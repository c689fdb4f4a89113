"""How far a detector's loss is from its command."""

import pytest

from tests.detection.tiny_training import tiny_cfg
from tests.test_structure import calls_to_the_loss

pytestmark = pytest.mark.slow


def test_a_loss_is_at_most_nine_calls_and_six_files_from_the_command_line(tmp_path, tiny):
    (tmp_path / "config.yaml").write_text(tiny_cfg("rcnn", tmp_path / "run").dump())
    calls = calls_to_the_loss(tmp_path, "detection/train_net.py", tmp_path / "config.yaml")
    assert len(calls) + 1 <= 9 and len({file for file, _ in calls}) <= 6, calls
