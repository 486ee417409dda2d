"""The family of gradient-based meta-learners, each a composition of independent choices.

A `MetaLearner` is: which parameters adapt and how fast, the inner optimiser, whether the inner
gradient is held constant, and what a task contributes to the meta-loss. The presets below it name
the published combinations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fomaml.adapt import SGD, inner_loop, load
from fomaml.errors import InputError, positive
from fomaml.models import statistics_from
from fomaml.objectives import Displacement, Outcome, QueryLoss
from fomaml.tasks import Examples, Task, count, one

Criterion = Callable[[Tensor, Tensor], Tensor]


class MetaLearner(nn.Module):
    """A module together with the way it learns a task.

    Arguments:
        model: any module of one input and one output tensor. It is held, not copied: meta-training
            moves its own parameters. Parameters with `requires_grad=False` never change.
        inner_lr: the step size α, one number, or numbers by glob over parameter names
            (`{"head.*": 0.4, "*": 0.01}`, the first match counts).
        inner_steps: K, the number of inner steps in training; evaluation may take another number.
        criterion: (outputs, targets) → the mean loss, a scalar tensor.
        adapted: globs over parameter names, one or several; the parameters that adapt. All others
            are used as they are, and are meta-learned all the same.
        first_order: hold the inner gradients constant (Finn et al. 2017, section 5.2).
        optimizer: the inner optimiser, `SGD`, `Adam` or `Sign`, its state fresh for each task.
        objective: what a task contributes to the meta-loss, see objectives.py.
        inner_batch_size: take each inner step on a mini-batch of the support set: step k uses the
            examples i with i ≡ k modulo the number of mini-batches. Episodes order their examples by
            class, so a mini-batch is as balanced as it can be. None: the whole support set.

    Raises:
        InputError: step sizes or counts that are not positive, or globs that match nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        inner_lr: float | Mapping[str, float],
        inner_steps: int,
        criterion: Criterion = F.cross_entropy,
        adapted: str | list[str] | tuple[str, ...] = "*",
        first_order: bool = True,
        optimizer=SGD(),  # noqa: B008 - frozen
        objective: Callable[[Problem], Outcome] = QueryLoss(),  # noqa: B008 - frozen
        inner_batch_size: int | None = None,
    ):
        super().__init__()
        self.model = model
        self.inner_steps = positive("inner_steps", inner_steps, integer=True)
        self.criterion = criterion
        self.first_order = first_order
        self.optimizer = optimizer
        self.objective = objective
        if inner_batch_size is not None:
            positive("inner_batch_size", inner_batch_size, integer=True)
        self.inner_batch_size = inner_batch_size
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        self.adapted = select(names, adapted)
        self.inner_lr = inner_lr
        self.step_sizes = step_sizes(self.adapted, inner_lr)

    def rates(self, step: int) -> Mapping[str, float | Tensor]:
        """The step size of each adapted parameter at inner step `step`, from 0."""
        return self.step_sizes

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer loop learns, by name: the model's parameters that require gradients."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, tasks: Task) -> Tensor:
        """The meta-loss of a batch of tasks, a scalar to call `backward()` on, one task after the other.

        tasks: tensors of shape (tasks, examples, ...). `fomaml.engines.meta_gradient` computes the
        same gradient with less memory and, mostly, faster.
        """
        n = count(tasks)
        return sum(self.objective(Problem(self, one(tasks, i))).scalar for i in range(n)) / n

    def adapt(self, support: Examples, steps: int | None = None) -> nn.Module:
        """Adapt to one task; returns an ordinary, independent module in the model's own mode.

        support: inputs (examples, ...) and targets (examples, ...). steps: by default `inner_steps`;
        0 returns a copy of the meta-model.
        """
        steps = self.inner_steps if steps is None else steps
        problem = Problem(self, Task(support, support))
        adapted = problem.start
        for adapted, _ in islice(problem.path(first_order=True), steps):
            pass
        return load(copy.deepcopy(self.model), adapted)


class Problem:
    """The inner problem of one task, or, `stacked`, of a stack of tasks with a leading axis on everything.

    start: φ₀ by name, differentiable functions of the meta-parameters; (tasks, ...) each if stacked.
    steps, first_order: the learner's.
    """

    def __init__(self, learner: MetaLearner, task: Task, stacked: bool = False):
        self.learner = learner
        self.task = task
        self.stacked = stacked
        self.steps = learner.inner_steps
        self.first_order = learner.first_order
        own = dict(learner.model.named_parameters())
        self.start = {name: own.pop(name) for name in learner.adapted}
        self.fixed = own
        self.buffers = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
        if stacked:
            tasks = task.support.targets.shape[0]
            self.start = {n: p.expand(tasks, *p.shape) for n, p in self.start.items()}
            self.buffers = {n: b.expand(tasks, *b.shape).clone() for n, b in self.buffers.items()}

    def path(self, first_order: bool | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(φₖ₊₁, support losses at φₖ) for k = 0, 1, …, without end."""
        return inner_loop(
            self.support_losses,
            self.start,
            self.learner.rates,
            optimizer=self.learner.optimizer,
            first_order=self.first_order if first_order is None else first_order,
        )

    def support_losses(self, adapted: Mapping[str, Tensor], constant: bool, step: int) -> Tensor:
        """The losses of inner step `step` at φ: () or (tasks,)."""
        examples = minibatch(self.task.support, self.learner.inner_batch_size, step, self.stacked)
        fixed = {n: p.detach() for n, p in self.fixed.items()} if constant else self.fixed
        return self._losses(adapted, fixed, examples)[0]

    def query(self, adapted: Mapping[str, Tensor], inductive: bool = False) -> tuple[Tensor, Tensor]:
        """Losses () or (tasks,) and outputs on the query set at φ.

        inductive: take the statistics of `BatchNorm` from the support set, so that query examples do
        not inform each other.
        """
        support = self.task.support.inputs if inductive else None
        return self._losses(adapted, self.fixed, self.task.query, support)

    def _losses(self, adapted, fixed, examples, support=None) -> tuple[Tensor, Tensor]:
        model, criterion = self.learner.model, self.learner.criterion

        def one_task(adapted, buffers, examples, support):
            inputs, targets = examples
            state = ({**fixed, **adapted}, buffers)
            if support is None:
                outputs = functional_call(model, state, (inputs,))
            else:
                with statistics_from(len(support)):
                    outputs = functional_call(model, state, (torch.cat([support, inputs]),))
                outputs = outputs[len(support) :]
            return criterion(outputs, targets), outputs

        arguments = (dict(adapted), self.buffers, examples, support)
        if not self.stacked:
            return one_task(*arguments)
        axes = (0, 0, 0, None if support is None else 0)
        return torch.func.vmap(one_task, axes, randomness="different")(*arguments)


def minibatch(examples: Examples, size: int | None, step: int, stacked: bool) -> Examples:
    """The mini-batch of inner step `step`: every m-th example from the (step mod m)-th on, m = ⌈n / size⌉."""
    axis = int(stacked)
    number = examples.targets.shape[axis]
    if size is None or size >= number:
        return examples
    batches = -(-number // size)
    rows = (slice(None),) * axis + (slice(step % batches, None, batches),)
    return Examples(*(tensor[rows] for tensor in examples))


def select(names: list[str], globs: str | list[str] | tuple[str, ...]) -> list[str]:
    """The names that match one of the globs, in their order.

    Raises:
        InputError: a glob that matches none of the names, or no names at all.
    """
    globs = [globs] if isinstance(globs, str) else list(globs)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise InputError(
                f"no parameter that requires gradients matches {glob!r}; there are: {', '.join(names) or 'none'}"
            )
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


def step_sizes(names: list[str], inner_lr: float | Mapping[str, float]) -> dict[str, float]:
    """One positive step size per name, out of one number or of numbers by glob."""
    if not isinstance(inner_lr, Mapping):
        return dict.fromkeys(names, positive("inner_lr", inner_lr))
    rates = {}
    for name in names:
        matches = [rate for glob, rate in inner_lr.items() if fnmatchcase(name, glob)]
        if not matches:
            raise InputError(f"inner_lr names no step size for {name!r}; add '*' for all others")
        rates[name] = positive(f"inner_lr of {name}", matches[0])
    return rates


def FOMAML(
    model: nn.Module,
    inner_lr: float,
    inner_steps: int,
    criterion: Criterion = F.cross_entropy,
    **choices,
) -> MetaLearner:
    """First-order MAML: the query gradient at φ_K, second derivatives dropped (Finn et al. 2017, section 5.2)."""
    return MetaLearner(model, inner_lr=inner_lr, inner_steps=inner_steps, criterion=criterion, **choices)


def MAML(
    model: nn.Module,
    inner_lr: float,
    inner_steps: int,
    criterion: Criterion = F.cross_entropy,
    **choices,
) -> MetaLearner:
    """Second-order MAML: differentiates through the inner steps (Finn et al. 2017, algorithm 1)."""
    return MetaLearner(
        model,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        criterion=criterion,
        first_order=False,
        **choices,
    )


def Reptile(
    model: nn.Module,
    inner_lr: float,
    inner_steps: int,
    criterion: Criterion = F.cross_entropy,
    **choices,
) -> MetaLearner:
    """Reptile: the meta-gradient is θ - φ_K; meta_lr is then the paper's ε (Nichol et al. 2018, algorithm 2)."""
    return MetaLearner(
        model,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        criterion=criterion,
        objective=Displacement(),
        **choices,
    )
