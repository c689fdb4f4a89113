"""Where a run is logged: spreadsheets, services that may fail, the terminal."""

import csv
import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage

from d2distill.common.engine.run_folder import read_metrics, start_logs
from tests.tiny_task import tiny_trainer


class StopHook(HookBase):
    def __init__(self, done):
        self._done = done

    def after_step(self):
        if self.trainer.iter + 1 == self._done:
            raise SystemExit


def stopped_and_resumed(folder, done=4, **options):
    """6 steps with a checkpoint after the second, ended after `done` and resumed."""
    options = {"max_iter": 6, "checkpoint_periods": [2], "eval_period": 3, **options}
    with pytest.raises(SystemExit):
        trainer = tiny_trainer(folder, **options)
        trainer.checkpointing._periods = [2] if done < 4 else [4]
        trainer.register_hooks([StopHook(done)])
        trainer.run()
    tiny_trainer(folder, **options).run(resume=True)


def test_csv_has_each_line_of_the_log_once(tmp_path):
    """Also of steps that a resumed run repeats, and with columns that the first line has not."""
    stopped_and_resumed(tmp_path, done=3, loggers=["csv"])
    lines = read_metrics(tmp_path)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 5] and "top1" not in rows[0] and "top1" in rows[1]
    assert rows == lines


class Services(SimpleNamespace):
    """Stand-ins of wandb and mlflow that keep what they are given; `fail` raises in the call of that name."""

    def __init__(self, monkeypatch, fail=""):
        super().__init__(runs=[], logged=[], ended=0, fail=fail, params={})
        wandb = SimpleNamespace(init=self.init)
        mlflow = SimpleNamespace(
            start_run=lambda run_id, run_name: self.init(id=run_id or "new", name=run_name),
            log_params=self.params.update,
            log_metrics=self.log,
            end_run=self.finish,
            MlflowClient=lambda: SimpleNamespace(get_metric_history=lambda run_id, name: self.history()),
        )
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        monkeypatch.setitem(sys.modules, "mlflow", mlflow)

    def init(self, **options):
        self._maybe_fail("init")
        self.runs.append(options)
        return self

    @property
    def info(self):
        return SimpleNamespace(run_id=self.runs[-1]["id"])

    @property
    def step(self):
        return self.logged[-1][0] + 1 if self.logged else 0

    def history(self):
        return [SimpleNamespace(step=step) for step, _ in self.logged]

    def log(self, scalars, step):
        self._maybe_fail("log")
        self.logged.append((step, scalars))

    def finish(self):
        self._maybe_fail("finish")
        self.ended += 1

    def _maybe_fail(self, call):
        if self.fail == call:
            raise ConnectionError("no network")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_continues_the_same_run_of_a_service(tmp_path, monkeypatch, name):
    services = Services(monkeypatch)
    # Ended before its checkpoint was written: the line of step 3 is written twice.
    stopped_and_resumed(tmp_path / "my_run", done=3, loggers=[name])
    first, second = services.runs
    assert first["id"] == second["id"] and first["name"] == "my_run" and services.ended == 2
    if name == "wandb":
        assert second["resume"] == "allow" and first["config"]["SOLVER.CHECKPOINT_KEEP"] == 2
    else:
        assert services.params["SOLVER.CHECKPOINT_KEEP"] == 2
    lines = read_metrics(tmp_path / "my_run")
    assert [step for step, _ in services.logged] == [line["iteration"] for line in lines] == [1, 2, 3, 5]
    assert [scalars["loss"] for _, scalars in services.logged] == [line["loss"] for line in lines]
    # Another run in that folder from the beginning is another run of the service.
    for path in (tmp_path / "my_run").glob("*.pth"):
        path.unlink()
    services.logged.clear()
    tiny_trainer(tmp_path / "my_run", loggers=[name]).run()
    assert name == "mlflow" or services.runs[-1]["id"] != first["id"]
    assert [step for step, _ in services.logged] == [1, 3]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("fail", ["import", "init", "log", "finish"])
def test_a_service_that_fails_is_one_warning(tmp_path, monkeypatch, log, name, fail):
    services = Services(monkeypatch, fail)
    if fail == "import":
        monkeypatch.setitem(sys.modules, name, None)
    trainer = tiny_trainer(tmp_path, loggers=[name, "csv"])
    trainer.run()
    ours = [record for record in log.records if record.name == "detectron2.d2distill"]
    warnings = [record.getMessage() for record in ours if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and f"LOGGERS {name} is switched off" in warnings[0]
    assert ("pip install 'd2distill[" + name in warnings[0]) == (fail == "import")
    assert fail == "import" or "no network" in warnings[0]
    assert len(services.logged) == (2 if fail == "finish" else 0)
    assert len(read_metrics(tmp_path)) == 2 and (tmp_path / "metrics.csv").exists()


def test_no_logger_keeps_pictures_that_none_writes(tmp_path):
    def losses(batch, weight):
        get_event_storage().put_image("picture", torch.zeros(3, 2, 2))
        return {"loss": weight * batch}

    trainer = tiny_trainer(tmp_path, losses)
    trainer.run()
    assert not trainer.storage._vis_data and not list(tmp_path.glob("events*"))


def test_speed_and_epoch_are_logged(tmp_path):
    """And a line of the log names them."""
    start_logs(str(tmp_path))
    trainer = tiny_trainer(tmp_path, max_iter=8, epoch_length=4, images_per_step=24.0)
    trainer.run()
    assert trainer.storage.history("images_per_second").latest() == 24 / trainer.storage.history("time").avg(20)
    last = read_metrics(tmp_path)[-1]
    assert last["epoch"] == 2 and last["eta_seconds"] == 0 and last["images_per_second"] > 0
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if " iter: " in line]
    assert re.search(r" epoch: 0.5/2  iter: 1  total_loss: 0.5  loss: 0.5  data_time: \S+  lr: 0.1$", lines[0])
    assert re.search(r" eta: 0:00:00  epoch: 2/2  iter: 7  .* images/s: \d", lines[-1])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_one_line_of_progress_in_the_place_of_log_lines(tmp_path, monkeypatch):
    terminal, output = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", output)
    start_logs(str(tmp_path))
    before = logging.getLogger("detectron2").handlers[:]
    tiny_trainer(tmp_path, max_iter=8, epoch_length=4, images_per_step=24.0).run()
    assert logging.getLogger("detectron2").handlers == before
    last = terminal.getvalue().rstrip().splitlines()[-1].split("\r")[-1]
    assert re.search(r"epoch 2/2: 100%.* 8/8 .*images/s=\d+, total_loss=\S+, loss=\S+", last)
    # Losses are in the file alone; all other lines are on both.
    file = (tmp_path / "log.txt").read_text()
    assert "iter: 7" in file and "iter: 7" not in output.getvalue() + terminal.getvalue()
    assert "Evaluation after 8 steps" in file and "Evaluation after 8 steps" in output.getvalue()


def test_short_evaluations_are_one_line(tmp_path):
    start_logs(str(tmp_path))
    logger = logging.getLogger("detectron2.evaluation.evaluator")
    for text in ("Start inference on 2 batches", "Total inference time: 0:00:01", "Inference done 11/99. ETA=0:09:00"):
        logger.info(text)
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("Inference done 11/99. ETA=0:09:00")


def test_metrics_of_a_step_are_means_over_its_parts(tmp_path):
    """0.25 * 4 + 0.75 * 8."""
    current = []

    def losses(batch, weight):
        current[:] = [torch.tensor(float(batch))]
        return {"loss": weight * 0}

    parts = {"split_batch": lambda batch, step: [(4.0, 0.25), (8.0, 0.75)]}
    tiny_trainer(tmp_path, losses, max_iter=2, step_metrics=lambda: {"train_top1": current[0]}, **parts).run()
    assert read_metrics(tmp_path)[-1]["train_top1"] == 7
