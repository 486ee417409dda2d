import gc

import pytest
import torch
import torch._inductor

torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported is not garbage: to look through it took a quarter of the compiled tests' time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
