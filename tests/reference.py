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


class Shell:
    """A copy of a module that runs with the tensors it is given in place of its learned parameters."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)
        self.places = {  # name → every (module, attribute) that holds it: more than one where it is tied
            name: [(m, k) for m in self.module.modules() for k, q in m._parameters.items() if q is p]
            for name, p in learned(self.module).items()
        }

    def __call__(self, tensors: dict[str, Tensor], inputs: Tensor) -> Tensor:
        for name, tensor in tensors.items():
            for module, attribute in self.places[name]:
                module._parameters.pop(attribute, None)
                setattr(module, attribute, tensor)
        return self.module(inputs)

    def features(self, tensors: dict[str, Tensor], inputs: Tensor, head: str) -> Tensor:
        """What goes into the module of this name."""
        caught = []
        with self.module.get_submodule(head).register_forward_pre_hook(
            lambda _, args: caught.append(args[0])
        ):
            self(tensors, inputs)
        return caught[0]


def leaves(model) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in learned(model).items()}


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
    shell = Shell(model)
    theta = leaves(model)

    def loss_at(phi, examples):
        outputs = shell(phi, examples.inputs)
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


def unrolled(
    model, task, criterion, start, rate, steps, meta, *, first_order, weights=None, sign=False
) -> Answer:
    """The inner loop written out, with an explicit graph for all that the meta-gradient goes through.

    start: θ as leaves, shell → φ₀ as functions of them. rate: (name, step) → α of what adapts, or None. meta:
    the leaves to differentiate by. weights: of the query loss after each step; the last one only by default.
    """
    shell = Shell(model)
    phi = start(shell)
    adapted = [name for name in phi if rate(name, 0) is not None]
    losses, scalar = [], 0.0
    for step in range(steps):
        # a copy of each, since one may depend on another through θ, and partial derivatives are meant
        point = {n: p.detach().requires_grad_() if first_order else 1.0 * p for n, p in phi.items()}
        loss = criterion(shell(point, task.support.inputs), task.support.targets)
        found = gradients(loss, {n: point[n] for n in adapted}, create_graph=not first_order)
        for name, g in found.items():
            if g is not None:
                phi[name] = phi[name] - rate(name, step) * (g.sign() if sign else g)
        losses.append(loss.detach())
        if weights is not None or step == steps - 1:
            outputs = shell(phi, task.query.inputs)
            query_loss = criterion(outputs, task.query.targets)
            scalar = scalar + (1.0 if weights is None else weights[step]) * query_loss
    found = filled(gradients(scalar, meta), meta)
    return Answer(found, query_loss.detach(), torch.stack(losses), outputs.detach())


def learned_rates(model, task, criterion, lr, steps, *, elementwise, first_order, weights=None) -> Answer:
    """Meta-SGD (Li et al. 2017) and LSLR (Antoniou et al. 2019): the step sizes are leaves too."""
    theta = leaves(model)
    shape = (lambda p: p.shape) if elementwise else (lambda p: (steps,))
    alpha = {n: torch.full(shape(p), lr, dtype=p.dtype, requires_grad=True) for n, p in theta.items()}
    meta = {**theta, **{f"inner_lr.{n}": a for n, a in alpha.items()}}
    return unrolled(
        model,
        task,
        criterion,
        lambda shell: dict(theta),
        lambda name, step: alpha[name] if elementwise else alpha[name][step],
        steps,
        meta,
        first_order=first_order,
        weights=weights,
    )


def multi_step(model, task, criterion, lr, steps, weights) -> Answer:
    """FOMAML on the weighted query losses after every step."""
    theta = leaves(model)
    return unrolled(
        model,
        task,
        criterion,
        lambda _: dict(theta),
        lambda *_: lr,
        steps,
        theta,
        first_order=True,
        weights=weights,
    )


def from_head(model, task, criterion, lr, steps, head, ways, prototypes, first_order=True) -> Answer:
    """FOMAML or MAML from a head of zeros, or of class prototypes (Triantafillou et al. 2020, section 3.2)."""
    theta = leaves(model)

    def start(shell):
        features = shell.features(theta, task.support.inputs, head)
        rows = []
        for k in range(ways):
            rows.append(features[task.support.targets == k].mean(0))
        c = torch.stack(rows) if prototypes else torch.zeros(ways, features.shape[1], dtype=features.dtype)
        if not prototypes:
            c.requires_grad_()
        return {**theta, f"{head}.weight": 2 * c, f"{head}.bias": -(c**2).sum(1)}

    return unrolled(model, task, criterion, start, lambda *_: lr, steps, theta, first_order=first_order)


def cavia(model, task, criterion, lr, steps, context, first_order=True) -> Answer:
    """CAVIA (Zintgraf et al. 2019, algorithm 1): the context starts at zero, and alone adapts."""
    theta = leaves(model)

    def start(shell):
        return {**theta, context: torch.zeros_like(theta[context]).requires_grad_()}

    return unrolled(
        model,
        task,
        criterion,
        start,
        lambda name, step: lr if name == context else None,
        steps,
        theta,
        first_order=first_order,
    )


def imaml(model, task, criterion, lr, steps, strength, damping=0.0) -> Answer:
    """(I + H/(λ + damping))⁻¹ ∇L(φ_K; query), with the Hessian as a matrix and an exact solution."""
    theta = leaves(model)
    sizes = [p.numel() for p in theta.values()]
    shell = Shell(model)

    def unflatten(flat):
        return {n: part.view(p.shape) for (n, p), part in zip(theta.items(), flat.split(sizes))}

    def support_loss(flat):
        return criterion(shell(unflatten(flat), task.support.inputs), task.support.targets)

    origin = torch.cat([p.detach().flatten() for p in theta.values()])
    flat, losses = origin.clone(), []
    for _ in range(steps):
        flat.requires_grad_()
        loss = support_loss(flat) + strength / 2 * ((flat - origin) ** 2).sum()
        losses.append(loss.detach())
        flat = (flat - lr * torch.autograd.grad(loss, flat)[0]).detach()
    flat.requires_grad_()
    (slope,) = torch.autograd.grad(support_loss(flat), flat, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(s, flat, retain_graph=True)[0] for s in slope])
    outputs = shell(unflatten(flat), task.query.inputs)
    loss = criterion(outputs, task.query.targets)
    (right,) = torch.autograd.grad(loss, flat)
    matrix = torch.eye(len(flat), dtype=flat.dtype) + hessian / (strength + damping)
    solved = torch.linalg.solve(matrix, right)
    return Answer(unflatten(solved), loss.detach(), torch.stack(losses), outputs.detach())
