import json
import logging
import os
import signal
import sys
from pathlib import Path

# Before torch is loaded: threads that spin while they wait make tests on a busy machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import providers

GOLDENS = Path(__file__).parent / "goldens"

# A shell that starts the tests in the background leaves Ctrl-C ignored, which the runs of tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# `make test` runs a process per core. Last digits depend on the number of threads: the same everywhere.
torch.set_num_threads(1)

# The examples are those of the last time: CI finds nothing that a change did not bring. To search for more:
# pytest --hypothesis-profile search FILE
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("repeatable")
# It also draws numbers that stand in this package's modules, of those that other tests happen to have imported.
providers._get_local_constants = lambda: providers._local_constants


@pytest.fixture(scope="session")
def loss_goldens():
    """Loss and gradient norms of the reference code (tests/goldens/losses.json)."""
    return json.loads((GOLDENS / "losses.json").read_text())


@pytest.fixture(autouse=True, scope="session")
def caches(tmp_path_factory):
    """What runs keep for others, such as teachers' accuracies, is the session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def interrupts():
    """Ctrl-C ends the tests, also after one that has called a command, which ignores it at its end."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls a command line in this process: ``command(main, *arguments)`` gives exit code, stdout and stderr."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.fixture
def log(caplog):
    """What this package logs, as caplog."""
    # A run in this process may have told Detectron2's logger to hand on nothing.
    logger = logging.getLogger("detectron2.d2distill")
    logger.addHandler(caplog.handler)
    before, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield caplog
    logger.propagate = before
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)
