"""The fused form of torch's optimisers is taken where nothing speaks against it, and gives the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml
from fomaml.optimizers import fuse
from fomaml.train import measured_by_default

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def tasks():
    return fomaml.RegressionEpisodes(fomaml.data.synthetic.Sinusoids(), shots=3, query_shots=3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_steps_are_those_of_a_loop_by_hand(name):
    torch.manual_seed(0)
    learner = fomaml.FOMAML(fomaml.MLP(1, 8, 1).double(), 0.1, 2, F.mse_loss)
    own = fomaml.FOMAML(fomaml.MLP(1, 8, 1).double(), 0.1, 2, F.mse_loss)
    own.load_state_dict(learner.state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = OPTIMIZERS[name](learner.parameters())
        for _ in fomaml.train(learner, tasks(), optimizer, iterations=5, meta_batch_size=2):
            pass
        assert all(group["fused"] for group in optimizer.param_groups)
        by_hand = OPTIMIZERS[name](own.parameters())
        for number in range(5):
            fomaml.meta_gradient(own, tasks().batch(2 * number, 2)).apply_to(own)
            by_hand.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not any(group["fused"] for group in by_hand.param_groups)
    for found, expected in zip(learner.parameters(), own.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_not_fused():
    parameter = nn.Parameter(torch.ones(2))
    dense, sparse = torch.ones(2), torch.ones(2).to_sparse()
    complex_ = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    stepped = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(2)
    stepped.step()
    for optimizer, gradient in [
        (torch.optim.Adam([parameter], foreach=True), dense),
        (torch.optim.Adam([parameter], fused=False), dense),
        (torch.optim.Adam([parameter]), sparse),
        (torch.optim.Adam([parameter], lr=torch.tensor(0.1)), dense),
        (torch.optim.Adam([complex_]), dense),
        (torch.optim.RMSprop([parameter]), dense),
        (stepped, dense),
    ]:
        fuse(optimizer, [gradient])
        assert not optimizer.param_groups[0].get("fused"), optimizer


def test_how_often_a_training_is_measured_by_default():
    found = {number: measured_by_default(number) for number in (1, 4, 25, 100, 900, 1000, 60_000)}
    assert found == {1: 1, 4: 1, 25: 2, 100: 10, 900: 10, 1000: 10, 60_000: 600}
