"""A disk that is full or taken away ends a run with one line, and leaves the last checkpoint whole."""

import logging
import logging.config
import resource
import shutil

import pytest
import torch

from d2distill.common.engine.checkpoint import RunCheckpointer
from d2distill.common.engine.folder_lock import lock_folder
from d2distill.common.engine.run_folder import read_metrics, start_logs
from d2distill.common.errors import OutputError, writing
from tests.tiny_task import tiny_trainer


def run_until(folder, happens, saves=100):
    """A run to which something happens in its third step, and which logs after every second."""
    steps = []

    def losses(batch, weight):
        steps.append(batch)
        if batch == 2:
            happens()
        return {"loss": weight * batch}

    try:
        tiny_trainer(folder, losses, 100, loggers=("tensorboard", "csv"), checkpoint_periods=[saves]).run()
    finally:
        assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(("remade", "saves"), [(False, 100), (True, 100), (True, 2)])
def test_a_training_whose_folder_is_gone_stops_and_does_not_make_it_again(tmp_path, remade, saves):
    folder = tmp_path / "run"

    def remove():
        shutil.rmtree(folder)
        if remade:
            folder.mkdir()

    with lock_folder(folder), pytest.raises(OutputError, match=f"{folder} was removed, or its run.lock"):
        run_until(folder, remove, saves)
    assert folder.exists() is remade and not list(folder.glob("*"))


@pytest.mark.parametrize("name", ["events.*", "metrics.csv"])
def test_a_log_on_a_full_disk_is_one_line_at_once(tmp_path, name, capfd):
    def fill():
        (file,) = tmp_path.glob(name)
        file.unlink()
        file.symlink_to("/dev/full")

    with pytest.raises(OutputError, match=f"the run's log in {tmp_path} cannot be written: No space left") as error:
        run_until(tmp_path, fill, saves=2)
    assert "\n" not in str(error.value) and not capfd.readouterr().err
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 3]
    assert tiny_trainer(tmp_path, max_iter=100, loggers=("tensorboard", "csv")).resume() == 4


def test_closing_a_log_on_a_full_disk_hides_no_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.json").stat().st_size + 5, limits[1]))

    try:
        with pytest.raises(OutputError, match=f"the run's log in {tmp_path} cannot be written: File too large"):
            run_until(tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OutputError, match=f"the run's log in {tmp_path} cannot be written: Is a directory"):
        tiny_trainer(tmp_path).run()


def test_an_error_of_a_file_has_no_traceback_in_the_log(tmp_path, caplog):
    def evaluate(network, interruptible):
        raise FileNotFoundError(2, "No such file or directory", "7.jpg")

    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(FileNotFoundError):
            tiny_trainer(tmp_path, evaluate=evaluate).run()
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.exc_info]


def test_an_old_checkpoint_that_cannot_be_removed_is_one_line_and_the_last_is_whole(tmp_path):
    checkpointer = RunCheckpointer(torch.nn.Linear(2, 2), str(tmp_path), keep=1)
    (tmp_path / "model_0000001.pth").mkdir()
    with pytest.raises(OutputError, match=r"model_0000001\.pth cannot be removed: Is a directory"):
        checkpointer.save("model_0000002", settings={}, run_identity={})
    assert checkpointer.latest()[0].name == "model_0000002.pth"


def test_torch_hides_what_the_disk_said(tmp_path):
    no_room = pytest.raises(
        OutputError, match=r"^inference cannot be written: No space left on device; check free space"
    )
    with no_room, writing("inference"), open("/dev/full", "wb") as file:
        torch.save(torch.zeros(10**5), file)
    with pytest.raises(RuntimeError, match=r"^of a network$"), writing("inference"):
        raise RuntimeError("of a network")


def test_a_log_in_a_folder_that_was_made_again(tmp_path):
    """Two runs of one process; Detectron2 would keep writing to the file that was removed."""
    folder = tmp_path / "run"
    for text in ("first", "second"):
        folder.mkdir()
        start_logs(str(folder))
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})  # as some libraries do
        logging.getLogger("detectron2.d2distill").warning(text)
        assert text in (folder / "log.txt").read_text()
        shutil.rmtree(folder)
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
        logging.getLogger("detectron2.d2distill").warning("nowhere")
    start_logs(None)
