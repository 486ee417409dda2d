"""Losses and outputs along the inner path: `curve`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from family import LR, rates
from fomaml.engines import curve, meta_gradient
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, one
from zoo import MODULES, draw, example


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
@pytest.mark.parametrize("module", MODULES)
def test_curve_equals_manual_adaptation(module, engine):
    model, tasks, criterion = example(module)
    if (module, engine) == ("autoencoder", "factored"):
        engine = "auto"  # which falls back
    learner = FOMAML(model, LR, 1, criterion)
    found = curve(learner, tasks, [0, 1, 3], engine=engine)
    for steps, (losses, outputs) in zip([0, 1, 3], found):
        assert not losses.requires_grad and not outputs.requires_grad
        for i in range(3):
            task = one(tasks, i)
            names = rates(reference.learned(model))
            adapted, _ = reference.adapt(model, task.support, criterion, names, steps)
            with torch.no_grad():
                expected = adapted(task.query.inputs)
                loss = criterion(expected, task.query.targets)
            torch.testing.assert_close(outputs[i], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(losses[i], loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_inductive_curve_gives_each_query_example_the_output_it_has_alone(engine):
    model, tasks, criterion = example("conv4")
    learner = FOMAML(model, LR, 1, criterion)
    alone = tasks._replace(query=Examples(*(t[:, 4:5] for t in tasks.query)))
    options = {"at_steps": [0, 2], "engine": engine}
    for steps in (0, 1):
        [all_of_them, one_of_them] = (
            curve(learner, t, statistics="support", **options)[steps][1] for t in (tasks, alone)
        )
        torch.testing.assert_close(all_of_them[:, 4:5], one_of_them, rtol=1e-10, atol=1e-10)
        transductive = curve(learner, tasks, **options)[steps][1]
        assert (transductive[:, 4:5] - one_of_them).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
@pytest.mark.parametrize("module", ["conv4", "batch-norm"])
def test_curve_with_the_query_example_in_the_statistics(module, engine):
    model, tasks, criterion = example(module)
    learner = FOMAML(model, LR, 1, criterion)
    [_, (_, found)] = curve(learner, tasks, [0, 2], statistics="with-query", engine=engine)
    for i in range(len(found)):
        task = one(tasks, i)
        adapted, _ = reference.adapt(model, task.support, criterion, rates(reference.learned(model)), 2)
        with torch.no_grad():
            expected = [adapted(torch.cat([task.support.inputs, own[None]]))[-1] for own in task.query.inputs]
        torch.testing.assert_close(found[i], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_unknown_statistics_are_refused():
    model, tasks, criterion = example("conv4")
    with pytest.raises(InputError, match=r"unknown statistics 'alone'; there are: own, support, with-query"):
        curve(FOMAML(model, LR, 1, criterion), tasks, [1], statistics="alone")


class Recurrent(nn.Module):
    """What vmap does not take."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, inputs):
        return self.head(self.cell(inputs.unflatten(-1, (2, 3)))[0][:, -1])


@pytest.mark.parametrize("statistics", ["own", "support"])
def test_curve_of_a_recurrent_model_takes_the_loop(statistics):
    torch.manual_seed(1)
    learner = FOMAML(Recurrent().double(), LR, 1)
    tasks = draw((6,), F.cross_entropy)
    [(_, expected)] = curve(learner, tasks, [1], engine="loop")
    [(_, found)] = curve(learner, tasks, [1], statistics=statistics)  # no BatchNorm: the same
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Particular(nn.Module):
    """Raises what is no RuntimeError, under vmap only."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, inputs):
        if torch._C._functorch.is_batchedtensor(inputs):
            raise ValueError("not these")
        return self.head(inputs)


@pytest.mark.parametrize("engine", ["batched", "factored"])
@pytest.mark.parametrize(
    ("build", "reason"), [(Recurrent, "Batching rule not implemented"), (Particular, "not these")]
)
def test_an_engine_that_does_not_take_the_module_says_which_one_does(build, reason, engine):
    learner, tasks = FOMAML(build().double(), LR, 1), draw((6,), F.cross_entropy)
    message = rf"engine='{engine}' does not take this module, 'loop' does: {reason}"
    with pytest.raises(InputError, match=message) as raised:
        meta_gradient(learner, tasks, engine=engine)
    assert reason in str(raised.value.__cause__)
    with pytest.raises(InputError, match=message):
        curve(learner, tasks, [1], engine=engine)
    assert meta_gradient(learner, tasks).engine == "loop"


def test_an_error_of_the_module_itself_stays_as_it_is():
    class Wrong(Particular):
        def forward(self, inputs):
            raise KeyError("lost")

    for engine in ("loop", "batched", "factored", "auto"):
        with pytest.raises(KeyError, match="lost"):
            meta_gradient(FOMAML(Wrong().double(), LR, 1), draw((6,), F.cross_entropy), engine=engine)


def test_inductive_curve_refuses_a_native_batch_norm_that_would_see_the_query_set():
    model, tasks, criterion = example("batch-norm")
    with pytest.raises(InputError, match=r"'1'.*convert_batch_norm"):
        curve(FOMAML(model, LR, 1, criterion), tasks, [1], statistics="support")
