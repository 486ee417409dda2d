"""What a training comes to does not depend on whether it is compiled: whole outer steps, of every algorithm."""

import copy

import pytest
import torch
import torch.nn.functional as F

import family
from compiling import two_blocks
from family import ALGORITHMS
from fomaml.engines.compiled.cache import too_old
from fomaml.learning.objectives import MultiStepLoss
from fomaml.tasks import one
from fomaml.train import train
from zoo import MODULES, example

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())
# the others are made of what these are made of
SHORT = {
    ("fomaml", "momentum"),
    ("fomaml", "adam"),
    ("maml", "adam"),
    ("reptile", "adam"),
    ("meta-sgd", "adam"),
}
OPTIMIZERS = {
    # eps as large: of a bias before a batch norm, whose gradient is rounding, Adam would magnify it
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def trained(learner, tasks, optimizer, **options):
    own = OPTIMIZERS[optimizer]([parameter for parameter in learner.parameters() if parameter.requires_grad])
    single = [one(tasks, index) for index in range(3)] * 2
    for _ in train(learner, single, own, iterations=3, meta_batch_size=2, **options):
        pass
    return {name: value.detach() for name, value in learner.state_dict().items()}


@pytest.mark.parametrize(
    ("algorithm", "optimizer"),
    [
        pytest.param(name, optimizer, marks=[pytest.mark.long] * ((name, optimizer) not in SHORT))
        for name, row in ALGORITHMS.items()
        if row.modules("conv4-strided")
        for optimizer in OPTIMIZERS
    ],
)
def test_a_compiled_training_is_the_uncompiled_one(algorithm, optimizer, monkeypatch):
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 7, 7), F.cross_entropy))
    monkeypatch.setattr(family, "STEPS", 2)
    model, tasks, criterion = example("conv4-strided")
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    if isinstance(learner.objective, MultiStepLoss):
        return  # is not compiled
    other = copy.deepcopy(learner)
    begun = {name: value.clone() for name, value in learner.state_dict().items()}
    found = trained(learner, tasks, optimizer, compile=True, clip=1.0)
    expected = trained(other, tasks, optimizer, engine="loop", clip=1.0)
    assert any(not torch.equal(begun[name], value) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=name)
