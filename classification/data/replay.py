"""INPUT.REPLAY_EPOCHS: epochs that repeat the images of the first K, so that a teacher has to see K epochs only."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from d2distill.common.config import CfgNode
from d2distill.common.engine.seeding import seed_step

__all__ = ["Replay"]


@dataclass(frozen=True)
class Replay:
    """As of which epoch an epoch's images are made.

    Images are augmented as in epoch ``(epoch - 1) % epochs + 1``, from seed 0 and not SEED, so that the seeds of a
    sweep see the same K epochs of images; their order is drawn anew in each epoch, from SEED. A mixed image depends on
    the others of its batch: with mixup and cutmix the order and the mixing repeat as well, and all is drawn from SEED.

    Attributes:
        epochs: K; 0: every epoch is drawn anew.
        seed: SEED.
        mixes: images are mixed.
    """

    epochs: int = 0
    seed: int = 0
    mixes: bool = False

    @classmethod
    def of(cls, cfg: CfgNode) -> "Replay":
        return cls(cfg.INPUT.REPLAY_EPOCHS, cfg.SEED, bool(cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX))

    def epoch(self, epoch: int) -> int:
        """Which epoch is repeated, both counted from 1."""
        return (epoch - 1) % self.epochs + 1 if self.epochs else epoch

    def augmentation_seed(self, seed: int) -> int:
        return 0 if self.epochs and not self.mixes else seed

    def repeat(
        self,
        batch: dict[str, Tensor],
        step: int,
        epoch_length: int,
        weight: float,
        soften: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        """A step's batch, softened as in the step that it repeats, with the repeated epoch's number as ``key``.

        Args:
            weight: 0 where this process has only a sample of another's, which it would mix with itself.
        """
        epoch = self.epoch(step // epoch_length + 1)
        if soften is not None:
            seed_step(self.seed, (epoch - 1) * epoch_length + step % epoch_length)
            batch = soften(batch)
            seed_step(self.seed, step)
        key = -1 if self.mixes and weight == 0 else epoch - 1
        # On the CPU, as what the loader gives: it is looked up there.
        return {**batch, "key": torch.full((len(batch["index"]),), key)}
