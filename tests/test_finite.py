"""Numbers that are not finite in an outer step: noticed before they are kept, and their cause named."""

import math

import pytest
import torch
from torch import nn

from fomaml.data.synthetic import Sinusoids
from fomaml.engines import plan
from fomaml.episodes import RegressionEpisodes
from fomaml.finite import IN_A_ROW, NotFiniteError, are_finite
from fomaml.learning.algorithms import FOMAML
from fomaml.train import train

BATCH = 3


class Spoiled:
    """Episodes of sinusoids; one number of one task is not finite."""

    def __init__(self, task=None, part="support", number=math.nan):
        self.own = RegressionEpisodes(Sinusoids(), shots=4, query_shots=4, seed=0)
        self.task, self.part, self.number = task, part, number

    def batch(self, start, tasks):
        found = self.own.batch(start, tasks)
        if self.task is not None and start <= self.task < start + tasks:
            getattr(found, self.part).inputs[self.task - start, 0] = self.number
        return found


class Root(nn.Linear):
    """Its gradient at 0 is infinite, its outputs are not."""

    def forward(self, inputs):
        return super().forward(inputs) + (self.weight.sum() - self.weight.detach().sum()).abs().sqrt()


def model(kind=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), kind(8, 1))


def records(episodes, inner_lr=0.01, meta_lr=0.01, kind=nn.Linear, iterations=6, **options):
    learner = FOMAML(model(kind), inner_lr, 2, criterion=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(learner.parameters(), lr=meta_lr)
    options = {"engine": "factored" if kind is nn.Linear else "loop", **options}
    return learner, train(
        learner, episodes, optimizer, iterations=iterations, meta_batch_size=BATCH, **options
    )


CAUSES = {
    "data": ({}, Spoiled(7), 3, r"the support inputs of task 7 .*which iteration 3 needs: mend the data"),
    "query data": ({}, Spoiled(4, "query", math.inf), 2, "the query inputs of task 4 "),
    "inner loop": (
        {"inner_lr": 1e30},
        Spoiled(),
        1,
        r"the meta-loss is (nan|inf) at iteration 1, task 0: the inner loop diverges, its loss is not finite after "
        "[12] of 2 inner steps: try a smaller inner_lr",
    ),
    "outer steps before": (
        {"meta_lr": 1e30},
        Spoiled(),
        2,
        "the meta-loss is not finite at iteration 2: the outer steps before have made the meta-parameter .* as large",
    ),
    "outer step": ({"meta_lr": 3e38}, Spoiled(), 1, "the outer step of iteration 1 made the meta-parameter"),
    "meta-gradient": ({"kind": Root}, Spoiled(), 1, "at iteration 1, task 0"),
}


@pytest.mark.parametrize("case", CAUSES)
def test_the_cause_is_named_and_nothing_is_taken_up(case):
    options, episodes, iteration, message = CAUSES[case]
    learner, steps = records(episodes, **options)
    before = {name: p.clone() for name, p in learner.meta_parameters().items()}
    with pytest.raises(NotFiniteError, match=message) as error:
        for record in steps:
            before = {name: p.clone() for name, p in learner.meta_parameters().items()}
            assert record.first_bad is None and not record.skipped
    assert error.value.iteration == iteration and error.value.found
    if case != "outer step":  # which is one only once it is taken
        for name, parameter in learner.meta_parameters().items():
            assert torch.equal(parameter, before[name]), name


def test_a_step_that_is_skipped_is_as_if_it_had_not_been():
    learner, steps = records(Spoiled(4), on_nonfinite="skip")
    found = list(steps)
    assert [record.iteration for record in found if record.skipped] == [2]
    like = FOMAML(model(), 0.01, 2, criterion=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(like.parameters(), lr=0.01)
    own = plan(like, Spoiled().batch(0, BATCH), engine="factored")
    for iteration in (0, 2, 3, 4, 5):
        own(Spoiled().batch(iteration * BATCH, BATCH)).apply_to(like)
        optimizer.step()
    for name, parameter in like.meta_parameters().items():
        assert torch.equal(parameter, learner.meta_parameters()[name]), name


def test_too_many_that_are_skipped_in_a_row_are_an_error():
    _, steps = records(Spoiled(), meta_lr=1e30, on_nonfinite="skip", iterations=2 * IN_A_ROW)
    found = []
    with pytest.raises(NotFiniteError, match="at iteration 101: the outer steps before"):
        for record in steps:
            found.append(record)
    assert [record.iteration for record in found if record.skipped] == list(range(2, 101))


def test_unchecked_steps_tell_the_first_bad_iteration():
    """As on a device, which is not waited for."""
    _, steps = records(Spoiled(4), check_each=False, measure_every=5)
    found = [next(steps).first_bad.item() for _ in range(4)]
    assert found == [0, 2, 2, 2]
    with pytest.raises(ValueError, match="hold numbers that are not finite"):
        next(steps)
    _, steps = records(Spoiled(), inner_lr=1e30, check_each=False, measure_every=5)
    with pytest.raises(NotFiniteError, match="not finite from iteration 1 on") as error:
        list(steps)
    assert not error.value.found


def test_large_numbers_are_finite():
    assert are_finite([torch.full((100,), 1e38), torch.tensor([], dtype=torch.float32), torch.tensor([3])])
    assert not are_finite([torch.ones(3), torch.tensor([1.0, math.nan])])
    assert not are_finite([torch.tensor([math.inf], dtype=torch.bfloat16)])
