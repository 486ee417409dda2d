"""The meta-gradient against something that is no autograd: central differences, and cases with a known answer."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from family import DECAY, EXECUTIONS, LR, MOMENTUM, NESTEROV, STEPS, answer, error, rates
from fomaml.engines import meta_gradient
from fomaml.learning.adapt import SGD
from fomaml.learning.algorithms import ANIL, BOIL, FOMAML, MAML, MetaSGD, Reptile, SignMAML
from fomaml.tasks import one
from zoo import draw, example


@pytest.mark.parametrize("execution", ["loop", "batched", "batched-2"])
@pytest.mark.parametrize("inner", [{}, MOMENTUM, NESTEROV, DECAY], ids=str)
def test_second_order_equals_central_differences(inner, execution):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()).double()
    tasks = draw((3,), F.cross_entropy, tasks=3, ways=3)
    learner = MAML(model, 0.3, 3, optimizer=SGD(**inner))
    result = meta_gradient(learner, tasks, **EXECUTIONS[execution])
    names = rates(reference.learned(model), 0.3)
    optimizer = partial(torch.optim.SGD, **inner)

    def meta_loss():
        total = 0.0
        for i in range(3):
            task = one(tasks, i)
            adapted, _ = reference.adapt(model, task.support, F.cross_entropy, names, 3, optimizer=optimizer)
            total += F.cross_entropy(adapted(task.query.inputs), task.query.targets).item()
        return total / 3

    width = 1e-5
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        for i in range(0, len(flat), 3):
            centre = flat[i].item()
            sides = []
            for value in (centre + width, centre - width):
                flat[i] = value
                sides.append(meta_loss())
            flat[i] = centre
            difference = (sides[0] - sides[1]) / (2 * width)
            found = result.gradients[name].view(-1)[i].item()
            assert found == pytest.approx(difference, rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("execution", ["loop", "batched"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_learned_rates_equal_central_differences(elementwise, execution):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    tasks = draw((3,), F.cross_entropy, ways=3)
    kind = "elementwise" if elementwise else "per-step"
    learner = MAML(model, 0.3, 2, learn_rates=kind)
    result = meta_gradient(learner, tasks, **EXECUTIONS[execution])
    width = 1e-5
    for name, rate in learner.inner_lr.learned().items():
        flat = rate.detach().view(-1)
        for i in range(len(flat)):
            sides = []
            for shift in (width, -2 * width):
                flat[i] += shift
                sides.append(
                    meta_gradient(learner, tasks, **EXECUTIONS[execution]).query_losses.mean().item()
                )
            flat[i] += width
            found = result.gradients[f"inner_lr.{name}"].view(-1)[i].item()
            assert found == pytest.approx((sides[0] - sides[1]) / (2 * width), rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("preset", [FOMAML, MAML, ANIL, BOIL, MetaSGD, SignMAML])
def test_without_a_step_the_meta_gradient_is_the_plain_query_gradient(preset):
    model, tasks, criterion = example("conv4-strided")
    learner = preset(model, 1e-300, 2, criterion)  # which changes no number of float64
    total = (
        sum(criterion(model(one(tasks, i).query.inputs), one(tasks, i).query.targets) for i in range(3)) / 3
    )
    expected = reference.gradients(total, reference.learned(model))
    for engine in ("loop", "batched"):
        found = meta_gradient(learner, tasks, engine=engine).gradients
        assert error({n: found[n] for n in expected}, expected) <= 1e-12


def test_the_meta_gradient_of_reptile_is_the_mean_displacement():
    model, tasks, criterion = example("mlp")
    learner = Reptile(model, LR, STEPS, criterion)
    found = meta_gradient(learner, tasks).gradients
    for name, parameter in model.named_parameters():
        ends = [learner.adapt(one(tasks, i).support).get_parameter(name) for i in range(3)]
        torch.testing.assert_close(found[name], parameter - sum(ends) / 3, rtol=0, atol=1e-14)


def test_first_order_is_not_second_order():
    """What tells the two apart in the table is far above its tolerance."""
    first, second = (answer(name, "mlp").gradients for name in ("fomaml", "maml"))
    assert error(first, second) > 1e-2
