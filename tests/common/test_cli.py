"""Command lines: flags and settings in any order, and errors as one line."""

import logging
import sys

import pytest
import torch.distributed as dist

from d2distill.commands import train_cls, train_det
from d2distill.common.engine.cli import CommandParser, run_cli
from d2distill.common.engine.launch import _one_error
from d2distill.common.errors import ConfigError


def parse(*arguments):
    parser = CommandParser(prog="p")
    parser.add_argument("--config-file")
    parser.add_argument("--resume", action="store_true")
    parser.add_settings()
    return parser.parse_args(arguments)


def test_flags_may_follow_settings():
    args = parse("--config-file", "a", "SOLVER.X", "-1", "--resume", "B", "(1, -2)", "--debug")
    assert (args.config_file, args.resume, args.debug) == ("a", True, True)
    assert args.opts == ["SOLVER.X", "-1", "B", "(1, -2)"] and parse().opts == []


@pytest.mark.parametrize("flag", ["--config_file", "--config", "--config_file=b"])
def test_a_mistyped_flag_is_an_error(flag):
    with pytest.raises(ConfigError, match=rf"unknown argument {flag} \(did you mean --config-file"):
        parse("KEY", "VALUE", flag, "a")


@pytest.mark.parametrize(
    ("main", "example", "key"),
    [(train_cls, "cls/cifar100_r32x4_r8x4_dkd.yaml", "MODEL.STUDENT.WEIGHTS"),
     (train_det, "det/dkd_r101_r18.yaml --num-gpus 8", "MODEL.WEIGHTS")],
)  # fmt: skip
def test_help_is_of_the_task(command, main, example, key):
    code, printed, _ = command(main, "--help")
    assert code == 0 and f"--config-file {example}\n" in printed and f"--eval-only {key} " in printed
    flags = ("--resume", "--eval-only", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url", "--debug")
    assert all(f"  {flag}" in printed for flag in flags)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("SEED is -1"), 2, "error: SEED is -1\n"),
        (FileNotFoundError("no data at /data"), 2, "error: no data at /data\n"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "error: /data/x: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "error: a file cannot be written: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_command_ends_without_a_traceback(capfd, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_cli(main)
    assert (end.value.code, capfd.readouterr().err) == (code, line) and end.value.__suppress_context__
    assert logging.raiseExceptions


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), ConnectionError("of no file")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_cli(main)


def test_debug_shows_the_traceback(command):
    def main():
        raise ConfigError("SEED is -1")

    code, _, printed = command(lambda: run_cli(main), "--debug")
    assert code == 2 and printed.startswith("Traceback") and printed.endswith("\nerror: SEED is -1\n")


@pytest.mark.parametrize("rank", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_an_error_in_the_arguments_is_printed_once_per_node(command, monkeypatch, rank):
    monkeypatch.setenv(rank, "1")
    assert command(train_cls, "--resum") == (2, "", "")
    monkeypatch.setenv(rank, "0")
    assert "did you mean --resume" in command(train_cls, "--resum")[2]
    monkeypatch.setenv(rank, "x")
    assert "did you mean --resume" in command(train_cls, "--resum")[2]


@pytest.mark.slow
def test_a_user_error_is_printed_by_one_process_of_a_job(capsys):
    store = dist.HashStore()

    def end(error):
        with pytest.raises(SystemExit, match="2"), _one_error(store):
            raise error
        return capsys.readouterr().err

    with pytest.raises(RuntimeError, match="a fault of ours"), _one_error(store):
        raise RuntimeError("a fault of ours")
    assert end(ConfigError("SEED is -1")) == "error: SEED is -1\n"
    assert end(ConfigError("SEED is -1")) == ""
    assert end(RuntimeError("Connection closed by peer")) == ""
    assert sys.exc_info() == (None, None, None)
