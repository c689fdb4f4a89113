"""`--help`, `--version` and wrong keys: answered at once, since nothing heavy is imported for them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import d2distill

ROOT = Path(__file__).resolve().parents[1]
ENTRY_POINTS = re.findall(r'"(d2distill-[\w-]+) = ([\w.]+):(\w+)"', (ROOT / "setup.py").read_text())
SCRIPTS = [path for path in (ROOT / "tools").glob("*.py") if "def main(" in path.read_text()]
COMMANDS = {(module, function) for _, module, function in ENTRY_POINTS}
COMMANDS |= {(f"d2distill.tools.{path.stem}", "main") for path in SCRIPTS if path.stem != "setup_env"}
#: In one process for all: it takes modules, functions and arguments, and prints what each shows. Detectron2, which is
#: looked for, imports torch.
CALL = """
import contextlib, importlib, io, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "numpy", "timm", "matplotlib", "scipy"):
            raise ImportError(f"{name} is imported before the arguments are checked")

sys.meta_path.insert(0, Refuse())
from d2distill.common.engine.cli import run_cli

found = []
for module, function, arguments in json.loads(sys.argv.pop()):
    shown, sys.argv = io.StringIO(), ["command", *arguments]
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            run_cli(getattr(importlib.import_module(module), function))
    except SystemExit as end:
        found.append([end.code, shown.getvalue()])
print(json.dumps(found))
"""


def run_python(code, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def call_without_torch(*calls):
    found = run_python(CALL, json.dumps(calls))
    assert len(found) == len(calls)
    return found


def test_help_and_version_of_every_command():
    assert len(COMMANDS) >= 12
    calls = [[*command, [flag]] for command in sorted(COMMANDS) for flag in ("--help", "--version")]
    for call, (code, text) in zip(calls, call_without_torch(*calls), strict=True):
        assert not code, (call, text)
        if call[2] == ["--version"]:
            assert text == f"d2distill {d2distill.__version__}\n", call
        else:
            assert text.startswith("usage: ") and text.count("\n") < 60, text


def test_wrong_flags_of_every_command():
    calls = [[*command, ["--hepl"]] for command in sorted(COMMANDS)]
    for call, (code, text) in zip(calls, call_without_torch(*calls), strict=True):
        assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, (call, text)


WRONG = {
    "SOLVER.BASE_RL 1": "unknown config key SOLVER.BASE_RL (did you mean SOLVER.BASE_LR",
    "SOLVER.EPOCHS many": "SOLVER.EPOCHS takes a whole number, but was given many",
    "METHODS [KD]": "unknown config key METHODS (did you mean DISTILL.METHODS",
    "DISTIL.METHODS [KD]": "unknown config key DISTIL.METHODS (did you mean DISTILL.METHODS",
    "DATASET.TYPE cifar100": "unknown config key DATASET.TYPE, which is MDistiller's: here it is DATASETS.NAME",
    "SOLVER.EPOCHS": "settings come as KEY VALUE pairs, but 'SOLVER.EPOCHS' has no value",
}


def test_wrong_keys_of_classifiers():
    file = "cls/digits_r8.yaml"
    calls = [["d2distill.commands", "train_cls", ["--config-file", file, *wrong.split()]] for wrong in WRONG]
    calls += [
        ["d2distill.tools.check_data", "main", ["--config-file", file, "SOLVER.BASE_RL", "1"]],
        ["d2distill.tools.eval_cls", "main", ["-m", "resnet8", "-c", "none.pth", "SOLVER.BASE_RL", "1"]],
        ["d2distill.tools.sweep", "main", [file, "SOLVER.BASE_RL=1,2"]],
    ]
    expected = [*WRONG.values(), *[WRONG["SOLVER.BASE_RL 1"]] * 3]
    for call, message, (code, text) in zip(calls, expected, call_without_torch(*calls), strict=True):
        assert code == 2 and text.startswith(f"error: {message}") and text.count("\n") == 1, (call, text)


def test_a_wrong_key_in_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("_BASE_: cls/digits_r8.yaml\nSOLVER: {EPOHCS: 3}\n")
    ((code, text),) = call_without_torch(["d2distill.commands", "train_cls", ["--config-file", str(file)]])
    assert code == 2 and text.startswith(f"error: {file}: unknown config key SOLVER.EPOHCS (did you mean SOLVER.EPOCHS")


def test_a_run_that_is_not_there(tmp_path):
    calls = [[f"d2distill.tools.{name}", "main", [str(tmp_path)]] for name in ("export", "predict")]
    for code, text in call_without_torch(calls[0], [*calls[1][:2], [str(tmp_path), "picture.png"]]):
        assert code == 2 and "has no student_best.pth or student_final.pth" in text


def test_the_losses_need_torch_and_the_registry_only():
    code = """
import json, sys, torch
before = set(sys.modules)
from d2distill.common.distillers import dkd_loss
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)))
"""
    assert set(run_python(code)) <= {"d2distill", "fvcore", "tabulate", "wcwidth"}


def test_make_help_lists_every_target():
    call = ["make", "--no-print-directory", "help"]  # under `make test` it would print its folders
    shown = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[0] for line in shown.splitlines()] == targets
    assert all(len(line.split()) > 2 for line in shown.splitlines())
