"""The start of a head that is made of the classes, where a task lacks one of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.engines import meta_gradient
from fomaml.learning.algorithms import ProtoMAML
from fomaml.models import MLP
from fomaml.tasks import Examples, Task

FAR = 40.0  # queries so far away that the logits of both present classes are below 0


def task_of(low, high):
    """A task whose support set has two classes, of these labels, and a query set of the same two."""
    generator = torch.Generator().manual_seed(0)
    second = torch.arange(2).repeat(3)
    noise = torch.randn(6, 4, generator=generator, dtype=torch.float64) / 10
    queries = FAR * torch.randn(20, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([low, high])
    inputs = 3 * F.one_hot(second, 4).double() + noise
    return Task(Examples(inputs, labels[second]), Examples(queries, labels[torch.arange(20) % 2]))


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_class_without_an_example_is_not_predicted(steps):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
    task = task_of(0, 2)
    learner = ProtoMAML(model, 0.1, 1, head="1")
    logits = learner.adapt(task.support, steps)(task.query.inputs)
    assert not (logits.argmax(1) == 1).any()
    if steps == 0:
        assert (logits[:, [0, 2]] < 0).all(1).any()  # where a head of zeros would have the largest
        means = [task.support.inputs[task.support.targets == label].mean(0) for label in (0, 2)]
        assert logits.argmax(1).equal(2 * torch.cdist(task.query.inputs, torch.stack(means)).argmin(1))


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_its_meta_gradient_is_that_of_the_classes_that_are_there(engine):
    torch.manual_seed(0)
    model = MLP(4, 5, 3).double()
    learner = ProtoMAML(model, 0.1, 2, head="3")
    lacking = meta_gradient(learner, [task_of(0, 2)], engine=engine)
    dense = meta_gradient(learner, [task_of(0, 1)], engine=engine)
    for name, gradient in dense.gradients.items():
        assert torch.allclose(lacking.gradients[name], gradient, atol=1e-12), name
