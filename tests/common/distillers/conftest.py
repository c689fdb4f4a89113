import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The tensors here are tiny: threads that wait for each other cost ten times the work on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
