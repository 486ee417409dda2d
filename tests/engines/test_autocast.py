"""Meta-gradients in lower precision."""

import pytest
import torch
import torch.nn.functional as F

from compiling import assert_close, two_blocks, unchanged, untouched
from fomaml.engines import meta_gradient
from fomaml.learning.algorithms import FOMAML, MAML
from zoo import MODULES, example


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("module", "execution"),
    [
        ("mlp", "loop"),
        ("mlp", "batched"),
        ("mlp", "factored"),
        ("conv4-strided", "loop"),
        ("batch-norm", "loop"),
    ],
)
@pytest.mark.parametrize("preset", [FOMAML, MAML])
def test_autocast_is_near_float32_and_gives_float32(preset, module, execution, compile, monkeypatch):
    untouched(monkeypatch)
    if (preset, execution) == (MAML, "factored"):
        return
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 9, 9), F.cross_entropy))
    model, tasks, criterion = example(module)
    tasks = tasks.to(dtype=torch.float32)
    learner = preset(model.float(), 0.05, 2, criterion)
    expected = meta_gradient(learner, tasks, engine=execution)
    check = unchanged(model)
    found = meta_gradient(learner, tasks, engine=execution, compile=compile, autocast=torch.bfloat16)
    check()
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    assert_close(found, expected, 0.1)
    assert (found.query_losses - expected.query_losses).abs().max() <= 0.05
    assert any((found.gradients[n] != expected.gradients[n]).any() for n in expected.gradients)
    assert not torch.is_autocast_enabled("cpu")
    again = meta_gradient(learner, tasks, engine=execution, compile=compile)  # the two are not confused
    assert_close(again, expected, 1e-5)
