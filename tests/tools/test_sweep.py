"""Sweeps: their rows, runs and leaderboard, mostly with a command that only pretends to train."""

import csv
import json
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest

from d2distill.common.errors import ConfigError
from d2distill.tools import comparison, demo
from d2distill.tools.comparison import CLASSIFICATION, DETECTION, Comparison, Entry
from d2distill.tools.launchers import LocalLauncher, SlurmLauncher, _Command, visible_gpus
from d2distill.tools.leaderboard import paired_test, write_leaderboard
from d2distill.tools.sweep import _one_task, _values, entries, main

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PLAIN, KD, TEACHER = (str(CONFIGS / "cls" / f"digits_{name}.yaml") for name in ("r8", "vgg8_r8_kd", "vgg8"))
#: Its top-1: higher with KD, higher for a lower temperature.
SCRIPT = """
import json, os, sys
from pathlib import Path

opts = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder, seed, temperature = Path(opts["OUTPUT_DIR"]), int(opts["SEED"]), float(opts.get("DISTILL.KD.T", 0))
print("GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
if temperature == 4 and seed == 1 and not Path(folder.parent, "mended").exists():
    sys.exit("it cannot be done")
top1 = 80 + seed + (10 - temperature + 0.5 * seed if temperature else 0)
folder.joinpath("config.yaml").write_text(f"SEED: {seed}")
folder.joinpath("student_final.pth").touch()
folder.joinpath("metrics.json").write_text(json.dumps({"iteration": 1, "epoch": 1, "top1": top1}))
facts = {"top1": top1, "best_top1": top1 + 1, "parameters": 78000, "flops": 1e6, "seconds": 3}
folder.joinpath("results.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    task = replace(CLASSIFICATION, script=script, modules=())
    monkeypatch.setattr(comparison, "CLASSIFICATION", task)
    return task


def labels(rows):
    return [row.label for row in rows]


def test_a_sweep_fails_in_part_is_mended_and_ends_with_a_leaderboard(stand_in, tmp_path, command):
    arguments = ["cls/digits_r8.yaml", KD, "--teacher", "cls/digits_vgg8.yaml", "--output", tmp_path / "out"]
    arguments += ["--seeds", 0, 1, 2, "DISTILL.KD.T=2,4"]
    code, out, error = command(main, *arguments)
    folders = {path.parent.name: path.read_text() for path in tmp_path.glob("out/*/console.txt")}
    assert code == 1 and "4 rows, 10 runs" in out
    assert re.search(r"digits_vgg8_r8_kd_DISTILL.KD.T=4_seed1 failed:\nGPU .*\nit cannot be done\n$", error)
    plain = [f"digits_r8_seed{seed}" for seed in range(3)]
    assert set(folders) == {
        "digits_vgg8_seed0", *plain, *(f"digits_vgg8_r8_kd_DISTILL.KD.T={t}_seed{s}" for t in (2, 4) for s in range(3))
    }  # fmt: skip

    (tmp_path / "out" / "mended").touch()
    for path in tmp_path.glob("out/*/console.txt"):
        path.unlink()
    code, out, _ = command(main, *arguments)
    (again,) = tmp_path.glob("out/*/console.txt")
    assert code == 0 and again.parent.name.endswith("T=4_seed1")
    text = (tmp_path / "out" / "leaderboard.md").read_text()
    assert text.startswith("`d2distill-sweep cls/digits_r8.yaml ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header = ["", "last top1", "best top1", "parameters", "time per run", "seeds", "difference", "p"]
    assert rows[0] == header
    # Differences 8, 8.5, 9: t = 8.5 / (0.5 / sqrt(3)) = 29.44, of which p = 1 - t / sqrt(t^2 + 2) at two degrees.
    assert rows[2:] == [
        ["digits_vgg8_r8_kd DISTILL.KD.T=2", "89.50 ± 1.50", "90.50 ± 1.50", "0.078 M", "3 s", "3", "+8.50", "0.0012"],
        ["digits_vgg8_r8_kd DISTILL.KD.T=4", "87.50 ± 1.50", "88.50 ± 1.50", "0.078 M", "3 s", "3", "+6.50", "0.002"],
        ["digits_r8", "81.00 ± 1.00", "82.00 ± 1.00", "0.078 M", "3 s", "3", "baseline", ""],
        ["teacher: digits_vgg8", "80.00", "81.00", "0.078 M", "3 s", "1", "+0.00", "too few seeds"],
    ]
    assert out.count("\n| ") == 5
    with open(tmp_path / "out" / "leaderboard.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == [row[0] for row in rows[2:]] and float(table[0]["last"]) == 89.5
    page = (tmp_path / "out" / "leaderboard.html").read_text()
    assert page.count("<tr") == 5 and "89.50 ± 1.50" in page and not re.search(r"(?:src|href)=", page)


def test_rows():
    # Of a method's settings a row without it has no use; the same row is not there twice.
    rows = entries(CLASSIFICATION, [PLAIN, KD], [0], {"DISTILL.KD.T": ["2", "4"], "SOLVER.EPOCHS": ["3"]}, TEACHER)
    assert labels(rows) == [
        "teacher: digits_vgg8", "digits_r8", *(f"digits_vgg8_r8_kd DISTILL.KD.T={t}" for t in (2, 4))
    ]  # fmt: skip
    assert [row.opts for row in rows[:3]] == [
        ["SOLVER.EPOCHS", "3"], ["SOLVER.EPOCHS", "3"], ["SOLVER.EPOCHS", "3", "DISTILL.KD.T", "2"]
    ]  # fmt: skip
    assert [row.teacher for row in rows] == [None, None, rows[0], rows[0]]
    # A configuration that names no teacher is told the network of the one that is given.
    rows = entries(CLASSIFICATION, [PLAIN], [0], {"DISTILL.METHODS": ["[]", "[KD]"]}, TEACHER)
    assert [row.opts for row in rows[1:]] == [
        ["DISTILL.METHODS", "[]"], ["DISTILL.METHODS", "[KD]", "MODEL.TEACHER.NAME", "vgg8"]
    ]  # fmt: skip
    assert [row.teacher for row in rows[1:]] == [None, rows[0]]


def test_rows_of_detectors():
    files = [str(CONFIGS / "det" / f"{name}.yaml") for name in ("digits_r50_narrow", "dkd_r101_r18", "digits_r18")]
    rows = entries(DETECTION, files[:2], [0], {"SOLVER.BASE_LR": ["0.1", "0.2"]}, files[2])
    assert labels(rows)[1:] == [
        f"{n} SOLVER.BASE_LR={lr}" for n in ("digits_r50_narrow", "dkd_r101_r18") for lr in (0.1, 0.2)
    ]
    # It names its teacher's configuration itself.
    assert rows[3].opts == ["SOLVER.BASE_LR", "0.1"] and rows[3].teacher is rows[0] and rows[1].teacher is None


def test_the_task_is_read_off_the_configuration():
    for folder, task in (("cls", CLASSIFICATION), ("det", DETECTION)):
        kinds = (CONFIGS / folder).glob("[bdfilo]*.yaml")  # most of CIFAR's look alike
        assert _one_task([str(path) for path in kinds]) is task
    with pytest.raises(ConfigError, match="sweep one task at a time"):
        _one_task([PLAIN, str(CONFIGS / "det" / "r18.yaml")])


@pytest.mark.parametrize(
    ("item", "values"),
    [
        ("SOLVER.BASE_LR=0.10,1e-3", ["0.10", "1e-3"]),
        ("SOLVER.STEPS=[1,2], [3]", ["[1,2]", "[3]"]),
        ("MODEL.STUDENT.NAME=timm:resnet18,resnet8", ["timm:resnet18", "resnet8"]),
        ("DATASETS.ROOT='a,b',/c=d", ["'a,b'", "/c=d"]),
        ("SOLVER.AMP=", [""]),
    ],
)
def test_values(item, values):
    assert _values(item) == (item.partition("=")[0], values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.yaml"], "mine.yaml: no such file, nor one of d2distill's configs"),
        ([PLAIN, PLAIN], "two configurations are called digits_r8.yaml"),
        ([PLAIN, "SEED=1,2"], "SEED=1,2: every run has its own; use --seeds"),
        ([PLAIN, "SOLVER.STEPS=[1,2"], "SOLVER.STEPS=.1,2: values have commas between them"),
        ([PLAIN, "SOLVER.EPOCH=1,2"], r"unknown config key SOLVER.EPOCH \(did you mean SOLVER.EPOCHS"),
        ([PLAIN, "--baseline", "digits_r9"], r"no such row \(did you mean digits_r8\?\); there are digits_r8"),
        ([PLAIN, "--teacher", TEACHER], "no row has a method that needs a teacher"),
        ([PLAIN, "--slurm", "partition=gpu"], "--slurm name=d2distill partition=gpu: .*slurm"),
        ([PLAIN, "--slurm", "cluster=local", "gpus=1"], "--slurm name=d2distill gpus=1: .*gpus"),
        (["--seeds", "1"], "name at least one CONFIG"),
    ],
)
def test_mistakes_are_answered_in_one_line(stand_in, tmp_path, command, arguments, message):
    code, _, error = command(main, *arguments, "--output", tmp_path / "out")
    assert code == 2 and re.search(message, error), error
    assert not list(tmp_path.glob("out/*/console.txt"))


def test_each_run_has_a_gpu(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    launcher = LocalLauncher()
    assert visible_gpus() == ["3", "7"] and launcher.jobs == 2
    Comparison(stand_in, [Entry("plain", PLAIN, [0, 1])], tmp_path / "out").run(0, launcher=launcher)
    assert sorted(path.read_text() for path in tmp_path.glob("out/*/console.txt")) == ["GPU 3\n", "GPU 7\n"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]


@pytest.mark.slow
def test_runs_are_jobs_of_submitit(stand_in, tmp_path, command):
    """On its executor for this machine, which submits, polls and reads logs as that for SLURM does."""
    arguments = [KD, "--teacher", TEACHER, "DISTILL.KD.T=2,4", "--output", tmp_path / "out", "--seeds", 1]
    code, out, error = command(main, *arguments, "--slurm", "cluster=local", "timeout_min=5", "partition=gpu")
    assert code == 1 and "it cannot be done" in error
    assert "| digits_vgg8_r8_kd DISTILL.KD.T=2 | 89.50 " in out and "| 0 of 1 " in out
    assert list(tmp_path.glob("out/slurm/*_log.out"))


def test_the_settings_of_slurm(stand_in, tmp_path, monkeypatch, command):
    given, jobs = {}, []

    class Executor:
        def __init__(self, folder, cluster):
            given["cluster"] = cluster

        def update_parameters(self, **settings):
            given.update(settings)

        def submit(self, run):
            jobs.append(run.command)
            code = run()
            return SimpleNamespace(done=lambda: True, exception=lambda: None, result=lambda: code)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    settings = ["partition=gpu", "gpus_per_node=1", "time=10:00:00"]
    code, out, _ = command(main, PLAIN, "--output", tmp_path / "out", "--seeds", 0, 4, "--slurm", *settings)
    assert code == 0 and "| 82.00 ± 2.83 " in out and len(jobs) == 2
    named = {"slurm_partition": "gpu", "gpus_per_node": 1, "slurm_time": "10:00:00", "name": "d2distill"}
    assert given == {"cluster": "slurm", **named}


def test_without_submitit(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'd2distill\[slurm\]'"):
        SlurmLauncher(tmp_path, {})


def test_a_job_that_is_preempted_lets_its_run_save_and_is_queued_again(tmp_path):
    pytest.importorskip("submitit")
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); time.sleep(60)"
    job, again = _Command([sys.executable, "-c", code]), []
    Timer(1.0, lambda: again.append(job.checkpoint())).start()
    assert job() == 143
    while not again:
        time.sleep(0.05)
    assert again[0].function.command == job.command


def test_paired_test():
    # Differences 1, 2, 3: t = 2 sqrt(3), of which p = 1 - t / sqrt(t^2 + 2) at two degrees of freedom.
    mean, p = paired_test([(5, 4), (6, 4), (9, 6)])
    assert mean == 2 and p == pytest.approx(1 - 12**0.5 / 14**0.5)
    assert paired_test([(5, 4), (6, 4)]) == (1.5, "too few seeds") and paired_test([]) == (None, "too few seeds")
    assert paired_test([(5, 4), (6, 5), (9, 8)]) == (1, "all seeds alike")


def test_a_leaderboard_of_detectors_whose_metric_is_not_always_defined(tmp_path):
    rows = [Entry(name, str(CONFIGS / "det" / "digits_r18.yaml"), [0], ["SOLVER.BASE_LR", lr])
            for name, lr in (("none", "0.1"), ("undefined", "0.2"), ("good", "0.3"))]  # fmt: skip
    runs = Comparison(DETECTION, rows, tmp_path)
    for row, value in zip(rows[1:], (None, 31.25), strict=True):
        folder = runs.folder(row, 0)
        folder.mkdir()
        (folder / "config.yaml").write_text("SEED: 0")
        facts = {"bbox/AP": value, "best_bbox/AP": value, "parameters": 1e6, "seconds": 2}
        (folder / "results.json").write_text(json.dumps(facts))
    table = write_leaderboard(runs, rows[0], "d2distill-sweep")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[:2] + row[5:] for row in cells] == [
        ["good", "31.25", "1", "-", "too few seeds"],
        ["none", "-", "0 of 1", "baseline", ""],
        ["undefined", "n/a", "1", "-", "too few seeds"],
    ]


def test_after_the_demo_it_says_what_is_next(stand_in, tmp_path, command):
    code, out, _ = command(demo.main, "--output", tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "learning_curves.png").is_file()
    after = out[out.index("What next:") :]
    student, picture = re.search(r"predict.py (\S+) (\S+)", after).groups()
    assert Path(student, "results.json").is_file() and Path(picture).read_bytes()[:4] == b"\x89PNG"
    for path in re.findall(r"\b(?:tools|docs)/\w+\.\w+", after):
        assert (CONFIGS.parent / path).is_file()
    started = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/console.txt")}
    (tmp_path / "out" / "mended").touch()
    arguments = shlex.split(re.search(r"sweep.py (.*)", after)[1])
    code, out, _ = command(main, *arguments, "--baseline", "digits_vgg8_r8_kd DISTILL.KD.T=4")
    assert code == 0 and re.search(r"DISTILL.KD.T=1 .* \+3.00 ", out) and re.search("DISTILL.KD.T=4 .* baseline ", out)
    # Nothing was trained again.
    assert len(list(tmp_path.glob("out/*/console.txt"))) == len(started) + 6
    assert all(path.stat().st_mtime_ns == time for path, time in started.items())
