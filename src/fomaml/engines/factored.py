"""All tasks at once without ever building their weights: first order and plain SGD inside only.

The change of a Linear weight in the inner loop is a sum of outer products, ΔW = -α Σₖ δₖᵀ aₖ, with a
the inputs and δ the output gradients of earlier steps. So this engine keeps (a, δ) and computes
W′x = Wx + ΔW x from them: every large matmul uses the *shared* W for all tasks at once, and
autograd's gradient of W is one matmul over all tasks' queries. Where a layer's inputs do not depend
on any parameter (the first layer's), they are the same at every step: then Wx is computed once, and
the outer products of all steps collapse into one.

Exact in exact arithmetic. A change is kept as `Factors`, or `Dense` where its factors would cost more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fomaml.choices import Statistics
from fomaml.engines import _torch
from fomaml.engines.batched import refuse_hooks
from fomaml.engines.watching import watched
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD, not_autocast
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import QueryLoss
from fomaml.learning.problem import Problem
from fomaml.tasks import Task


def problem(
    learner: MetaLearner,
    tasks: Task,
    *,
    evaluating: bool = False,
    ways: int | None = None,
    measured: bool = False,
) -> Problem:
    """The problem of a stack of tasks, its Linear weights in factors.

    Raises:
        InputError: a learner that the factors do not suit.
    """
    refuse_hooks(learner)
    reason = refusal(learner)
    if reason:
        raise InputError(f"the factored engine does not take this learner: {reason}")
    return FactoredProblem(learner, tasks, evaluating=evaluating, ways=ways)


def refusal(learner: MetaLearner) -> str | None:
    """Why this engine cannot take the learner, or None."""
    if learner.first_order is not True:
        return "it is first order only; use engine='batched' or 'loop'"
    if learner.optimizer != SGD():
        return "it needs plain SGD inside; use engine='batched' or 'loop'"
    if not isinstance(learner.objective, QueryLoss):
        return f"it needs the query loss as objective, not {type(learner.objective).__name__}"
    if learner.inner_batch_size is not None:
        return "it needs the whole support set at each step, not inner_batch_size"
    if learner.loss is not None:
        return "it takes a criterion of outputs and targets, not a loss= of the whole model"
    if learner.inner_accumulate is not None:
        return "it needs the whole support set in memory, not inner_accumulate"
    if learner.start is not None:
        return f"it starts at the meta-parameters, not at a {type(learner.start).__name__}"
    if learner.inner_lr.learned():
        return "it needs constant step sizes, not learned ones"
    if not linear_weights(learner):
        return "no adapted nn.Linear weight in the model"
    return None


def linear_weights(learner: MetaLearner) -> list[str]:
    """The names of the adapted weights that only `nn.Linear` modules own."""
    owners: dict[int, set[type]] = {}
    for module in learner.model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(type(module))
    own = dict(learner.model.named_parameters())
    return [n for n in learner.adapted if own[n].dim() == 2 and owners[id(own[n])] == {nn.Linear}]


class Factors(NamedTuple):
    """The change dᵀa of a Linear weight. a: (tasks, rows, in). d: (tasks, rows, out)."""

    a: Tensor
    d: Tensor


class Dense(NamedTuple):
    """The change of a Linear weight as it is, (tasks, out, in)."""

    change: Tensor


Change = Factors | Dense


class _State(NamedTuple):
    """φ of a stack of tasks. dense: the other parameters, (tasks, ...). changes: by Linear weight, where it has one."""

    dense: dict[str, Tensor]
    changes: dict[str, Change]


class _Linears(TorchFunctionMode):
    """Within it, `F.linear` on a known weight adds the change of that weight; what went in and out is recorded."""

    def __init__(self, names: Mapping[int, str], changes: Mapping[str, Change], kept: Mapping[int, tuple]):
        super().__init__()
        self.names, self.changes, self.kept = names, changes, kept
        self.calls: list[str] = []
        self.inputs: list[Tensor] = []
        self.shared: dict[int, Tensor] = {}
        self.products: dict[int, Tensor] = {}
        self.outputs: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.linear:
            return self._other(function(*args, **kwargs), function, [*args, *kwargs.values()])
        inputs, weight, bias = _linear_arguments(*args, **kwargs)
        name = self.names.get(id(weight))
        if name is None:
            return self._other(function(*args, **kwargs), function, [inputs, bias])
        self._refuse(function, [inputs, bias])
        call, change = len(self.calls), self.changes.get(name)
        shared, product = self.kept.get(call, (None, None))
        if isinstance(change, Dense):
            output = F.linear(inputs, weight + change.change)
        else:
            if shared is None:
                shared = F.linear(inputs, weight)
            self.shared[call] = output = shared
            if change is not None:
                if product is None:
                    product = inputs @ change.a.mT
                self.products[call] = product
                output = output + product @ change.d
        if bias is not None:
            output = output + bias
        self.calls.append(name)
        self.inputs.append(inputs)
        self.outputs.append(output)
        return output

    def _other(self, result, function, arguments):
        """The result of another function, unless it computes with a known weight: its change would be missed."""
        if any(isinstance(each, Tensor) for each in _flat([result])):
            self._refuse(function, arguments)
        return result

    def _refuse(self, function, arguments) -> None:
        used = [self.names[id(a)] for a in _flat(arguments) if id(a) in self.names]
        if used:
            raise InputError(
                f"the factored engine does not take this model: {used[0]!r} is used outside of a linear layer "
                f"({getattr(function, '__name__', function)}); use engine='batched' or 'loop'"
            )


def _flat(parts: list) -> list:
    """The parts, and those of lists and tuples among them."""
    return [each for part in parts for each in (part if isinstance(part, (list, tuple)) else [part])]


def _linear_arguments(input, weight, bias=None):
    return input, weight, bias


class FactoredProblem(Problem):
    """A stack of tasks whose Linear weights are never built."""

    def __init__(self, learner: MetaLearner, tasks: Task, evaluating: bool = False, ways: int | None = None):
        super().__init__(learner, tasks, stacked=True, evaluating=evaluating, ways=ways)
        own = dict(learner.model.named_parameters())
        self.weights = {name: own[name] for name in linear_weights(learner)}
        self.names = {id(weight): name for name, weight in self.weights.items()}
        self.start = _State({n: p for n, p in self.start.items() if n not in self.weights}, {})

    def path(
        self,
        first_order: bool | None = None,
        overwrite: bool = False,
    ) -> Iterator[tuple[_State, Tensor]]:
        """(φₖ₊₁, support losses at φₖ) for k = 0, 1, …, without end. Always of first order; plain SGD has no state."""
        dense, changes = self.start
        support = self.task.support
        rates = self.learner.inner_lr(0)
        kept: dict[int, tuple] = {}
        versions = [*map(_torch.version, self.buffers.values())]
        for step in itertools.count():
            with torch.enable_grad(), nullcontext() if changes else watched() as seen:
                point = {n: p.detach().requires_grad_() for n, p in dense.items()}
                fixed = {n: p.detach() for n, p in self.fixed.items()}
                losses, _, record = self._forward(point, changes, fixed, support, kept, step)
                calls, inputs, shared, products, outputs = record
                gradients = torch.autograd.grad(losses.sum(), [*point.values(), *outputs], allow_unused=True)
            dense = {
                name: p if g is None else p - rates[name] * g
                for (name, p), g in zip(dense.items(), gradients)
            }
            if seen is not None:
                # whether a buffer was written, not whether it changed: its values are not known in a trace
                written = None in versions or versions != [*map(_torch.version, self.buffers.values())]
                constant = {
                    i
                    for i, a in enumerate(inputs)
                    if not (seen.random or written) and not a.requires_grad and calls.count(calls[i]) == 1
                }
            changes = dict(changes)
            with not_autocast(losses.device.type):
                for call, (name, a, delta) in enumerate(zip(calls, inputs, gradients[len(point) :])):
                    if delta is None:
                        continue
                    dtype = self.weights[name].dtype
                    a, d = _rows(a.detach()).to(dtype), _rows(delta).to(dtype) * -rates[name]
                    changes[name] = _add(changes.get(name), a, d, call in constant)
            with torch.no_grad():
                kept = {
                    i: (
                        shared[i].detach().requires_grad_(),
                        _product(products, inputs, i, changes[calls[i]]),
                    )
                    for i in constant
                    if calls[i] in changes
                }
            yield _State(dense, changes), losses.detach()

    def query(
        self,
        adapted: _State,
        statistics: Statistics = "own",
        step: int | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        step = self.steps if step is None else step
        support = self._support_for(statistics), statistics == "with-query"
        losses, outputs, _ = self._forward(
            adapted.dense, adapted.changes, self.fixed, self.task.query, {}, step, *support, buffers
        )
        return losses, outputs

    def _forward(self, dense, changes, fixed, examples, kept, step, support=None, apart=False, buffers=None):
        calls: list[str] = []
        meets = self._meets(examples, support, step)

        def one_task(dense, changes, buffers, examples, kept, support):
            parameters = {**fixed, **self.weights, **dense}
            with _Linears(self.names, changes, kept) as linears:
                judged = self._judged(parameters, buffers, examples, support, step, apart, meets)
            calls[:] = linears.calls
            return *judged, (linears.inputs, linears.shared, linears.products, linears.outputs)

        buffers = self.buffers if buffers is None else buffers
        axes = (0, 0, 0, 0, 0, None if support is None else 0)
        with self.attention():
            losses, outputs, assigned, met, record = torch.func.vmap(one_task, axes, randomness="different")(
                dense, changes, buffers, examples, kept, support
            )
        buffers.update(assigned)
        if self.met is not None:
            self.met.update(met)
        return losses, outputs, (calls, *record)


def rows(problem: FactoredProblem) -> dict[str, int]:
    """By Linear weight, the number of vectors of one task's support set that go through it."""
    with torch.no_grad():
        support = problem.task.support
        _, _, (calls, inputs, *_) = problem._forward(problem.start.dense, {}, problem.fixed, support, {}, 0)
    found = dict.fromkeys(calls, 0)
    for name, a in zip(calls, inputs):
        found[name] += a[0].numel() // a.shape[-1]
    return found


def _product(
    products: Mapping[int, Tensor], inputs: list[Tensor], call: int, change: Change
) -> Tensor | None:
    """x aᵀ of a layer whose inputs x are the same at every step, and so are its factors' a; None once it is dense."""
    if isinstance(change, Dense):
        return None
    if call in products:
        return products[call].detach()
    x = inputs[call].detach()  # (tasks, ..., in)
    return (_rows(x) @ change.a.mT).view(*x.shape[:-1], -1)


def _rows(values: Tensor) -> Tensor:
    """(tasks, ..., width) → (tasks, rows, width), also where a task has a single vector."""
    return values.reshape(len(values), -1, values.shape[-1])


def _add(change: Change | None, a: Tensor, d: Tensor, constant: bool) -> Change:
    """Add dᵀa to a change; dense from when the factors would cost more than the weight.

    constant: a is the same at every step.
    """
    match change:
        case Dense(before):
            return Dense(torch.baddbmm(before, d.mT, a))
        case Factors(before_a, before_d) if constant:
            return Factors(before_a, before_d + d)
        case Factors(before_a, before_d):
            rows = before_a.shape[1] + a.shape[1]
            if _pays(rows, a, d):
                return Factors(torch.cat([before_a, a], 1), torch.cat([before_d, d], 1))
            return Dense(torch.baddbmm(before_d.mT @ before_a, d.mT, a))
    return Factors(a, d) if constant or _pays(a.shape[1], a, d) else Dense(d.mT @ a)


def _pays(rows: int, a: Tensor, d: Tensor) -> bool:
    """Whether factors of so many rows are smaller than the change that they stand for."""
    return rows * (a.shape[2] + d.shape[2]) <= a.shape[2] * d.shape[2]
