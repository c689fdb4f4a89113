"""EMA of the student and gradient accumulation: hooks and seams of the trainer, on next to nothing."""

import pytest
import torch

from d2distill.common.engine.accumulation import accumulate
from d2distill.common.engine.writers import read_metrics
from tests.tiny_task import tiny_trainer


def weight_of(folder, name):
    return torch.load(folder / f"student_{name}.pth", weights_only=True)["model"]["weight"].item()


def falling(batch, weight):
    return {"loss": weight}  # 0.1 less with every step


def measured(network, interruptible):
    return {"top1": network.weight.item()}


def ema_trainer(folder):
    return tiny_trainer(folder, falling, evaluate=measured, ema_decay=0.5, eval_period=2, checkpoint_periods=[1])


def test_the_average_is_evaluated_and_saved_beside_the_live_student(tmp_path):
    """Weights 0.9, 0.8, 0.7, 0.6; torch's average starts as a copy of the first, then halves the distance."""
    results = ema_trainer(tmp_path).run()
    averages = [0.9]
    for weight in (0.8, 0.7, 0.6):
        averages.append((averages[-1] + weight) / 2)
    assert results["top1"] == pytest.approx(0.6) and results["ema_top1"] == pytest.approx(averages[-1])
    assert results["best_ema_top1"] == pytest.approx(averages[1])
    assert weight_of(tmp_path, "final") == pytest.approx(0.6)
    assert weight_of(tmp_path, "ema_final") == pytest.approx(averages[-1])
    # The best of each by its own metric: both fall.
    assert weight_of(tmp_path, "best") == pytest.approx(0.8)
    assert weight_of(tmp_path, "ema_best") == pytest.approx(averages[1])
    assert read_metrics(tmp_path)[-1]["ema_top1"] == pytest.approx(averages[-1])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_average_is_the_same_after_a_restart(tmp_path, step):
    ema_trainer(tmp_path / "whole").run()
    ema_trainer(tmp_path / "stopped").run()
    for path in (tmp_path / "stopped").glob("model_*.pth"):
        path.unlink()
    stopped = tiny_trainer(
        tmp_path / "stopped", falling, max_iter=step, evaluate=measured, ema_decay=0.5, eval_period=2,
        checkpoint_periods=[1],
    )  # fmt: skip
    stopped.run()
    ema_trainer(tmp_path / "stopped").run(resume=True)
    assert weight_of(tmp_path / "stopped", "ema_final") == weight_of(tmp_path / "whole", "ema_final")


def whole(batch, step):
    return [(batch, 2.0)]


def test_a_batch_in_parts():
    """Every sample once, in order; the weights are the parts' shares of what the whole counts."""
    batch = {"image": torch.arange(7.0), "label": torch.arange(7), "progress": "any"}
    parts = accumulate(whole, 3)(batch, 0)
    assert [part["image"].tolist() for part, _ in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [weight for _, weight in parts] == pytest.approx([6 / 7, 6 / 7, 2 / 7])
    assert all(part["progress"] == "any" and len(part["label"]) == len(part["image"]) for part, _ in parts)
    assert [part for part, _ in accumulate(whole, 3)(["a", "b", "c", "d"], 0)] == [["a", "b"], ["c", "d"]]
    assert len(accumulate(whole, 9)({"image": torch.zeros(2)}, 0)) == 2
    ((empty, weight),) = accumulate(whole, 3)({"image": torch.zeros(0)}, 0)
    assert len(empty["image"]) == 0 and weight == 2


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Without batch norms: a mean over samples does not see the parts."""
    samples = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(batch, weight):
        return {"loss": ((weight - batch["image"]) ** 2).mean()}

    ends = []
    for parts in (1, 3):
        trainer = tiny_trainer(
            tmp_path / str(parts), losses, max_iter=3, accumulate=parts,
            build_batches=lambda start: iter([{"image": samples}] * 3),
        )  # fmt: skip
        trainer.train(0, 3)
        ends.append(trainer.model.weight.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-6) and abs(ends[0] - 1) > 0.1
