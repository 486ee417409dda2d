"""Every algorithm as the obvious slow loop: one task at a time, `torch.autograd.grad`, no torch.func.

First order trains a deepcopy with a real `torch.optim` optimiser. Second order swaps tensors that
carry a graph into a deepcopy. Buffers live in that copy, so they travel along the inner steps.
`rates` maps the names of the adapted parameters to their step sizes.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fomaml.tasks import Examples, Task, count, one


class Answer(NamedTuple):
    """gradients by name; query_losses (); support_losses (steps,); query_outputs (examples, ...)."""

    gradients: dict[str, Tensor]
    query_losses: Tensor
    support_losses: Tensor
    query_outputs: Tensor


class SignSGD(torch.optim.Optimizer):
    """φ - α sign(g)."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad.sign()


def over_tasks(algorithm, model, tasks: Task) -> Answer:
    """`algorithm` (model, task → Answer) on each task: gradients averaged, the rest stacked."""
    answers = [algorithm(model, one(tasks, i)) for i in range(count(tasks))]
    gradients = {
        name: torch.stack([a.gradients[name] for a in answers]).mean(0) for name in answers[0].gradients
    }
    return Answer(gradients, *(torch.stack(part) for part in list(zip(*answers))[1:]))


def learned(model) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def gradients(loss, tensors: dict[str, Tensor], **options) -> dict[str, Tensor | None]:
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, **options)
    return dict(zip(tensors, found))


def filled(found: dict, like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.zeros_like(like[n]) if g is None else g for n, g in found.items()}


def minibatch(support: Examples, size: int | None, step: int) -> Examples:
    number = len(support.targets)
    batches = 1 if size is None else math.ceil(number / size)
    rows = [i for i in range(number) if i % batches == step % batches]
    return Examples(support.inputs[rows], support.targets[rows])


def adapt(model, support, criterion, rates, steps, optimizer=torch.optim.SGD, batch=None):
    """φ after `steps` as a module of its own, and the loss at the start of each step."""
    adapted = copy.deepcopy(model)
    own = {name: dict(adapted.named_parameters())[name] for name in rates}
    inner = optimizer([{"params": [own[n]], "lr": rate} for n, rate in rates.items()])
    losses = []
    for step in range(steps):
        inputs, targets = minibatch(support, batch, step)
        loss = criterion(adapted(inputs), targets)
        for name, gradient in gradients(loss, own).items():
            own[name].grad = gradient
        inner.step()
        losses.append(loss.detach())
    return adapted, losses


def fomaml(model, task, criterion, rates, steps, **choices) -> Answer:
    """The query gradient at φ_K, taken for that at θ (Finn et al. 2017, section 5.2)."""
    adapted, losses = adapt(model, task.support, criterion, rates, steps, **choices)
    outputs = adapted(task.query.inputs)
    loss = criterion(outputs, task.query.targets)
    found = filled(gradients(loss, learned(adapted)), learned(adapted))
    return Answer(found, loss.detach(), torch.stack(losses), outputs.detach())


def reptile(model, task, criterion, rates, steps, **choices) -> Answer:
    """θ - φ_K (Nichol et al. 2018, algorithm 2)."""
    adapted, losses = adapt(model, task.support, criterion, rates, steps, **choices)
    moved = learned(adapted)
    found = {name: (p - moved[name]).detach() for name, p in learned(model).items()}
    with torch.no_grad():
        outputs = adapted(task.query.inputs)
        loss = criterion(outputs, task.query.targets)
    return Answer(found, loss, torch.stack(losses), outputs)


def maml(
    model, task, criterion, rates, steps, *, momentum=0.0, nesterov=False, weight_decay=0.0, batch=None
) -> Answer:
    """The gradient through the inner steps (Finn et al. 2017, algorithm 1)."""
    shell = copy.deepcopy(model)
    places = {  # name → every (module, attribute) that holds it: more than one where it is tied
        name: [(m, k) for m in shell.modules() for k, q in m._parameters.items() if q is p]
        for name, p in learned(shell).items()
    }
    theta = {name: p.detach().clone().requires_grad_() for name, p in learned(model).items()}

    def loss_at(phi, examples):
        for name, tensor in phi.items():
            for module, attribute in places[name]:
                module._parameters.pop(attribute, None)
                setattr(module, attribute, tensor)
        outputs = shell(examples.inputs)
        return criterion(outputs, examples.targets), outputs

    phi, velocity, losses = dict(theta), {}, []
    for step in range(steps):
        loss, _ = loss_at(phi, minibatch(task.support, batch, step))
        found = gradients(loss, {name: phi[name] for name in rates}, create_graph=True)
        for name, g in found.items():
            if g is None:
                continue
            g = g + weight_decay * phi[name]
            velocity[name] = momentum * velocity[name] + g if name in velocity else g
            direction = g + momentum * velocity[name] if nesterov else velocity[name]
            phi[name] = phi[name] - rates[name] * direction
        losses.append(loss.detach())
    loss, outputs = loss_at(phi, task.query)
    found = filled(gradients(loss, theta), theta)
    return Answer(found, loss.detach(), torch.stack(losses), outputs.detach())
