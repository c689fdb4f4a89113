"""Whatever is in a name: no terminal obeys it, no line of a log is forged by it, and none is lost."""

import logging
import os

import pytest

from d2distill.common.engine.cli import run_cli
from d2distill.common.engine.run_folder import start_logs, write_text
from d2distill.common.errors import DataError
from d2distill.common.text import printable

NAME = "a\n\x1b[2J\x9b\u2028\u202e" + os.fsdecode(b"\xff") + "é 猫"
SHOWN = r"a\n\x1b[2J\x9b\u2028\u202e\udcff" + "é 猫"


def test_escapes():
    assert printable(NAME) == printable(SHOWN) == SHOWN
    assert printable(f"{NAME}\t|", lines=True) == SHOWN.replace(r"\n", "\n") + "\t|"


@pytest.fixture
def loggers():
    known = [logging.getLogger(name) for name in ("fvcore", "detectron2")]
    before = [list(logger.handlers) for logger in known]
    yield
    for logger, handlers in zip(known, before, strict=True):
        logger.handlers[:] = handlers


def test_a_log(tmp_path, loggers, capsys):
    start_logs(str(tmp_path))
    logging.getLogger("detectron2.d2distill").error(DataError(f"cannot read {NAME}"))
    logging.getLogger("detectron2.d2distill").info("100%% of %s", NAME)
    # Detectron2's tables are of several lines, and it colors them on a terminal.
    logging.getLogger("detectron2.data.build").info(f"Categories:\n\x1b[36m| {NAME} |\x1b[0m")
    try:
        raise ValueError(NAME)
    except ValueError:
        logging.getLogger("detectron2.engine.train_loop").exception("Exception during training:")
    table = "Categories:\n| " + SHOWN.replace(r"\n", "\n") + " |\n"
    for text in ((tmp_path / "log.txt").read_text(), capsys.readouterr().out):
        assert f"cannot read {SHOWN}\n" in text and f"100% of {SHOWN}\n" in text and table in text
        assert "\nValueError: " + SHOWN.replace(r"\n", "\n") in text


def test_an_error_of_a_command_is_one_line(command):
    def main():
        raise DataError(f"cannot read {NAME}")

    assert command(lambda: run_cli(main)) == (2, "", f"error: cannot read {SHOWN}\n")


def test_a_text_file_takes_any_name(tmp_path):
    write_text(tmp_path / "names.txt", NAME)
    assert (tmp_path / "names.txt").read_text() == NAME.replace("\udcff", r"\udcff")
