"""First-order MAML as users write it without a library: the plain loop and vmap, eager and compiled.

Each function: Setup → (run, read), see contestants.py.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads import Setup
from fomaml.tasks import count, one


def loop(setup: Setup):
    """`deepcopy`, `torch.optim.SGD`, and the query gradients added up."""
    model, workload, criterion = setup.model, setup.workload, setup.criterion
    tasks = [one(setup.tasks, i) for i in range(count(setup.tasks))]

    def run() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for task in tasks:
            adapted = copy.deepcopy(model)
            inner = torch.optim.SGD(adapted.parameters(), lr=workload.inner_lr)
            for _ in range(workload.steps):
                inner.zero_grad()
                criterion(adapted(task.support.inputs), task.support.targets).backward()
                inner.step()
            inner.zero_grad()
            criterion(adapted(task.query.inputs), task.query.targets).backward()
            for sum_, parameter in zip(total, adapted.parameters()):
                sum_ += parameter.grad
        return [sum_ / len(tasks) for sum_ in total]

    return run, list


def compiled_loop(setup: Setup):
    """The loop with one compiled function for an inner step and one for the query gradient."""
    workload = setup.workload
    gradient = _gradient(setup)
    tasks = [one(setup.tasks, i) for i in range(count(setup.tasks))]

    @torch.compile(dynamic=False)
    def step(parameters, inputs, targets):
        slope = gradient(parameters, inputs, targets)
        return {name: p - workload.inner_lr * slope[name] for name, p in parameters.items()}

    @torch.compile(dynamic=False)
    def add(total, parameters, inputs, targets):
        slope = gradient(parameters, inputs, targets)
        return {name: t + slope[name] for name, t in total.items()}

    def run() -> list[Tensor]:
        start = _parameters(setup)
        total = {name: torch.zeros_like(p) for name, p in start.items()}
        for task in tasks:
            parameters = start
            for _ in range(workload.steps):
                parameters = step(parameters, *task.support)
            total = add(total, parameters, *task.query)
        return [t / len(tasks) for t in total.values()]

    return run, list


def vmapped(setup: Setup):
    """`torch.func.vmap` over tasks of the gradient of one, the first inner step on shared weights."""
    return _with_attention(setup, _over_tasks(setup)), list


def compiled_vmapped(setup: Setup):
    """The same as one compiled function."""
    return _with_attention(setup, torch.compile(_over_tasks(setup), dynamic=False)), list


def _with_attention(setup: Setup, over_tasks):
    """A run, with attention written out where there is any: vmap has no rule for the CPU's flash attention
    and, with a warning, takes one task after the other (11 % slower on workload G).
    """
    attention = any(isinstance(m, nn.MultiheadAttention) for m in setup.model.modules())

    def run() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH) if attention else nullcontext():
            return over_tasks(_parameters(setup), *setup.tasks)

    return run


def _over_tasks(setup: Setup):
    workload = setup.workload
    gradient = _gradient(setup)

    def one_task(parameters, support, query):
        for _ in range(workload.steps):
            slope = gradient(parameters, *support)
            parameters = {name: p - workload.inner_lr * slope[name] for name, p in parameters.items()}
        return gradient(parameters, *query)

    def run(parameters, support, query) -> list[Tensor]:
        slopes = vmap(one_task, in_dims=(None, 0, 0))(parameters, tuple(support), tuple(query))
        return [slope.mean(0) for slope in slopes.values()]

    return run


def _gradient(setup: Setup):
    def loss(parameters, inputs, targets):
        return setup.criterion(functional_call(setup.model, parameters, (inputs,)), targets)

    return grad(loss)


def _parameters(setup: Setup) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in setup.model.named_parameters()}
