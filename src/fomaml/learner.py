"""A module together with the way it learns a task, and the inner problem that follows from the two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fomaml import rates
from fomaml.adapt import SGD, call, inner_loop, load, open_attention
from fomaml.errors import InputError, positive
from fomaml.models import BatchNorm, normalising, refuse_native
from fomaml.moments import SecondMoments
from fomaml.objectives import Outcome, QueryLoss
from fomaml.tasks import Examples, Task, count, one

WITH_QUERY = "with-query"
# The values of `inductive` by the name of the batch statistics.
INDUCTIVE = {"own": False, "inductive": True, WITH_QUERY: WITH_QUERY}
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
        frozen: globs; parameters that neither adapt nor are meta-learned.
        first_order: hold the inner gradients constant (Finn et al. 2017, section 5.2), always or never,
            or as a function of the outer iteration.
        learn_rates: None, "elementwise" (Meta-SGD) or "per-step" (one rate per tensor and inner step):
            inner_lr is then where the step sizes start, and they are meta-learned.
        optimizer: the inner optimiser, `SGD`, `Adam` or `Sign`, its state fresh for each task but for what
            `Adam(carried=True)` carries on, which the learner holds as buffers, see `carry_moments`.
        objective: what a task contributes to the meta-loss, see objectives.py.
        start: where adaptation starts, if not at θ, see heads.py.
        inner_batch_size: take each inner step on a mini-batch of the support set: step k uses the
            examples i with i ≡ k modulo the number of mini-batches. Episodes order their examples by
            class, so a mini-batch is as balanced as it can be. None: the whole support set.

    Attributes:
        iteration: the outer iteration, from 0, which `train` sets; schedules read it.

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
        adapted: str | Sequence[str] = "*",
        frozen: str | Sequence[str] = (),
        first_order: bool | Callable[[int], bool] = True,
        learn_rates: str | None = None,
        optimizer=SGD(),  # noqa: B008 - frozen
        objective: Callable[[Problem], Outcome] = QueryLoss(),  # noqa: B008 - frozen
        start: Callable[[dict[str, Tensor], Problem], dict[str, Tensor]] | None = None,
        inner_batch_size: int | None = None,
    ):
        super().__init__()
        self.model = model
        self.inner_steps = positive("inner_steps", inner_steps, integer=True)
        self.criterion = criterion
        self.first_order = first_order
        self.optimizer = optimizer
        self.objective = objective
        self.start = start
        if inner_batch_size is not None:
            positive("inner_batch_size", inner_batch_size, integer=True)
        self.inner_batch_size = inner_batch_size
        self.iteration = 0
        own = dict(model.named_parameters())
        trainable = [name for name, parameter in own.items() if parameter.requires_grad]
        excluded = select(trainable, frozen)
        self.meta_learned = [name for name in trainable if name not in excluded]
        self.adapted = [name for name in select(trainable, adapted) if name not in excluded]
        sizes = rates.by_name(self.adapted, inner_lr)
        if learn_rates is None:
            self.inner_lr = rates.ConstantRates(sizes)
        elif learn_rates in ("elementwise", "per-step"):
            elementwise = learn_rates == "elementwise"
            self.inner_lr = rates.LearnedRates(
                {name: own[name] for name in self.adapted},
                sizes,
                elementwise=elementwise,
                steps=None if elementwise else inner_steps,
            )
        else:
            raise InputError(f"unknown learn_rates {learn_rates!r}; there are: None, elementwise, per-step")
        carried = self.adapted if getattr(optimizer, "carried", False) else []
        if carried and start is not None:
            raise InputError("a carried Adam has its moments by θ: it does not go with another start")
        self.moments = SecondMoments({name: own[name] for name in carried})
        if first_order is not True and not optimizer.second_order:
            raise InputError(
                f"the inner optimiser {type(optimizer).__name__} is first order only; "
                "use SGD inside, or first_order=True"
            )

    def meta_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer loop learns: the model's parameters by name, and learned rates as "inner_lr.NAME"."""
        own = dict(self.model.named_parameters())
        learned = {f"inner_lr.{name}": rate for name, rate in self.inner_lr.learned().items()}
        return {name: own[name] for name in self.meta_learned} | learned

    def forward(self, tasks: Task) -> Tensor:
        """The meta-loss of a batch of tasks, a scalar to call `backward()` on, one task after the other.

        tasks: tensors of shape (tasks, examples, ...). `fomaml.meta_gradient` computes the same gradient
        with less memory and, mostly, faster.
        """
        n = count(tasks)
        return sum(self.objective(Problem(self, one(tasks, i))).scalar for i in range(n)) / n

    def adapt(self, support: Examples, steps: int | None = None, inductive: bool = False) -> nn.Module:
        """Adapt to one task; returns an ordinary, independent module in the model's own mode.

        support: inputs (examples, ...) and targets (examples, ...). steps: by default `inner_steps`;
        0 returns a copy of the starting point. inductive: freeze every `BatchNorm` of the returned
        module at the statistics of the support set, so that it can serve single examples; always so
        for those with the policies "support".
        """
        steps = self.inner_steps if steps is None else steps
        problem = Problem(self, Task(support, support), evaluating=True)
        adapted = problem.start
        for adapted, _ in islice(problem.path(first_order=True), steps):
            pass
        module = load(copy.deepcopy(self.model), adapted)
        if inductive or self.uses_support_statistics():
            refuse_native(module)
            with torch.no_grad(), normalising(record=[]) as seen:
                module(support.inputs)
            for layer, _, mean, variance in seen:
                layer.freeze(mean, variance)
        return module

    def uses_support_statistics(self) -> bool:
        """Whether a `BatchNorm` of the model has the policy "support"."""
        return any(m.statistics == "support" for m in self.model.modules() if isinstance(m, BatchNorm))

    @torch.no_grad()
    def update_statistics(self, tasks: Task, momentum: float = 0.1) -> None:
        """Move the running statistics of "running" and "per-step" `BatchNorm` layers towards those of the
        batches that the first of `tasks` meets on its way from θ to φ_K; the outer loop calls it once a step.
        """
        layers = [m for m in self.model.modules() if isinstance(m, BatchNorm)]
        if not any(layer.statistics in ("running", "per-step") for layer in layers):
            return
        problem = Problem(self, one(tasks, 0))
        with normalising(record=[]) as seen:
            adapted = problem.start
            for adapted, _ in islice(problem.path(first_order=True), self.inner_steps):
                pass
            problem.query(adapted)
        for layer, step, mean, variance in seen:
            layer.update(step, mean, variance, momentum)

    @torch.no_grad()
    def carry_moments(self, tasks: Task) -> None:
        """Keep, for the next tasks, the second moments with which a carried `Adam` ends the first of `tasks`; the outer
        loop calls it before each of its steps.
        """
        if not self.moments.names:
            return
        problem = Problem(self, one(tasks, 0))
        state = self.moments.state(problem.start)
        for _ in islice(problem.path(first_order=True, state=state), self.inner_steps):
            pass
        self.moments.keep(state)


class Problem:
    """The inner problem of one task, or, `stacked`, of a stack of tasks with a leading axis on everything.

    start: φ₀ by name, differentiable functions of the meta-parameters; (tasks, ...) each if stacked.
    steps, first_order, iteration: the learner's.
    evaluating: use running statistics where the batch norms have them.
    ways: the number of classes of the task, where a start needs it; by default the largest label and one.
    """

    def __init__(
        self,
        learner: MetaLearner,
        task: Task,
        stacked: bool = False,
        evaluating: bool = False,
        ways: int | None = None,
    ):
        self.learner = learner
        self.task = task
        self._ways = ways
        self.stacked = stacked
        self.evaluating = evaluating
        self.steps = learner.inner_steps
        self.iteration = learner.iteration
        choice = learner.first_order
        self.first_order = choice(learner.iteration) if callable(choice) else choice
        learned = set(learner.meta_learned)
        own = {n: p if n in learned else p.detach() for n, p in learner.model.named_parameters()}
        self.buffers = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
        self.meta = dict(own)
        self.start = {name: own.pop(name) for name in learner.adapted}
        self.fixed = own
        if stacked:
            tasks = task.support.targets.shape[0]
            self.start = {n: p.expand(tasks, *p.shape) for n, p in self.start.items()}
            self.buffers = {n: b.expand(tasks, *b.shape).clone() for n, b in self.buffers.items()}
        if learner.start is not None:
            self.start = learner.start(self.start, self)

    @property
    def ways(self) -> int:
        return int(self.task.support.targets.max()) + 1 if self._ways is None else self._ways

    def path(
        self, first_order: bool | None = None, state: Mapping[str, dict] | None = None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(φₖ₊₁, support losses at φₖ) for k = 0, 1, …, without end. state: the inner optimiser's, see `inner_loop`."""
        return inner_loop(
            self.support_losses,
            self.start,
            self.learner.inner_lr,
            optimizer=self.learner.optimizer,
            first_order=self.first_order if first_order is None else first_order,
            state=self.learner.moments.state(self.start) if state is None else state,
        )

    def support_losses(
        self, adapted: Mapping[str, Tensor], constant: bool, step: int, proximal: bool = True
    ) -> Tensor:
        """The losses of inner step `step` at φ: () or (tasks,). constant: differentiate by φ alone.

        proximal: with the term λ/2 ‖φ - θ‖² where the objective has a strength λ.
        """
        examples = minibatch(self.task.support, self.learner.inner_batch_size, step, self.stacked)
        fixed = {n: p.detach() for n, p in self.fixed.items()} if constant else self.fixed
        losses = self._losses(adapted, fixed, examples, step=step)[0]
        strength = getattr(self.learner.objective, "strength", 0.0)
        if strength and proximal:
            lead = int(self.stacked)
            for name, value in adapted.items():
                far = (value - self.start[name].detach()).square()
                losses = losses + strength / 2 * (far.flatten(lead).sum(-1) if far.dim() > lead else far)
        return losses

    def query(
        self, adapted: Mapping[str, Tensor], inductive: bool | str = False, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses () or (tasks,) and outputs on the query set at φ.

        inductive: query examples do not inform each other: `BatchNorm` takes batch statistics from the support set
        or, `WITH_QUERY`, all batch norms take them from the support set and the one query example at hand.
        step: the number of steps that led to φ, by default K.
        """
        step = self.steps if step is None else step
        return self._losses(
            adapted, self.fixed, self.task.query, self._support_for(inductive), step, inductive == WITH_QUERY
        )

    def _support_for(self, inductive: bool | str) -> Tensor | None:
        if inductive not in INDUCTIVE.values():
            there = ", ".join(map(repr, INDUCTIVE.values()))
            raise InputError(f"unknown inductive={inductive!r}; there are: {there}")
        if not (inductive or self.learner.uses_support_statistics()):
            return None
        if inductive != WITH_QUERY:
            refuse_native(self.learner.model)
        return self.task.support.inputs

    def support_features(self, module: str) -> Tensor:
        """What goes into a module, by name, for the support examples at θ: (..., examples, features)."""
        model, caught = self.learner.model, []

        def one_task(buffers, inputs):
            call(model, (self.meta, buffers), (inputs,))
            return caught.pop()

        with model.get_submodule(module).register_forward_pre_hook(lambda _, args: caught.append(args[0])):
            run = torch.func.vmap(one_task, randomness="different") if self.stacked else one_task
            with self._attention():
                return run(self.buffers, self.task.support.inputs)

    def _losses(self, adapted, fixed, examples, support=None, step=0, apart=False) -> tuple[Tensor, Tensor]:
        def one_task(adapted, buffers, examples, support):
            outputs = self._outputs({**fixed, **adapted}, buffers, examples.inputs, support, step, apart)
            return self.learner.criterion(outputs, examples.targets), outputs

        arguments = (dict(adapted), self.buffers, examples, support)
        axes = (0, 0, 0, None if support is None else 0)
        with self._attention():
            if not self.stacked:
                return one_task(*arguments)
            return torch.func.vmap(one_task, axes, randomness="different")(*arguments)

    def _attention(self):
        """Attention written out, where it is differentiated twice or under vmap; as it is elsewhere."""
        twice = not self.first_order or getattr(self.learner.objective, "differentiates_twice", False)
        if not (self.stacked or twice):
            return nullcontext()
        on_cpu = self.task.support.inputs.device.type == "cpu"
        return open_attention(everywhere=twice or on_cpu)

    def _outputs(self, parameters, buffers, inputs, support, step, apart=False) -> Tensor:
        """The model's outputs for the inputs of one task, batch norms told what they need to know.

        apart: one input at a time, each in a batch with the support set.
        """

        def run(inputs, first=None):
            told = normalising(first=first, step=step, running=self.evaluating or None)
            with told, Stacked() if self.stacked else nullcontext():
                return call(self.learner.model, (parameters, buffers), (inputs,))

        if support is None:
            return run(inputs)
        if apart:
            return torch.cat([run(torch.cat([support, own]))[-1:] for own in inputs.split(1)])
        first = len(support)
        return run(torch.cat([support, inputs]), first)[first:]


class Stacked(TorchFunctionMode):
    """Within it, functions whose batching rule (torch 2.14) is wrong or slow are called so that vmap does well.

    `F.embedding` puts the tables of all tasks one below the other and knows the `padding_idx` of the first alone: in
    all other tasks the padding learned (meta-gradients 6 % off and more, without an error). `F.linear` of inputs that
    are not contiguous, as attention's are, copies the weight once for each token.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {F.linear: 1, F.multi_head_attention_forward: 3}.get(function, 0)
        if inputs:
            # query, key and value may be one tensor, and are to stay one
            once = {id(tensor): tensor.contiguous() for tensor in args[:inputs]}
            args = (*(once[id(tensor)] for tensor in args[:inputs]), *args[inputs:])
        elif function is F.embedding:
            weight, index = args[1], kwargs.pop("padding_idx")  # as F.embedding hands them over
            if index is not None:
                padding = torch.arange(len(weight), device=weight.device)[:, None] == index % len(weight)
                args = (args[0], torch.where(padding, weight.detach(), weight))
        return function(*args, **kwargs)


def minibatch(examples: Examples, size: int | None, step: int, stacked: bool) -> Examples:
    """The mini-batch of inner step `step`: every m-th example from the (step mod m)-th on, m = ⌈n / size⌉."""
    axis = int(stacked)
    number = examples.targets.shape[axis]
    if size is None or size >= number:
        return examples
    batches = -(-number // size)
    rows = (slice(None),) * axis + (slice(step % batches, None, batches),)
    return Examples(*(tensor[rows] for tensor in examples))


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
