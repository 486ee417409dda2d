"""How numbers lie in memory changes nothing: fused optimisers take them as they lie."""

import copy

import pytest
import torch
from torch import nn

import fomaml
from convolutions import block, headed
from fomaml.checkpoint import load_state, save_state
from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.layout import has_gaps, laid
from fomaml.tasks import one

OPTIMIZERS = {
    "sgd": lambda p, **kind: torch.optim.SGD(p, lr=0.1, **kind),
    "momentum": lambda p, **kind: torch.optim.SGD(p, lr=0.1, momentum=0.9, **kind),
    "adam": lambda p, **kind: torch.optim.Adam(p, lr=0.01, **kind),
    "adamw": lambda p, **kind: torch.optim.AdamW(p, lr=0.01, **kind),
}


def backwards(model):
    """The numbers of each parameter in the reverse order of its dimensions."""
    for parameter in model.parameters():
        order = range(parameter.dim())[::-1]
        parameter.data = parameter.data.permute(*order).contiguous().permute(*order)
    return model


LAYOUTS = {
    "contiguous": lambda model: model,
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "backwards": backwards,
}


def convolutional():
    """No biases before the batch norms, whose gradients are nothing but rounding."""
    torch.manual_seed(0)
    return headed(
        6, *block(2, 5, nn.ReLU(), bias=False), *block(5, 6, nn.ReLU(), bias=False), nn.AdaptiveAvgPool2d(1)
    )


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(98, 6), nn.ReLU(), nn.Linear(6, 4))


def learner_of(model):
    return fomaml.FOMAML(model, 0.05, 2)


def batches(number):
    drawn = torch.Generator().manual_seed(0)
    for _ in range(number):
        inputs = torch.randn(2, 3, 12, 2, 7, 7, generator=drawn)
        targets = torch.arange(4).repeat(3, 3)
        yield fomaml.Task(*(fomaml.Examples(own, targets) for own in inputs))


def trained(learner, optimizer, number=6, compile=False):
    tasks = [one(batch, index) for batch in batches(number) for index in range(3)]
    for _ in fomaml.train(learner, tasks, optimizer, iterations=number, meta_batch_size=3, compile=compile):
        pass
    return learner.meta_parameters()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("network", "compile"), [(convolutional, False), (convolutional, True), (dense, True)]
)
def test_gradients_lie_as_their_parameters_do(layout, network, compile):
    learner = learner_of(LAYOUTS[layout](network()))
    [tasks] = batches(1)
    found = meta_gradient(learner, tasks, compile=compile).gradients
    for name, parameter in learner.meta_parameters().items():
        assert found[name].stride() == parameter.stride(), name


@pytest.mark.parametrize(
    ("compile", "layout"), [(False, "channels last"), (False, "backwards"), (True, "contiguous")]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_training_is_that_of_a_loop_by_hand(compile, layout, optimizer):
    model = LAYOUTS[layout](convolutional())
    by_hand = learner_of(copy.deepcopy(model).to(memory_format=torch.contiguous_format))
    stepper = OPTIMIZERS[optimizer](by_hand.parameters(), foreach=False)
    for tasks in batches(6):
        meta_gradient(by_hand, tasks, engine="loop").apply_to(by_hand)
        stepper.step()
    learner = learner_of(model)
    own = OPTIMIZERS[optimizer](learner.parameters())
    found = trained(learner, own, compile=compile)
    assert all(group["fused"] for group in own.param_groups)
    for name, expected in by_hand.meta_parameters().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_that_was_read_goes_on_as_it_was(layout, tmp_path):
    learner = learner_of(LAYOUTS[layout](convolutional()))
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01, fused=True)
    trained(learner, optimizer, 2)
    save_state(tmp_path / "state", learner, optimizer, 2)
    again = learner_of(LAYOUTS[layout](convolutional()))
    other = torch.optim.Adam(again.parameters(), lr=0.01, fused=True)
    load_state(tmp_path / "state", again, other)
    for own, stepper in ((learner, optimizer), (again, other)):
        for tasks in batches(3):
            meta_gradient(own, tasks).apply_to(own)
            stepper.step()
    for name, expected in learner.meta_parameters().items():
        torch.testing.assert_close(again.meta_parameters()[name], expected, rtol=1e-6, atol=1e-6)


def test_a_model_that_was_laid_out_anew_is_trained_on():
    learner = learner_of(convolutional())
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    trained(learner, optimizer, 2)
    other = copy.deepcopy((learner, optimizer))
    LAYOUTS["channels last"](other[0].model)
    for own in ((learner, optimizer), other):
        trained(*own, 2)
    for name, expected in learner.meta_parameters().items():
        torch.testing.assert_close(other[0].meta_parameters()[name], expected, rtol=1e-5, atol=1e-6)


def gappy():
    model = dense()
    model[1].weight = nn.Parameter((torch.randn(6, 200) / 10)[:, :98])
    return model


def test_parameters_with_gaps_are_not_fused():
    learner = learner_of(gappy())
    between = learner.model[1].weight.detach().as_strided((6, 102), (200, 1), 98)
    before = between.clone()
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    by_hand = learner_of(copy.deepcopy(learner.model))
    trained(learner, optimizer, 2)
    assert not any(group["fused"] for group in optimizer.param_groups)
    assert torch.equal(between, before)
    trained(by_hand, torch.optim.Adam(by_hand.parameters(), lr=0.01, fused=False), 2)
    for name, expected in by_hand.meta_parameters().items():
        torch.testing.assert_close(learner.meta_parameters()[name], expected)


def test_parameters_with_gaps_are_refused_where_they_are_to_be_fused():
    learner = learner_of(gappy())
    with pytest.raises(InputError, match=r"a fused Adam takes parameters as they lie.*1.weight have gaps"):
        trained(learner, torch.optim.Adam(learner.parameters(), fused=True), 2)


@pytest.mark.parametrize(
    ("tensor", "gaps"),
    [
        (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), False),
        (torch.zeros(3, 4).t(), False),
        (torch.zeros(()), False),
        (torch.zeros(0, 3), False),
        (torch.zeros(4, 4)[:, :2], True),
        (torch.zeros(10)[::2], True),
        (torch.zeros(3, 1).expand(3, 4), True),
        (torch.zeros(3).to_sparse(), True),
    ],
)
def test_gaps(tensor, gaps):
    assert has_gaps(tensor) == gaps


def test_what_is_laid_anew():
    numbers = torch.arange(6.0).reshape(2, 3)
    assert laid(numbers, (3, 1)) is numbers
    assert laid(numbers, (1, 0)) is numbers
    assert laid(numbers.to_sparse(), (1, 2)).is_sparse
    found = laid(numbers, (1, 2))
    assert found.stride() == (1, 2)
    assert torch.equal(found, numbers)


def test_what_another_optimiser_keeps_is_left_alone():
    class Own(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1)
            self.state["all"] = 3

    learner = learner_of(dense())
    optimizer = Own(learner.parameters())
    trained(learner, optimizer, 1)
    assert optimizer.state["all"] == 3
