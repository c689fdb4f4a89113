"""Ctrl-C at moments in which Python's own handler loses it, or prints a traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import atexit, os, signal, sys, time
from d2distill.common.engine import interrupts
from d2distill.common.engine.cli import run_cli

def interrupt(*_):
    signal.raise_signal(signal.SIGINT)

def main():
"""
#: Bodies of a command's main(). Each prints afterwards, unless the interrupt ends it.
BODIES = {
    "at a fork": """
    os.register_at_fork(before=interrupt)
    if os.fork() == 0:
        os._exit(0)
    time.sleep(0.1)
""",
    "in a destructor": """
    class Broken:
        __del__ = interrupt
    Broken()
    time.sleep(0.1)
""",
    "as another error": """
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("initialization failed")
""",
    "swallowed": """
    interrupts._PATIENCE = 1
    try:
        interrupt()
    except KeyboardInterrupt:
        pass
    time.sleep(9)
""",
    "several": """
    atexit.register(interrupt)
    try:
        interrupt()
    finally:
        interrupt()
        print("cleaned up")
""",
}


def run(body, handler=signal.default_int_handler):
    code = f"{HEAD}{body}\n    print('went on')\n\nrun_cli(main)"
    # The shell of a test in the background ignores SIGINT, which processes inherit.
    before = signal.signal(signal.SIGINT, handler)
    try:
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", BODIES)
def test_an_interrupt_ends_a_command_with_one_line(moment):
    done = run(BODIES[moment])
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
    assert done.stdout == ("cleaned up\n" if moment == "several" else "")


def test_an_interrupt_that_the_shell_ignores_stays_ignored():
    done = run("    interrupt()", signal.SIG_IGN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
