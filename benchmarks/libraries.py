"""The other libraries that pip installs, each used as its documentation tells for first order.

Each function: Setup → (run, read), see contestants.py. Packages are imported inside, as any may be missing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.workloads import Setup
from fomaml.tasks import count, one


def higher(setup: Setup):
    """`track_higher_grads=False`, and the query gradient by the latest fast parameters.

    With that flag alone the meta-parameters get no gradient at all; its issue tracker (63, 129) gives
    this workaround: differentiate by `fmodel.parameters()` and map the gradients by hand.
    """
    import higher

    model, workload, criterion = setup.model, setup.workload, setup.criterion
    inner = torch.optim.SGD(model.parameters(), lr=workload.inner_lr)

    def one_task(task):
        with higher.innerloop_ctx(model, inner, track_higher_grads=False) as (fmodel, diffopt):
            for _ in range(workload.steps):
                diffopt.step(criterion(fmodel(task.support.inputs), task.support.targets))
            loss = criterion(fmodel(task.query.inputs), task.query.targets)
            return torch.autograd.grad(loss, list(fmodel.parameters(time=-1)))

    return lambda: _mean(one_task, setup), list


def torchopt(setup: Setup):
    """Its functional SGD in a loop over tasks, gradients by `autograd.grad` without a graph: `MetaSGD` and
    `FuncOptimizer` are second order, with no choice.
    """
    import torchopt

    model, workload, criterion = setup.model, setup.workload, setup.criterion
    names = [name for name, _ in model.named_parameters()]
    sgd = torchopt.sgd(lr=workload.inner_lr)

    def slope(parameters, examples):
        outputs = functional_call(model, dict(zip(names, parameters)), (examples.inputs,))
        return torch.autograd.grad(criterion(outputs, examples.targets), parameters)

    def one_task(task):
        parameters = tuple(p.detach().requires_grad_() for p in model.parameters())
        state = sgd.init(parameters)
        for _ in range(workload.steps):
            updates, state = sgd.update(slope(parameters, task.support), state, inplace=False)
            moved = torchopt.apply_updates(parameters, updates, inplace=False)
            parameters = tuple(p.detach().requires_grad_() for p in moved)
        return slope(parameters, task.query)

    return lambda: _mean(one_task, setup), list


def torchopt_vmap(setup: Setup):
    """The same under `torch.func.vmap` and `grad`, as in its functorch examples."""
    import torchopt

    model, workload, criterion = setup.model, setup.workload, setup.criterion
    sgd = torchopt.sgd(lr=workload.inner_lr)

    def loss(parameters, inputs, targets):
        return criterion(functional_call(model, parameters, (inputs,)), targets)

    def one_task(parameters, support, query):
        state = sgd.init(parameters)
        for _ in range(workload.steps):
            updates, state = sgd.update(grad(loss)(parameters, *support), state, inplace=False)
            parameters = torchopt.apply_updates(parameters, updates, inplace=False)
        return grad(loss)(parameters, *query)

    def run() -> list[Tensor]:
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        slopes = vmap(one_task, in_dims=(None, 0, 0))(parameters, *map(tuple, setup.tasks))
        return [slope.mean(0) for slope in slopes.values()]

    return run, list


def iteryne(setup: Setup):
    """`MAML(first_order=True)`: clone, adapt, `backward` on each query loss."""
    import iteryne

    workload, criterion = setup.workload, setup.criterion
    maml = iteryne.MAML(setup.model, inner_lr=workload.inner_lr, inner_steps=workload.steps, first_order=True)

    def one_task(task):
        learner = maml.clone().adapt_on(criterion, *task.support)
        criterion(learner(task.query.inputs), task.query.targets).backward()

    return lambda: _accumulated(one_task, setup), list


def learn2learn(setup: Setup):
    """`l2l.algorithms.MAML(first_order=True)`: clone, adapt, `backward` on each query loss."""
    import learn2learn

    workload, criterion = setup.workload, setup.criterion
    maml = learn2learn.algorithms.MAML(setup.model, lr=workload.inner_lr, first_order=True)

    def one_task(task):
        learner = maml.clone()
        for _ in range(workload.steps):
            learner.adapt(criterion(learner(task.support.inputs), task.support.targets))
        criterion(learner(task.query.inputs), task.query.targets).backward()

    return lambda: _accumulated(one_task, setup), list


def parallel_metalearn(setup: Setup, backend: str):
    """`MAML` with `InnerSGD(first_order=True)`, backend "vmap" or "sequential".

    Its step always moves the parameters, so the outer optimiser is SGD with step size 0.
    """
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import CategoricalAccuracy, CrossEntropy
    from metalearn.loss.base import BaseLoss
    from metalearn.model_wrappers import MAML_Model

    class SquaredError(BaseLoss):
        def forward(self, out_dict, targets, model_states=None, **kwargs):
            loss = setup.criterion(out_dict["logits"], targets["labels"])
            return loss, loss.detach()

    workload = setup.workload
    regression = workload.ways is None
    model = MAML_Model(backbone=_Takes(setup.model), head=_Takes(nn.Identity()))
    inner = InnerSGD(
        model.get_fast_weights(), first_order=True, inner_lr=workload.inner_lr, learn_lr=False
    ).to(next(setup.model.parameters()).dtype)
    with torch.no_grad():
        for rate in inner.parameters():  # made in float32
            rate.fill_(workload.inner_lr)
    algorithm = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=SquaredError() if regression else CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=workload.steps,
        backend=backend,
        device=torch.device("cpu"),
    )
    support, query = setup.tasks
    batch = (support.inputs, {"labels": support.targets}, query.inputs, {"labels": query.targets})

    def run() -> list[Tensor]:
        algorithm.step(iter([batch]))
        return [p.grad for p in setup.model.parameters()]

    return run, list


class _Takes(nn.Module):
    """A module that ignores the keywords parallel-metalearn passes to every layer."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, **_) -> Tensor:
        return self.module(inputs)


def _mean(one_task, setup: Setup) -> list[Tensor]:
    """The mean over tasks of the gradients that `one_task` returns."""
    tasks = count(setup.tasks)
    total = [torch.zeros_like(p) for p in setup.model.parameters()]
    for i in range(tasks):
        for sum_, slope in zip(total, one_task(one(setup.tasks, i)), strict=True):
            sum_ += slope
    return [sum_ / tasks for sum_ in total]


def _accumulated(one_task, setup: Setup) -> list[Tensor]:
    """The mean over tasks of the gradients that `one_task` adds to the parameters' `.grad`."""
    tasks = count(setup.tasks)
    setup.model.zero_grad()
    for i in range(tasks):
        one_task(one(setup.tasks, i))
    return [p.grad / tasks for p in setup.model.parameters()]
