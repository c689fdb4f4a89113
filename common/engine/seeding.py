"""Random numbers of a step."""

import random

import numpy as np
import torch
from detectron2.utils import comm


def seed_step(seed: int, step: int, rank: int | None = None) -> None:
    """Seed Python, numpy and torch by (seed, step, rank); without a rank, by this process's.

    Done before every step, it makes dropout and the like the same after a restart as without one, whatever evaluation,
    hooks or workers drew in between, and leaves no generator state to save. The three streams are independent; torch's
    generator on CPUs takes 32 bits of its seed, the others all.
    """
    rank = comm.get_rank() if rank is None else rank
    words = np.random.SeedSequence([seed, step, rank], spawn_key=(1,)).generate_state(8)
    _seed_torch(int(words[1]) << 32 | int(words[0]))
    np.random.seed(words[2:6])
    random.seed(int(words[6]) << 32 | int(words[7]))


def _seed_torch(seed: int) -> None:
    if torch.backends.mps.is_available() or torch.xpu.is_available():
        torch.manual_seed(seed)
        return
    # What that does here, but for the 0.3 ms in which it formats the stack for devices that are not there.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    elif torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
