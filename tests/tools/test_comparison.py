"""Runs side by side, mostly with a command that only pretends to train."""

import copy
import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from threading import Thread

import pytest
from fvcore.common.config import CfgNode

from d2distill.common.engine.folder_lock import lock_folder
from d2distill.common.errors import ConfigError, OutputError, UserError
from d2distill.tools import benchmark_methods
from d2distill.tools.comparison import CLASSIFICATION, DETECTION, Comparison, Entry, RunsFailed, mean_std
from d2distill.tools.launchers import LocalLauncher

ROOT = Path(__file__).resolve().parents[2]
TEACHER = Entry("teacher", str(ROOT / "configs/cls/digits_vgg8.yaml"), [0])
KD = Entry("with KD", str(ROOT / "configs/cls/digits_vgg8_r8_kd.yaml"), [0, 1, 2], teacher=TEACHER)
DEFAULTS = {
    "SEED": 0,
    "OUTPUT_DIR": "",
    "MODEL": {"TEACHER": {"WEIGHTS": "", "CACHE": ""}},
    "SOLVER": {"EPOCHS": 2},
    "DISTILL": {"METHODS": []},
    # How the stand-in ends: at once, "with an error", or, the first time, "by SIGTERM".
    "ENDS": "",
}
SCRIPT = """
import json, os, signal, sys, time, yaml
from pathlib import Path

opts = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder, weights = Path(opts["OUTPUT_DIR"]), opts.get("MODEL.TEACHER.WEIGHTS")
print(sys.argv[1], sys.argv[3], opts["SEED"], os.environ["OMP_NUM_THREADS"])
if opts.get("ENDS") == "with an error" or (weights and not Path(weights).exists()):
    sys.exit("it cannot be done")
config = yaml.safe_load(Path(sys.argv[2]).read_text()) | {"SEED": int(opts["SEED"]), "ENDS": opts.get("ENDS", "")}
(folder / "config.yaml").write_text(yaml.safe_dump(config))
(folder / "metrics.json").write_text(json.dumps({"iteration": 4, "epoch": 2, "top1": 90}) + "\\n")
if opts.get("ENDS") == "by SIGTERM" and not (folder / "saved").exists():
    signal.signal(signal.SIGTERM, lambda *_: [(folder / "saved").touch(), os._exit(143)])
    (folder / "ready").write_text(str(os.getpid()))
    time.sleep(100)
(folder / "student_final.pth").touch()
results = {"top1": 90, "best_top1": 91, "parameters": 1e6, "flops": 1e6, "seconds": 1}
results["cache"] = opts.get("MODEL.TEACHER.CACHE", "")
(folder / "results.json").write_text(json.dumps(results))
"""


def load_cfg(config_file, opts):
    cfg = CfgNode(copy.deepcopy(DEFAULTS))
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(opts))
    return cfg


def stand_in_task(folder):
    return replace(CLASSIFICATION, script=Path(folder, "train.py"), load_cfg=load_cfg, modules=())


def stopped_run(folder):
    entry = Entry("stays", str(Path(folder, "digits_a.yaml")), [0, 1], ["ENDS", "by SIGTERM"])
    return Comparison(stand_in_task(folder), [entry], Path(folder, "out"))


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    for name in ("digits_a", "digits_b", "digits_a_b_kd", "digits_a_b_dkd"):
        methods = "DISTILL: {METHODS: [KD]}" if "kd" in name else ""
        (tmp_path / f"{name}.yaml").write_text(f"SOLVER: {{EPOCHS: 2}}\n{methods}\n")
    return stand_in_task(tmp_path)


def write_run(comparison, entry, seed, results, log=()):
    folder = comparison.folder(entry, seed)
    folder.mkdir(parents=True)
    load_cfg = comparison.task.load_cfg
    (folder / "config.yaml").write_text(load_cfg(entry.config_file, [*entry.opts, "SEED", str(seed)]).dump())
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in log))


def cells(text):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]


def test_every_seed_is_a_run_after_its_teachers_and_the_progress_is_shown(stand_in, tmp_path, capfd):
    teacher = Entry("teacher", str(tmp_path / "digits_a.yaml"), [0])
    student = Entry("student", str(tmp_path / "digits_a_b_kd.yaml"), [0, 3], teacher=teacher)
    Comparison(stand_in, [student, teacher], tmp_path / "out").run(2)
    consoles = {path.parent.name: path.read_text() for path in tmp_path.glob("out/*/console.txt")}
    assert consoles == {
        "digits_a_seed0": "--config-file --resume 0 1\n",
        "digits_a_b_kd_seed0": "--config-file --resume 0 1\n",
        "digits_a_b_kd_seed3": "--config-file --resume 3 1\n",
    }
    assert "3/3 runs, 100 %" in capfd.readouterr().err


def test_rows_share_what_their_teacher_gave(stand_in, tmp_path):
    teacher = Entry("teacher", str(tmp_path / "digits_a.yaml"), [0])
    student = Entry("student", str(tmp_path / "digits_a_b_kd.yaml"), [0], teacher=teacher)
    live = replace(student, label="live", opts=["MODEL.TEACHER.CACHE", ""])
    comparison = Comparison(stand_in, [teacher, student, live], tmp_path / "out")
    comparison.run(2)
    folders = [comparison.results(entry)[0]["cache"] for entry in comparison.entries]
    assert folders == ["", str(tmp_path / "out/teacher_outputs"), ""]
    # Where it is, another run may choose.
    Comparison(stand_in, [teacher, student], tmp_path / "out", ["MODEL.TEACHER.CACHE", "elsewhere"])


def test_run_folders_follow_the_settings(tmp_path):
    def name(*opts, **changes):
        return replace(KD, opts=opts, **changes).run_name(1)

    assert KD.run_name(1) == "digits_vgg8_r8_kd_seed1"
    assert name("DISTILL.KD.T", "2") == "digits_vgg8_r8_kd_DISTILL.KD.T=2_seed1"
    # The order of settings says nothing.
    assert name("SEED", "5", "DISTILL.KD.T", "2") == name("DISTILL.KD.T", "2", "SEED", "5")
    steps = [name("SOLVER.STEPS", f"[1, {n}]", "SOLVER.EPOCHS", "10" * 40) for n in (2, 3)]
    assert steps[0] != steps[1] and max(map(len, steps)) < 120 and not set(steps[0]) & set("[], ")
    teachers = [
        replace(TEACHER, seeds=[1]),
        replace(TEACHER, opts=["SOLVER.EPOCHS", "2"]),
        replace(TEACHER, config_file="x.yaml"),
    ]
    assert len({KD.run_name(1), *(name(teacher=teacher) for teacher in teachers)}) == 4
    for twin in (KD, replace(KD, label="other")):
        with pytest.raises(ConfigError, match="two rows or runs are called"):
            Comparison(CLASSIFICATION, [KD, twin], tmp_path)


def test_a_run_with_other_settings_is_no_result(stand_in, tmp_path):
    file = tmp_path / "digits_a.yaml"
    entry = Entry("mine", str(file), [0])
    Comparison(stand_in, [entry], tmp_path / "out").run(1)
    assert list(Comparison(stand_in, [entry], tmp_path / "out").results(entry)) == [0]
    file.write_text("SOLVER: {EPOCHS: 4}\n")
    with pytest.raises(
        ConfigError, match=r"digits_a_seed0 holds another run \(SOLVER.EPOCHS 2, not 4\): choose another"
    ):
        Comparison(stand_in, [entry], tmp_path / "out")


def test_a_failed_run_is_shown_by_the_end_of_its_log_and_stops_no_other(stand_in, tmp_path):
    broken = Entry("broken", str(tmp_path / "digits_a.yaml"), [0], ["ENDS", "with an error"])
    student = Entry("student", str(tmp_path / "digits_a_b_kd.yaml"), [0, 1], teacher=broken)
    plain = Entry("plain", str(tmp_path / "digits_b.yaml"), [0])
    comparison = Comparison(stand_in, [broken, student, plain], tmp_path / "out")
    with pytest.raises(UserError, match=r"the run in .*_seed0 failed:\n.*\nit cannot be done\n2 runs have no teacher"):
        comparison.run(1)
    assert comparison.results(plain) and not comparison.results(broken)


@pytest.mark.parametrize(
    ("number", "modules"), [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGTERM, ("colorsys",))]
)
def test_a_signal_ends_the_runs_and_the_next_call_continues(stand_in, tmp_path, number, modules):
    def send():
        while len(list(tmp_path.glob("out/*/ready"))) < 2:
            time.sleep(0.1)
        if modules:  # the server, too, has a signal that `timeout` or a terminal sends to the process group
            os.kill(forkserver._forkserver._forkserver_pid, number)
            time.sleep(0.5)
        os.kill(os.getpid(), number)

    comparison = stopped_run(tmp_path)
    comparison.task = replace(comparison.task, modules=modules)
    Thread(target=send, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        comparison.run(2)
    assert stop.value.code == 128 + number
    # Both had the time to save, and none is left.
    assert len(list(tmp_path.glob("out/*/saved"))) == 2
    assert not [path for path in tmp_path.glob("out/*/ready") if Path("/proc", path.read_text()).exists()]
    comparison.run(2)
    assert list(comparison.results(comparison.entries[0])) == [0, 1]


def test_a_run_that_another_process_makes_is_waited_for(stand_in, tmp_path, capfd):
    entry = Entry("mine", str(tmp_path / "digits_a.yaml"), [0, 1])
    comparison = Comparison(stand_in, [entry], tmp_path / "out")

    def train_elsewhere():
        while not (comparison.folder(entry, 1) / "results.json").exists():
            time.sleep(0.02)
        assert not (comparison.folder(entry, 0) / "console.txt").exists()
        stack.close()

    with ExitStack() as stack:
        stack.enter_context(lock_folder(comparison.folder(entry, 0)))
        Thread(target=train_elsewhere, daemon=True).start()
        comparison.run(1)
    assert list(comparison.results(entry)) == [0, 1]
    assert f"waiting for {comparison.folder(entry, 0)}, which is in use by process" in capfd.readouterr().err
    with lock_folder(tmp_path / "out"), pytest.raises(ConfigError, match=f"--output {tmp_path}/out is in use by"):
        comparison.run(1)


def test_a_folder_that_was_removed_ends_the_runs(stand_in, tmp_path):
    def remove():
        while len(found := [*filter(None, (path.read_text() for path in tmp_path.glob("out/*/ready")))]) < 2:
            time.sleep(0.02)
        processes.extend(found)
        shutil.rmtree(tmp_path / "out")

    processes, comparison = [], stopped_run(tmp_path)
    Thread(target=remove, daemon=True).start()
    with pytest.raises(OutputError, match=f"^{tmp_path}/out was removed"):
        comparison.run(2)
    assert not (tmp_path / "out").exists() and not [pid for pid in processes if Path("/proc", pid).exists()]


@pytest.mark.slow
def test_a_deadline_lets_runs_save(stand_in, tmp_path):
    comparison = stopped_run(tmp_path)
    comparison.run(2, deadline=time.monotonic())
    assert not list((tmp_path / "out").iterdir())
    comparison.run(2, deadline=time.monotonic() + 2)
    assert len(list(tmp_path.glob("out/*/saved"))) == 2 and not comparison.results(comparison.entries[0])


def test_mean_and_deviation():
    assert mean_std([2.0]) == "2.00" and mean_std([90, 92, 97]) == "93.00 ± 3.61" and mean_std([1.0, None]) == "n/a"


def test_table_and_picture_of_classifiers(tmp_path):
    comparison = Comparison(
        CLASSIFICATION, [KD, TEACHER, replace(KD, label="partly", seeds=[2, 3], opts=["SEED", "9"])], tmp_path
    )
    for entry, seed, top1 in ((KD, 0, 90), (KD, 1, 92), (KD, 2, 97), (TEACHER, 0, 99)):
        facts = {"top1": top1, "best_top1": top1 + 1, "parameters": 1234567, "flops": 2.5e6, "seconds": 12.4}
        log = [{"iteration": i, "epoch": i + 1, "top1": top1 * (i + 1) / 3} for i in range(3)]
        write_run(comparison, entry, seed, facts, [*log, {"iteration": 3, "lr": 1}])
    header, _, *rows = cells(comparison.table())
    assert header == ["", "last top-1 (%)", "best top-1 (%)", "parameters", "FLOPs", "time per run", "seeds"]
    assert rows[0] == ["with KD", "93.00 ± 3.61", "94.00 ± 3.61", "1.235 M", "2.5 M", "12 s", "3"]
    assert rows[1][:3] == ["teacher", "99.00", "100.00"] and rows[2] == ["partly", *"-----", "0 of 2"]
    comparison.draw_curves([KD, TEACHER], tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("best", [None, 31.5])
def test_table_of_detectors(tmp_path, best):
    entry = Entry("student", str(ROOT / "configs/det/digits_r18.yaml"), [0])
    comparison = Comparison(DETECTION, [entry], tmp_path)
    values = {"AP": 30, "AP50": 50, "AP75": 40, "APs": 25, "APm": None}
    facts = {"best_bbox/AP": best or 30, **{f"bbox/{name}": value for name, value in values.items()}}
    write_run(comparison, entry, 0, {**facts, "parameters": 1234567, "seconds": 12.4})
    header, _, row = cells(comparison.table())
    extra, number = (["best AP"], ["31.50"]) if best else ([], [])
    assert header == ["", "AP", *extra, "AP50", "AP75", "APs", "APm", "parameters", "time per run", "seeds"]
    assert row == ["student", "30.00", *number, "50.00", "40.00", "25.00", "n/a", "1.23 M", "12 s", "1"]


@pytest.fixture
def benchmark(stand_in, tmp_path, monkeypatch, capsys):
    """Calls `tools/benchmark_methods.py` on the stand-in's configurations."""
    monkeypatch.setattr("d2distill.tools.comparison.CLASSIFICATION", stand_in)
    for name in ("CONFIGS", "ROOT"):
        monkeypatch.setattr(benchmark_methods, name, tmp_path)
    networks = ["--teacher", "digits_a", "--student", "digits_b"]

    def call(*arguments):
        command = ["", *networks, "--seeds", "0", "--output", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        benchmark_methods.main()
        return capsys.readouterr().out

    return call


def test_a_part_of_a_benchmark_adds_rows_and_replaces_no_committed_table(benchmark, tmp_path):
    for name, rows in (("kd", 3), ("dkd", 4)):
        shown = benchmark("--only", name)
        assert shown.count(" 90.00 ") == rows
        assert (tmp_path / "benchmarks").exists() == (rows == 4)
    (committed,) = (tmp_path / "benchmarks" / "results").glob("digits_methods_*.md")
    assert [row[0] for row in cells(committed.read_text())[4:]] == ["teacher alone", "student alone", "dkd", "kd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "mine"], r"--student: no mine.yaml in .*; there are \['digits_a', 'digits_b'\]"),
        (["--only", "kdd"], r"--only kdd: no such ending \(did you mean .*kd\?\); there are \['dkd', 'kd'\]"),
        (["--teacher", "digits_b"], r"there is no digits_b_b_\*.yaml"),
    ],
)
def test_a_mistyped_name_of_a_benchmark_is_answered_with_those_that_exist(benchmark, arguments, message):
    with pytest.raises(ConfigError, match=message):
        benchmark(*arguments)


@pytest.mark.slow
def test_a_real_run_is_found_again(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "MODEL: {STUDENT: {NAME: resnet8}, DEVICE: cpu}\nDATASETS: {NAME: digits, TRAIN_SIZE: 16}\n"
        "SOLVER: {EPOCHS: 1}\nDATALOADER: {NUM_WORKERS: 0}\n"
    )
    entry = Entry("small", str(tmp_path / "small.yaml"), [3], ["SOLVER.STEPS", "[]"])
    Comparison(CLASSIFICATION, [entry], tmp_path / "out").run(2)
    comparison = Comparison(CLASSIFICATION, [entry], tmp_path / "out")
    assert list(comparison.results(entry)) == [3]
    assert cells(comparison.table())[2][-1] == "1"


def test_settings_of_all_runs_are_in_no_name(stand_in, tmp_path):
    entry = Entry("plain", str(tmp_path / "digits_a.yaml"), [0])
    comparison = Comparison(stand_in, [entry], tmp_path / "out", ["ENDS", "with an error"])
    assert comparison.folder(entry, 0).name == entry.run_name(0) == "digits_a_seed0"
    with pytest.raises(RunsFailed, match="it cannot be done"):
        comparison.run(1)
    Comparison(stand_in, [entry], tmp_path / "out").run(1)
    with pytest.raises(ConfigError, match=r"holds another run \(ENDS '', not 'with an error'\)"):
        Comparison(stand_in, [entry], tmp_path / "out", ["ENDS", "with an error"])


def test_a_run_is_what_the_command_does(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os, sys\nprint(__name__, sys.argv[1:], os.getsid(0) == os.getpid())\nsys.exit(7)\n")
    for launcher in (LocalLauncher([], ["colorsys"]), LocalLauncher([]), LocalLauncher(["0"], ["colorsys"])):
        run = launcher.start([sys.executable, str(script), "KEY", "a b"], tmp_path)
        run.wait()
        launcher.close()
        assert run.poll() == 7 and run.log_end() == ["__main__ ['KEY', 'a b'] True"]


def test_without_a_gpu_runs_find_the_modules_imported(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os, sys\nprint('colorsys' in sys.modules, os.environ['OMP_NUM_THREADS'])\n")
    for gpus, found in (([], "True 1"), (["0"], "False 1")):
        launcher = LocalLauncher(gpus, ["colorsys"])
        launcher.close()  # a server of other tests has other modules
        run = launcher.start([sys.executable, str(script)], tmp_path)
        run.wait()
        launcher.close()
        assert run.log_end() == [found]
