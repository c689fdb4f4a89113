"""`--help` and `--version` of every command: quick, since nothing heavy is imported for them."""

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
#: In one process for all: it takes (module, function) pairs, and prints what each shows and takes.
CALL = """
import contextlib, importlib, io, json, sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "numpy", "detectron2", "timm", "matplotlib", "scipy"):
            raise ImportError(f"{name} is imported before the arguments are parsed")

sys.meta_path.insert(0, Refuse())
found = {}
for module, function in json.loads(sys.argv.pop()):
    for flag in ("--help", "--version"):
        shown, start, sys.argv = io.StringIO(), time.process_time(), ["command", flag]
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
                getattr(importlib.import_module(module), function)()
        except SystemExit as end:
            found[f"{module} {function} {flag}"] = [end.code, shown.getvalue(), time.process_time() - start]
print(json.dumps(found))
"""


def test_help_and_version_of_every_command():
    commands = {(module, function) for _, module, function in ENTRY_POINTS}
    commands |= {(f"d2distill.tools.{path.stem}", "main") for path in SCRIPTS if path.stem != "setup_env"}
    assert len(commands) >= 12
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", CALL, json.dumps(sorted(commands))]
    done = subprocess.run(call, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(commands)
    for name, (code, text, seconds) in found.items():
        assert not code and seconds < 0.5, (name, code, text, seconds)
        if name.endswith("--version"):
            assert text == f"d2distill {d2distill.__version__}\n", name
        else:
            assert text.startswith("usage: ") and text.count("\n") < 60, text


def test_make_help_lists_every_target():
    call = ["make", "--no-print-directory", "help"]  # under `make test` it would print its folders
    shown = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[0] for line in shown.splitlines()] == targets
    assert all(len(line.split()) > 2 for line in shown.splitlines())
