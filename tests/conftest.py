import json
from pathlib import Path

import pytest
import torch

GOLDENS = Path(__file__).parent / "goldens"

# Last digits depend on the number of threads: the same everywhere.
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def loss_goldens():
    """Loss and gradient norms of the reference code (tests/goldens/losses.json)."""
    return json.loads((GOLDENS / "losses.json").read_text())
