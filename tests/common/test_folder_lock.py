"""One job at a time writes into a folder, and none into one that is no longer its own."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from d2distill.common.engine.folder_lock import check_folder, folder_user, lock_folder
from d2distill.common.errors import ConfigError, OutputError

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, sys, time
from d2distill.common.engine.folder_lock import lock_folder

with lock_folder(sys.argv[1]):
    # As a loader's worker, which may outlive its process.
    worker = os.fork() or time.sleep(100)
    print(worker, flush=True)
    time.sleep(100)
"""


def test_a_folder_is_held_by_one_and_says_by_whom(tmp_path):
    folder, me = tmp_path / "run", f"process {os.getpid()} on {socket.gethostname()} since 20"
    with lock_folder(folder) as warning:
        assert not warning and folder_user(folder).startswith(me)
        with pytest.raises(ConfigError, match=f"^OUTPUT_DIR {folder} is in use by {me}.*: .*; wait for it") as error:
            lock_folder(folder).__enter__()
        assert "\n" not in str(error.value)
    assert not folder_user(folder) and not list(folder.iterdir())
    with pytest.raises(KeyError), lock_folder(folder):
        raise KeyError
    with lock_folder(folder, "--output"), pytest.raises(ConfigError, match=r"^--output .* or choose another --output$"):
        lock_folder(folder, "--output").__enter__()


def test_a_killed_process_holds_nothing_though_its_workers_live(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        assert folder_user(tmp_path).startswith(f"process {holder.pid} on ")
        (tmp_path / "model_0000002.pth.1.tmp").touch()
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} "):
            lock_folder(tmp_path).__enter__()
        assert (tmp_path / "model_0000002.pth.1.tmp").exists()  # it may be writing it
        (tmp_path / "notes.tmp").touch()
        holder.kill()
        holder.wait()
        with lock_folder(tmp_path):
            os.kill(worker, 0)  # it is alive
            assert {path.name for path in tmp_path.iterdir()} == {"run.lock", "notes.tmp"}
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.communicate()


def test_a_filesystem_without_locks_is_a_warning(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "model_0000002.pth.1.tmp").touch()
    with lock_folder(tmp_path) as warning:
        assert warning.startswith(f"OUTPUT_DIR {tmp_path} cannot be locked (No locks available): ")
        assert not folder_user(tmp_path) and (tmp_path / "model_0000002.pth.1.tmp").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_is_seen_and_left_to_who_made_it_again(tmp_path, again):
    folder = tmp_path / "run"
    with lock_folder(folder):
        check_folder(folder)
        check_folder(tmp_path)  # nobody holds it
        shutil.rmtree(folder)
        if again:
            folder.mkdir()
            (folder / "run.lock").write_text("another")
        with pytest.raises(OutputError, match=f"^{folder} was removed, or its run.lock: this run stops"):
            check_folder(folder)
    assert folder.exists() is again and (not again or (folder / "run.lock").read_text() == "another")


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"run cannot be used: .*symbolic links; choose one that can be written to"):
        lock_folder(tmp_path / "run").__enter__()
    assert (tmp_path / "mine").read_text() == "kept"
