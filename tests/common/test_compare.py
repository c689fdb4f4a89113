"""Runs side by side, with a command that only pretends to train."""

import pytest

from d2distill.common.engine.compare import Entry, mean_std, train_all
from d2distill.common.errors import UserError

SCRIPT = """
import json, os, sys
settings = dict(zip(sys.argv[4::2], sys.argv[5::2]))
if settings.get("FAIL") == "True":
    sys.exit("it cannot be done")
with open(os.path.join(settings["OUTPUT_DIR"], "metrics.json"), "w") as file:
    file.write(json.dumps({"iteration": 4}) + "\\n")
print(sys.argv[1:4], settings["SEED"], os.environ["OMP_NUM_THREADS"])
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def test_every_seed_is_a_run_and_progress_is_shown(script, tmp_path, capfd):
    entries = [Entry("one", "configs/a.yaml", [0, 3]), Entry("other", "configs/b.yaml", [1], ["KEY", "5"])]
    train_all(script, entries, tmp_path / "out", 2, lambda entry: 5, threads=3)
    consoles = {path.parent.name: path.read_text() for path in tmp_path.glob("out/*/console.txt")}
    assert consoles == {
        "a_seed0": "['--config-file', 'configs/a.yaml', '--resume'] 0 3\n",
        "a_seed3": "['--config-file', 'configs/a.yaml', '--resume'] 3 3\n",
        "b_seed1": "['--config-file', 'configs/b.yaml', '--resume'] 1 3\n",
    }
    shown = capfd.readouterr().err.splitlines()
    # What earlier calls have done (here: before the first look) says nothing about the time that is left.
    assert shown[0].endswith("starting")
    assert any(line.startswith("3/3 runs, 15/15 steps (100 %)") for line in shown)


def test_a_failed_run_is_shown_by_the_end_of_its_log(script, tmp_path):
    entry = Entry("broken", "a.yaml", [0], ["FAIL", "True"])
    with pytest.raises(UserError, match=r"the run in .*a_seed0 failed:\nit cannot be done"):
        train_all(script, [entry], tmp_path / "out", 1, lambda entry: 5)


def test_mean_and_deviation():
    assert mean_std([2.0]) == "2.00" and mean_std([90, 92, 97]) == "93.00 ± 3.61" and mean_std([1.0, None]) == "n/a"
