"""compile=True where random numbers are drawn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import dropped, graph, untouched
from family import LR, assert_agrees
from fomaml.engines import meta_gradient
from fomaml.learning.algorithms import FOMAML
from zoo import draw


@pytest.mark.parametrize("convolutions", [True, False])
def test_dropout_draws_other_masks_at_each_call_and_for_each_task(convolutions, monkeypatch):
    untouched(monkeypatch)
    model = dropped(convolutions)
    tasks = draw((2, 8, 8) if convolutions else (36,), F.cross_entropy, tasks=1)
    tasks = tasks.map(lambda tensor: tensor.expand(4, *tensor.shape[1:]))  # four times the same
    learner = FOMAML(model, LR, 1)
    engine = "loop" if convolutions else "batched"
    before = torch.get_rng_state()
    first = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert len(first.query_losses.unique()) == 4
    assert len(first.support_losses.unique()) == 4
    second = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert not first.query_losses.eq(second.query_losses).any()
    torch.set_rng_state(before)
    again = meta_gradient(learner, tasks, engine=engine, compile=True)
    assert torch.equal(first.query_losses, again.query_losses)  # tracing drew nothing
    assert all(torch.equal(first.gradients[n], again.gradients[n]) for n in first.gradients)
    torch.set_rng_state(before)
    assert_agrees(first, meta_gradient(learner, tasks, engine=engine), 1e-10)  # the very same masks
    zeros = [meta_gradient(learner, tasks, engine=engine, compile=True).query_outputs for _ in range(50)]
    expected = torch.stack([meta_gradient(learner, tasks, engine=engine).query_outputs for _ in range(50)])
    assert (torch.stack(zeros).mean((0, 1)) - expected.mean((0, 1))).abs().max() < expected.std((0, 1)).max()


class Noisy(nn.Module):
    """Noise on the inputs, which otherwise are the same at each inner step: `draw` is what makes it."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.layer = draw, nn.Linear(6, 4)

    def forward(self, inputs):
        return self.layer(inputs + self.draw(inputs))


@torch.library.custom_op("test_compiled::noise", mutates_args=())
def noise(like: torch.Tensor) -> torch.Tensor:
    """Without the tag that says so."""
    return torch.randn_like(like)


noise.register_fake(torch.empty_like)
noise.register_vmap(lambda info, axes, like: (torch.ops.test_compiled.noise(like), axes[0]))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("draw_noise", [torch.randn_like, torch.ops.test_compiled.noise])
def test_factors_see_noise_on_the_inputs(draw_noise, compile, monkeypatch):
    untouched(monkeypatch)
    learner, tasks = FOMAML(Noisy(draw_noise).double(), LR, 3), draw((6,), F.cross_entropy)

    def run(engine):
        meta_gradient(learner, tasks, engine=engine, compile=compile)  # compiled, then drawn for
        torch.manual_seed(5)
        return meta_gradient(learner, tasks, engine=engine, compile=compile)

    assert_agrees(run("factored"), run("batched"), 1e-10)


@pytest.mark.parametrize("noisy", [False, True])
def test_factors_of_the_same_inputs_are_kept_once(noisy, monkeypatch):
    untouched(monkeypatch)
    layer = nn.Linear(64, 32)
    if noisy:
        layer = nn.Sequential(nn.Dropout(0.5), layer)
    learner = FOMAML(layer.double(), LR, 3)
    meta_gradient(learner, draw((64,), F.cross_entropy), engine="factored", compile=True)
    joined = [node for node in graph(learner).nodes if node.target is torch.ops.aten.cat.default]
    assert bool(joined) is noisy


@pytest.mark.parametrize("convolutions", [True, False])
def test_random_numbers_are_drawn_in_the_order_of_the_tasks(convolutions):
    tasks = draw((2, 8, 8) if convolutions else (36,), F.cross_entropy, tasks=4)
    learner = FOMAML(dropped(convolutions), LR, 1)
    torch.manual_seed(0)
    expected = meta_gradient(learner, tasks, engine="loop", compile=True)
    torch.set_num_threads(2)
    try:
        for _ in range(3):
            torch.manual_seed(0)
            assert_agrees(meta_gradient(learner, tasks, engine="loop", compile=True), expected, 1e-10)
    finally:
        torch.set_num_threads(1)
