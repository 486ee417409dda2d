"""A module together with the way it learns a task."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from itertools import islice
from typing import TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.choices import LearnRates, Statistics, check_choice
from fomaml.errors import InputError, whole
from fomaml.learning import rates
from fomaml.learning.adapt import SGD, load, ordinary_modes
from fomaml.learning.admission import check_module
from fomaml.learning.contracts import (
    Criterion,
    InnerOptimizer,
    InnerProblem,
    Loss,
    Objective,
    Outcome,
    Output,
    Start,
    checked_criterion,
    checked_loss_function,
    checked_objective,
    checked_optimizer,
    checked_output,
    module_of,
)
from fomaml.learning.copying import same_memory
from fomaml.learning.mistakes import refuse_as_loss, refuse_written
from fomaml.learning.moments import SecondMoments
from fomaml.learning.objectives import QueryLoss
from fomaml.learning.problem import Problem
from fomaml.learning.replica import Replicas
from fomaml.learning.statistics import met, move
from fomaml.learning.turns import turn_of
from fomaml.models import BatchNorm, Seen, is_moving, normalising, refuse_native, warn_of_unmoved
from fomaml.tasks import Batch, Examples, Task, as_batch, as_examples, count, one
from fomaml.trees import call, mapped


class Choices(TypedDict, total=False):
    """The arguments of `MetaLearner` that every algorithm passes on to it."""

    adapted: str | Sequence[str]
    frozen: str | Sequence[str]
    first_order: bool | Callable[[int], bool]
    learn_rates: LearnRates | None
    optimizer: InnerOptimizer
    objective: Objective | Callable[[InnerProblem], Outcome]
    start: Start | None
    inner_batch_size: int | None
    inner_accumulate: int | None
    loss: Loss | None
    output: Output


class MetaLearner(nn.Module):
    """A module together with the way it learns a task.

    Arguments:
        model: any module. A dict of inputs goes to it as keywords, a tuple as positional arguments. It is held, not
            copied: meta-training moves its own parameters. Parameters with `requires_grad=False` never change.
        inner_lr: the step size α, one number, or numbers by glob over parameter names
            (`{"head.*": 0.4, "*": 0.01}`, the first match counts).
        inner_steps: K, the number of inner steps in training; evaluation may take another number.
        criterion: (outputs, targets) → the mean loss, a scalar tensor; by default `F.cross_entropy`.
        loss: the general form in the criterion's place, (forward, examples) → the loss, a scalar tensor. `forward` is
            the model at the task's weights, to be called as the model is, `forward(examples.inputs)` included, with
            its attributes; examples are the support or the query set. It may differentiate by the inputs, weigh
            examples, use several heads. The engine "loop" takes it in any form; "batched" takes forms that
            `torch.func.vmap` does, with `torch.func.grad` in place of `torch.autograd.grad`.
        output: which part of what the model returns the criterion and metrics judge: a name (an attribute, or a key of
            a dict), a number, or a function. By default all of it.
        adapted: globs over parameter names, one or several; the parameters that adapt. All others
            are used as they are, and are meta-learned all the same.
        frozen: globs; parameters that neither adapt nor are meta-learned.
        first_order: hold the inner gradients constant (Finn et al. 2017, section 5.2), always or never,
            or as a function of the outer iteration.
        learn_rates: None, "elementwise" (Meta-SGD) or "per-step" (one rate per tensor and inner step):
            inner_lr is then where the step sizes start, and they are meta-learned.
        optimizer: the inner optimiser, `SGD`, `Adam` or `Sign`, its state fresh for each task but for what
            `Adam(carried=True)` carries on, which the learner holds as buffers, see `carry_moments`. One of your
            own declares what contracts.py says.
        objective: what a task contributes to the meta-loss, see objectives.py; one of your own is a function of
            the problem, or an object that declares what contracts.py says.
        start: where adaptation starts, if not at θ, see starts.py.
        inner_batch_size: take each inner step on a mini-batch of the support set: step k uses the
            examples i with i ≡ k modulo the number of mini-batches. Episodes order their examples by
            class, so a mini-batch is as balanced as it can be. None: the whole support set.
        inner_accumulate: compute each inner gradient over parts of so many support examples, one in memory at a time,
            and add them up: the same gradient, for a criterion that is the mean of one term for each example.

    Attributes:
        iteration: the outer iteration, from 0, which `train` sets; schedules read it.

    Raises:
        InputError: step sizes or counts that are not positive, globs that match nothing, or an inner optimiser or
            an objective that does not declare what it must.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float | Mapping[str, float],
        inner_steps: int,
        criterion: Criterion | None = None,
        loss: Loss | None = None,
        output: Output = None,
        adapted: str | Sequence[str] = "*",
        frozen: str | Sequence[str] = (),
        first_order: bool | Callable[[int], bool] = True,
        learn_rates: LearnRates | None = None,
        optimizer: InnerOptimizer = SGD(),  # noqa: B008 - frozen
        objective: Objective | Callable[[InnerProblem], Outcome] = QueryLoss(),  # noqa: B008 - frozen
        start: Start | None = None,
        inner_batch_size: int | None = None,
        inner_accumulate: int | None = None,
    ):
        super().__init__()
        check_module(model)
        self.model = model
        self.inner_steps = whole("inner_steps", inner_steps, 1)
        if loss is not None and criterion is not None:
            raise InputError("loss= takes the place of the criterion: give one of the two")
        self.criterion = None
        if loss is None:
            self.criterion = checked_criterion(F.cross_entropy if criterion is None else criterion)
        self.loss = None if loss is None else checked_loss_function(loss)
        refuse_as_loss(self.loss)
        self.output = checked_output(output)
        if not isinstance(first_order, bool) and not callable(first_order):
            raise InputError(
                f"first_order is True, False or a function of the iteration, got {first_order!r}"
            )
        self.first_order = first_order
        self.optimizer = checked_optimizer(optimizer)
        self.objective = checked_objective(objective)
        self.start = start
        if inner_batch_size is not None:
            inner_batch_size = whole("inner_batch_size", inner_batch_size, 1)
        self.inner_batch_size = inner_batch_size
        if inner_accumulate is not None:
            inner_accumulate = whole("inner_accumulate", inner_accumulate, 1)
            if loss is not None:
                raise InputError(
                    "inner_accumulate takes a mean over examples, and loss= is a function of all of them"
                )
        self.inner_accumulate = inner_accumulate
        self.iteration = 0
        own = dict(model.named_parameters())
        trainable = [name for name, parameter in own.items() if parameter.requires_grad]
        self.trainable = frozenset(trainable)
        excluded = select(trainable, frozen)
        self.meta_learned = [name for name in trainable if name not in excluded]
        self.adapted = [name for name in select(trainable, adapted) if name not in excluded]
        sizes = rates.by_name(self.adapted, inner_lr)
        check_choice("learn_rates", learn_rates, (None, *get_args(LearnRates)))
        self.inner_lr: rates.ConstantRates | rates.LearnedRates
        if learn_rates is None:
            self.inner_lr = rates.ConstantRates(sizes)
        else:
            elementwise = learn_rates == "elementwise"
            self.inner_lr = rates.LearnedRates(
                {name: own[name] for name in self.adapted},
                sizes,
                elementwise=elementwise,
                steps=None if elementwise else inner_steps,
            )
        carried = self.adapted if optimizer.carried else []
        if carried and start is not None:
            raise InputError("a carried Adam has its moments by θ: it does not go with another start")
        self.moments = SecondMoments({name: own[name] for name in carried})
        if first_order is not True and not optimizer.second_order:
            raise InputError(
                f"the inner optimiser {type(optimizer).__name__} is first order only; "
                "use SGD inside, or first_order=True"
            )

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer loop learns: the model's parameters by name, learned rates as "inner_lr.NAME", and those of a
        criterion or loss that is a module as "criterion.NAME" or "loss.NAME".
        """
        with turn_of(self.model):
            own = dict(self.model.named_parameters())
        learned = {f"inner_lr.{name}": rate for name, rate in self.inner_lr.learned().items()}
        kind = "criterion" if self.loss is None else "loss"
        judge = module_of(getattr(self, kind))
        if judge is not None:
            known = set(map(id, own.values()))
            for name, parameter in judge.named_parameters():
                if parameter.requires_grad and id(parameter) not in known:
                    learned[f"{kind}.{name}"] = parameter
        return {name: own[name] for name in self.meta_learned} | learned

    def forward(self, tasks: Batch) -> Tensor:
        """The meta-loss of a batch of tasks, a scalar to call `backward()` on, one task after the other.

        tasks: tensors of shape (tasks, examples, ...), or a list of single tasks. `fomaml.meta_gradient` computes the
        same gradient with less memory and, mostly, faster.
        """
        with turn_of(self.model):
            tasks = as_batch(tasks, self.model)
            number = count(tasks)
            first = one(tasks, 0).map(torch.clone)
            problems = (Problem(self, one(tasks, index)) for index in range(number))
            outcomes = (self.objective(checked(problem)) for problem in problems)
            total = reduce(torch.add, (outcome.scalar for outcome in outcomes)) / number
            refuse_written(first, one(tasks, 0))
            return total

    def adapt(self, support: Examples, steps: int | None = None, statistics: Statistics = "own") -> nn.Module:
        """Adapt to one task; returns an ordinary, independent module in the model's own mode.

        In the inner steps all but the batch norms are in evaluation mode, so dropout is off. Buffers are as the inner
        steps have left them.

        support: inputs (examples, ...) and targets (examples, ...). steps: by default `inner_steps`;
        0 returns a copy of the starting point. statistics: "support" freezes every `BatchNorm` of the returned
        module at the statistics of the support set, so that it can serve single examples; always so
        for those with the policy "support". "own" leaves the others to their policies.

        Raises:
            InputError: the statistics "with-query", which no module can have before it sees the query; examples that
                are none.

        Warns: batch norms that normalise by statistics which nothing has ever moved.
        """
        check_choice("statistics of an adapted module", statistics, ("own", "support"))
        steps = self.inner_steps if steps is None else whole("steps", steps)
        warn_of_unmoved(self.model)
        with turn_of(self.model), ordinary_modes():
            given = as_examples(support, self.model)
            support = mapped(torch.clone, given)
            problem = checked(Problem(self, Task(support, support), evaluating=True))
            adapted = problem.start
            with problem.replicas.staying():
                for adapted, _ in islice(problem.path(first_order=True, overwrite=True), steps):
                    pass
            moved = all(value is not problem.start[name] for name, value in adapted.items())
            module = self.module_at(
                problem.replicas, adapted, problem.buffers, support, steps, statistics, fresh=moved
            )
            refuse_written(Task(given, given), Task(support, support))
        return module

    def module_at(
        self,
        replicas: Replicas,
        adapted: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        support: Examples,
        steps: int,
        statistics: Statistics,
        fresh: bool,
    ) -> nn.Module:
        """What `adapt` returns, of the φ of one task, its buffers and its support set.

        fresh: nobody else holds φ, which becomes the module's own.

        Raises:
            InputError: φ is not finite.
        """
        if not all(map(_finite, adapted.values())):
            raise InputError(f"after {steps} steps the parameters are not finite: try a smaller inner_lr")
        module = replicas.duplicate(adapted if fresh else {})
        own = dict(module.named_parameters(remove_duplicate=False))
        rest = {name: value for name, value in adapted.items() if not same_memory(own[name], value)}
        load(module, rest, {n: b for n, b in buffers.items() if "/" not in n})  # but the criterion's
        if statistics == "support" or self.uses_support_statistics():
            refuse_native(module)
            seen: list[Seen] = []
            with torch.no_grad(), normalising(record=seen):
                call(module, support.inputs)
            for layer, _, mean, variance in seen:
                layer.freeze(mean, variance)
        return module

    def uses_support_statistics(self) -> bool:
        """Whether a `BatchNorm` of the model has the policy "support"."""
        return any(m.policy == "support" for m in self.model.modules() if isinstance(m, BatchNorm))

    def moving_norms(self) -> list[BatchNorm]:
        """The layers whose running statistics `update_statistics` moves."""
        return [module for module in self.model.modules() if is_moving(module)]

    @torch.no_grad()
    def update_statistics(self, tasks: Batch, momentum: float = 0.1) -> None:
        """Move the running statistics of "running" and "per-step" `BatchNorm` layers towards those of the
        batches that the first of `tasks` meets on its way from θ to φ_K, once an outer step. `train` does so with what
        the meta-gradient has found of them: `move(model, found.statistics)`.
        """
        with turn_of(self.model):
            if not self.moving_norms():
                return
            problem = Problem(self, one(as_batch(tasks, self.model), 0))
            seen: list[Seen] = []
            with normalising(record=seen):
                adapted = problem.start
                for adapted, _ in islice(problem.path(first_order=True), self.inner_steps):
                    pass
                problem.query(adapted)
            move(self.model, met(self.model, seen), momentum)

    @torch.no_grad()
    def carry_moments(self, tasks: Batch) -> None:
        """Keep, for the next tasks, the second moments with which a carried `Adam` ends the first of `tasks`, before an
        outer step. `train` does so with what the meta-gradient has found of them: `moments.take_over(found.moments)`.
        """
        with turn_of(self.model):
            if not self.moments.names:
                return
            problem = Problem(self, one(as_batch(tasks, self.model), 0))
            for _ in islice(problem.path(first_order=True), self.inner_steps):
                pass
            self.moments.take_over(self.moments.ended(problem.state))


def _finite(values: Tensor) -> bool:
    """Whether all are finite numbers."""
    # one pass where the sum is: nothing that is not finite has a finite one
    return cmath.isfinite(values.sum().item()) or bool(values.isfinite().all())


def checked(problem: Problem) -> Problem:
    """The problem, whose support set may be taken in parts if it is to be."""
    problem.check_parts()
    return problem


def select(names: list[str], globs: str | Sequence[str]) -> list[str]:
    """The names that match one of the globs, in their order.

    Raises:
        InputError: a glob that matches none of the names.
    """
    globs = [globs] if isinstance(globs, str) else list(globs)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise InputError(
                f"no parameter that requires gradients matches {glob!r}; there are: {', '.join(names) or 'none'}"
            )
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
