"""The parts that a run is made of, each by itself: hooks, means, preemption, writers, files."""

import math
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, get_event_storage

from d2distill.common.engine import writers
from d2distill.common.engine.checkpoint import RunCheckpointer, save_student
from d2distill.common.engine.hooks import CheckpointHook, EvaluationHook, WriterHook
from d2distill.common.engine.metrics import MeanMetrics
from d2distill.common.engine.preemption import InterruptibleLoader, Preemption
from d2distill.common.engine.seeding import seed_step
from d2distill.common.engine.writers import read_metrics
from tests.tiny_task import tiny_trainer

NAN = float("nan")


def after_each_step(hook, max_iter, **trainer):
    """Let `hook` see every step of a training that does nothing."""
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(max_iter=max_iter, storage=storage, **trainer)
        for hook.trainer.iter in range(max_iter):
            hook.after_step()


def test_evaluations_are_periodic_and_last():
    steps = []
    hook = EvaluationHook(
        lambda: {"top1": steps.append(hook.trainer.iter + 1) or 0.0}, 4, {"best": "top1"}, lambda name: None
    )
    after_each_step(hook, 10)
    assert steps == [4, 8, 10]


@pytest.mark.parametrize(
    ("values", "best", "taken"),
    [
        ([1.0, 3.0, 2.0], 3.0, [1.0, 3.0]),
        ([2.0, 2.0, 2.0], 2.0, [2.0]),  # the first of equals
        ([NAN, 0.0, NAN], 0.0, [0.0]),  # a metric that is not defined on the data loses against any number
    ],
)
def test_the_best_is_above_all_before(values, best, taken):
    given, kept = iter(values), []
    hook = EvaluationHook(
        lambda: {"top1": next(given)}, 1, {"best": "top1"}, lambda name: kept.append(hook.last["top1"])
    )
    after_each_step(hook, 3)
    assert hook.best == {"top1": best} and kept == taken
    last = hook.summary()["top1"]
    assert last == values[-1] or (math.isnan(last) and math.isnan(values[-1]))


def test_a_checkpoint_at_multiples_and_after_the_last_step():
    names = []
    checkpointer = SimpleNamespace(save=lambda name, **facts: names.append((name, facts)))
    hook = CheckpointHook(checkpointer, [4, 6], Preemption(), {"SEED": 3})
    after_each_step(
        hook, 9, **dict.fromkeys(("gather_finite_means", "collect_state", "assert_state_finite"), lambda: None)
    )
    assert names == [(f"model_000000{step}", {"SEED": 3}) for step in (4, 6, 8, 9)]


@pytest.mark.parametrize(("epoch_length", "expected"), [(3, [3, 4, 6, 8, 9, 10]), (0, [4, 8, 10])])
def test_a_line_at_multiples_at_ends_of_epochs_and_after_the_last_step(epoch_length, expected):
    lines = []

    def write():
        epoch = hook.trainer.storage.latest().get("epoch", (None,))[0]
        lines.append((hook.trainer.iter + 1, epoch))

    hook = WriterHook("", [4], epoch_length)
    hook._writers = [SimpleNamespace(write=write)]
    after_each_step(hook, 10, log_metrics=lambda: None)
    assert lines == [(step, step / epoch_length if epoch_length else None) for step in expected]


def test_means_keep_their_digits_and_count_for_themselves():
    metrics = MeanMetrics()
    value = torch.tensor(2.0**24, requires_grad=True)
    for _ in range(2):
        metrics.update({"always": value})
        value = torch.tensor(1.0)
    metrics.update({"once": 5.0})
    assert metrics.compute() == {"always": (2**24 + 1) / 2, "once": 5.0}
    assert not any(total.requires_grad for total in metrics.state_dict()["sums"].values())


def test_an_evaluation_stops_at_the_next_batch():
    preemption, seen = Preemption(), []
    with pytest.raises(SystemExit, match="143"):
        for batch in InterruptibleLoader(range(5), preemption):
            seen.append(batch)
            preemption.requested = signal.SIGTERM * (batch == 1)
    assert seen == [0, 1]
    assert list(InterruptibleLoader(range(3), Preemption())) == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_given_back(monkeypatch, number):
    before, preemption = signal.getsignal(number), Preemption()
    preemption.install()
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGINT)
    assert preemption.requested_on_any_rank() == number  # the first
    preemption.remove()
    assert signal.getsignal(number) is before
    # Of a command in the background, the shell has Ctrl-C ignored.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    preemption.install()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    preemption.remove()


@pytest.mark.parametrize("moment", ["step", "evaluation", "end"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_has_saved(tmp_path, log, number, moment):
    def at(now):
        if now == moment:
            for sent in (number, signal.SIGINT, signal.SIGINT):  # one who presses it again and again
                signal.raise_signal(sent)

    def losses(batch, weight):
        if batch == 1:
            at("step")
        return {"loss": weight * batch}

    def evaluate(network, interruptible):
        at("evaluation")
        list(interruptible([1]))
        at("end")
        return {"top1": 0.0}

    with pytest.raises(SystemExit) as end:
        tiny_trainer(tmp_path, losses, evaluate=evaluate).run()
    steps = 2 if moment == "step" else 4
    assert end.value.code == 128 + number and (tmp_path / f"model_{steps:07d}.pth").exists()
    said = {"step": "saved after step 2", "evaluation": "stopped in an evaluation", "end": "all steps are saved"}
    lines = [line for line in log.messages if line.startswith(f"{signal.Signals(number).name}: ")]
    assert len(lines) == 1 and said[moment] in lines[0] and "--resume" in lines[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("write", ["model_0000001.pth", "student_best.pth"])
def test_a_save_that_fails_leaves_the_file_before_it(tmp_path, monkeypatch, write):
    network = torch.nn.Linear(2, 2)

    def save():
        if write.startswith("student"):
            save_student(tmp_path / write, network.state_dict())
        else:
            RunCheckpointer(network, str(tmp_path)).save("model_0000001")

    def fail(content, file):
        if isinstance(file, str | Path):
            Path(file).write_bytes(b"half")
        raise OSError("disk full")

    save()
    before = (tmp_path / write).read_bytes()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save()
    assert (tmp_path / write).read_bytes() == before


def test_a_log_keeps_what_was_done_before_the_step_that_is_done_again(tmp_path):
    path = tmp_path / writers.METRICS
    path.write_text("".join(f'{{"iteration": {step}}}\n' for step in range(4)) + '{"iterat')
    assert [line["iteration"] for line in writers.read_metrics(tmp_path)] == [0, 1, 2, 3]
    writers.drop_lines_from(path, 2)
    assert path.read_text() == '{"iteration": 0}\n{"iteration": 1}\n'


def test_no_loss_is_the_best():
    hook = EvaluationHook(lambda: {"top1": 1.0, "test_loss": 2.0}, 1, {"best": "top1"}, lambda name: None)
    after_each_step(hook, 1)
    assert hook.summary() == {"top1": 1.0, "test_loss": 2.0, "best_top1": 1.0}


@pytest.mark.parametrize("start", [0, 7])
def test_tensorboard_forgets_the_steps_that_are_done_again(tmp_path, monkeypatch, start):
    given = []
    monkeypatch.setattr(writers, "JSONWriter", lambda path: None)
    monkeypatch.setattr(writers, "TensorBoardWriter", lambda folder, **options: given.append(options))
    writers.build_writers(str(tmp_path), start, 10)
    # The line of the last step that is done is written anew.
    assert given == [{"purge_step": 6 if start else None}]


def drawn(folder, start, seed=0):
    """What four steps draw from `start` on, in the losses."""
    draws = []

    def losses(batch, weight):
        # On CPUs, where TorchScript must compute a function's first call as it does the others.
        assert not torch._C._get_graph_executor_optimize()
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
        return {"loss": weight}

    trainer = tiny_trainer(folder, losses, seed=seed)
    trainer.hooks_after_checkpoint = []  # of the step before, which was not made here
    trainer.train(start, 4)
    return draws


def test_what_a_step_draws_depends_on_seed_and_step_alone(tmp_path):
    whole = drawn(tmp_path, 0)
    assert drawn(tmp_path, 2) == whole[2:] and drawn(tmp_path, 0, seed=1) != whole
    assert len({value for draws in whole for value in draws}) == 12


def test_the_generators_of_a_step_draw_different_numbers():
    """numpy and torch are both Mersenne twisters: of the same seed they would draw the same words."""
    seed_step(3, 5)
    of_torch = torch.randint(0, 2**32, (64,)).tolist()
    of_numpy = np.random.randint(0, 2**32, 64, dtype=np.uint32).tolist()
    of_python = [random.getrandbits(32) for _ in range(64)]
    assert not set(of_torch) & set(of_numpy) and not set(of_numpy) & set(of_python)


def test_a_step_adds_up_its_parts(tmp_path):
    """0.1 * (0.25 * 4 + 0.75 * 8) from 1; the loss that is logged is that of the whole batch."""
    trainer = tiny_trainer(tmp_path, max_iter=1, split_batch=lambda batch, step: [(4.0, 0.25), (8.0, 0.75)])
    trainer.train(0, 1)
    assert trainer.model.weight.item() == pytest.approx(1 - 0.1 * 7)
    assert read_metrics(tmp_path)[0]["loss"] == 7 and read_metrics(tmp_path)[0]["total_loss"] == 7


def test_what_a_network_notes_is_logged_as_its_mean_since_the_last_line(tmp_path):
    """Of a resumed run too, whatever a part of it did."""

    def losses(batch, weight):
        get_event_storage().put_scalar("noted", batch)
        return {"loss": 0 * weight + batch}

    def lines(folder):
        return [(line["loss"], line["noted"]) for line in read_metrics(folder)]

    tiny_trainer(tmp_path / "whole", losses, max_iter=6).run()
    assert lines(tmp_path / "whole") == [(0.5, 0.5), (2.5, 2.5), (4.5, 4.5)]
    # Stopped after 3 steps, in the middle of a line.
    stopped = tiny_trainer(tmp_path / "stopped", losses, max_iter=6, checkpoint_periods=[3])
    with pytest.raises(SystemExit):
        stopped.register_hooks([CallHook(lambda trainer: trainer.iter == 3 and sys.exit())])
        stopped.run()
    tiny_trainer(tmp_path / "stopped", losses, max_iter=6, checkpoint_periods=[3]).run(resume=True)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


class CallHook(HookBase):
    def __init__(self, after_step):
        self._after_step = after_step

    def after_step(self):
        self._after_step(self.trainer)
