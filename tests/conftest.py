import gc
import os
from pathlib import Path

import pytest
import torch
import torch._inductor

from fomaml.engines.compiled.cache import too_old

torch.set_num_threads(1)
# What a test has compiled is not found by another, which may have replaced the compiler.
os.environ["FOMAML_KEEP_COMPILED"] = "0"
# Where an assertion of a shared module fails, its values are shown, as in a test file.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.glob("*.py")))


def pytest_collection_finish():
    """What is imported is not garbage: to look through it took a quarter of the compiled tests' time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """On a torch that is too old to compile, a test that gets to hear so is skipped, and none else."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        if not too_old() or too_old() not in str(error):
            raise
        pytest.skip(too_old())
