"""The inner problem of one task, or of a stack of tasks: start, support losses, path and query loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fomaml.choices import Statistics, check_choice
from fomaml.errors import InputError
from fomaml.learning.adapt import inner_loop, open_attention
from fomaml.learning.contracts import Adapted, Learner
from fomaml.learning.mistakes import (
    as_numbers,
    checked_loss,
    checked_outputs,
    refuse_broadcast,
    refuse_meaningless,
    unlike,
)
from fomaml.learning.replica import Replicas, buffers_of
from fomaml.metrics import ignored_label
from fomaml.models import normalising, refuse_native
from fomaml.tasks import Examples, Task, ways_each


class Problem:
    """The inner problem of one task, or, `stacked`, of a stack of tasks with a leading axis on everything.

    start: φ₀ by name, differentiable functions of the meta-parameters; (tasks, ...) each if stacked.
    steps, first_order, iteration: the learner's.
    evaluating: use running statistics where the batch norms have them.
    ways: the number of classes of the task, where a start needs it; by default the largest label and one, or the number
        of probabilities.
    watched: see `Replicas`; of a stack nothing can be seen.
    """

    def __init__(
        self,
        learner: Learner,
        task: Task,
        stacked: bool = False,
        evaluating: bool = False,
        ways: int | None = None,
        watched: bool = True,
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
        self.replicas = Replicas(
            learner.model,
            learner.criterion,
            evaluating=evaluating,
            open=stacked or self._differentiates_twice,
            watched=watched and not stacked,  # vmap does not tell what depends on what
        )
        learned = set(learner.meta_learned)
        _check_parameters(learner)
        own = {n: p if n in learned else p.detach() for n, p in learner.model.named_parameters()}
        own_buffers = dict(learner.model.named_buffers()) | buffers_of(learner.criterion)
        self.buffers = {name: buffer.clone() for name, buffer in own_buffers.items()}
        self.meta = dict(own)
        self.start: Adapted = {name: own.pop(name) for name in learner.adapted}
        self.fixed = own
        if stacked:
            tasks = task.support.targets.shape[0]
            self.start = {n: p.expand(tasks, *p.shape) for n, p in self.start.items()}
            self.buffers = {n: b.expand(tasks, *b.shape).clone() for n, b in self.buffers.items()}
        if learner.start is not None:
            self.start = learner.start(self.start, self)

    @property
    def ways(self) -> int:
        targets = self.task.support.targets
        axis = 1 + int(self.stacked)
        if self._ways is not None:
            return self._ways
        if not targets.is_floating_point():
            ignored = ignored_label(self.learner.criterion)
            return max(ways_each(targets if self.stacked else targets[None], ignored))
        if targets.dim() <= axis:
            raise InputError(
                "the number of classes comes from labels, or from probabilities (examples, classes), got "
                f"{targets.dtype} targets of shape {tuple(targets.shape)}"
            )
        return targets.shape[axis]  # probabilities of classes

    def path(
        self, first_order: bool | None = None, state: Mapping[str, dict] | None = None
    ) -> Iterator[tuple[Adapted, Tensor]]:
        """(φₖ₊₁, support losses at φₖ) for k = 0, 1, …, without end. state: the inner optimiser's, see `inner_loop`."""
        return inner_loop(
            self.support_losses,
            self.start,
            self.learner.inner_lr,
            optimizer=self.learner.optimizer,
            first_order=self.first_order if first_order is None else first_order,
            state=self.learner.moments.state(self.start) if state is None else state,
            stacked=self.stacked,
        )

    def support_losses(
        self, adapted: Mapping[str, Tensor], constant: bool, step: int, proximal: bool = True
    ) -> Tensor:
        """The losses of inner step `step` at φ: () or (tasks,). constant: differentiate by φ alone.

        proximal: with the term λ/2 ‖φ - θ‖² where the objective has one.
        """
        examples = minibatch(self.task.support, self.learner.inner_batch_size, step, self.stacked)
        fixed = {n: p.detach() for n, p in self.fixed.items()} if constant else self.fixed
        losses = self._losses(adapted, fixed, examples, step=step)[0]
        strength = self.learner.objective.proximal
        if strength and proximal:
            lead = int(self.stacked)
            for name, value in adapted.items():
                far = (value - self.start[name].detach()).square()
                losses = losses + strength / 2 * (far.flatten(lead).sum(-1) if far.dim() > lead else far)
        return losses

    def query(
        self,
        adapted: Adapted,
        statistics: Statistics = "own",
        step: int | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses () or (tasks,) and outputs on the query set at φ.

        statistics: whose examples batch norms normalise by: "own", as their policies say; "support", the support
            set, so that query examples do not inform each other; "with-query", the support set and the one query
            example at hand.
        step: the number of steps that led to φ, by default K.
        buffers: the model's, which it may write into; by default those that the inner steps have.
        """
        step = self.steps if step is None else step
        return self._losses(
            adapted,
            self.fixed,
            self.task.query,
            self._support_for(statistics),
            step,
            statistics == "with-query",
            buffers,
        )

    def outputs(self, adapted: Adapted) -> Tensor:
        """The outputs on the query set of one task at φ, no criterion asked."""
        parameters = {**self.fixed, **adapted}
        with self.replicas.holding(parameters, dict(self.buffers)) as (model, _), self._attention():
            return self._outputs(model, self.task.query.inputs, self._support_for("own"), step=0)

    def _support_for(self, statistics: Statistics) -> Tensor | None:
        check_choice("statistics", statistics, Statistics)
        if statistics == "own" and not self.learner.uses_support_statistics():
            return None
        if statistics != "with-query":
            refuse_native(self.learner.model)
        return self.task.support.inputs

    def support_features(self, module: str) -> Tensor:
        """What goes into a module, by name, for the support examples at θ: (..., examples, features)."""
        caught: list[Tensor] = []

        def one_task(buffers, inputs):
            given = dict(buffers)
            with self.replicas.holding(self.meta, buffers) as (model, _):
                model(inputs)
            return caught.pop(), _assigned(given, buffers)

        with self.learner.model.get_submodule(module).register_forward_pre_hook(
            lambda _, args: caught.append(args[0])
        ):
            run = torch.func.vmap(one_task, randomness="different") if self.stacked else one_task
            with self._attention():
                features, assigned = run(self.buffers, self.task.support.inputs)
        self.buffers.update(assigned)
        return features

    def _losses(
        self, adapted, fixed, examples, support=None, step=0, apart=False, buffers=None
    ) -> tuple[Tensor, Tensor]:
        def one_task(adapted, buffers, examples, support):
            parameters = {**fixed, **adapted}
            return self._judged(parameters, buffers, examples, support, step, apart)

        buffers = self.buffers if buffers is None else buffers
        arguments = (dict(adapted), buffers, examples, support)
        axes = (0, 0, 0, None if support is None else 0)
        with self._attention():
            if not self.stacked:
                loss, outputs, _ = one_task(*arguments)
            else:
                loss, outputs, assigned = torch.func.vmap(one_task, axes, randomness="different")(*arguments)
                buffers.update(assigned)
        return loss, outputs

    def _judged(self, parameters, buffers, examples, support, step, apart) -> tuple[Tensor, Tensor, dict]:
        """The loss and the outputs of one task, and the buffers that the forward pass has assigned."""
        given = dict(buffers)
        with self.replicas.holding(parameters, buffers) as (model, own_criterion):
            outputs = self._outputs(model, examples.inputs, support, step, apart)
            criterion = self.learner.criterion
            targets = as_numbers(criterion, outputs, examples.targets)
            if not self.stacked:
                refuse_meaningless(criterion, outputs, targets)
                refuse_broadcast(criterion, outputs, targets)
            loss = checked_loss(own_criterion(outputs, targets))
        return loss, outputs, _assigned(given, buffers)

    @property
    def _differentiates_twice(self) -> bool:
        return not self.first_order or self.learner.objective.differentiates_twice

    def _attention(self):
        """Attention written out, where it is differentiated twice or under vmap; as it is elsewhere."""
        twice = self._differentiates_twice
        if not (self.stacked or twice):
            return nullcontext()
        on_cpu = self.task.support.inputs.device.type == "cpu"
        return open_attention(everywhere=twice or on_cpu)

    def _outputs(self, model, inputs, support, step, apart=False) -> Tensor:
        """The outputs for the inputs of one task, batch norms told what they need to know.

        model: the forward pass. apart: one input at a time, each in a batch with the support set.
        """

        def run(inputs, first=None):
            told = normalising(first=first, step=step, running=self.evaluating or None)
            with told, Stacked() if self.stacked else nullcontext():
                try:
                    return checked_outputs(model(inputs))
                except RuntimeError as error:
                    reason = unlike(error, self.learner.model, inputs)
                    if reason is None:
                        raise
                    raise InputError(reason) from error

        if support is None:
            return run(inputs)
        if apart:
            return torch.cat([run(torch.cat([support, own]))[-1:] for own in inputs.split(1)])
        first = len(support)
        return run(torch.cat([support, inputs]), first)[first:]


def _assigned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that are other tensors now. vmap gives back what its function returns, and no more."""
    return {name: buffer for name, buffer in after.items() if buffer is not before.get(name)}


def _check_parameters(learner: Learner) -> None:
    """Raise `InputError` where the model's parameters are others than when the learner was made."""
    own = {name: p.requires_grad for name, p in learner.model.named_parameters()}
    late = [name for name, learns in own.items() if learns and name not in learner.trainable]
    gone = [name for name in learner.adapted if name not in own]
    if late or gone:
        what = f"{late[0]} was frozen or not there" if late else f"{gone[0]} is no longer there, as it was"
        raise InputError(f"the parameter {what} when the learner was made: make a new learner")


class Stacked(TorchFunctionMode):
    """Within it, functions whose batching rule (torch 2.14) is wrong or slow are called so that vmap does well.

    `F.embedding` puts the tables of all tasks one below the other and knows the `padding_idx` of the first alone: in
    all other tasks the padding learned (meta-gradients 6 % off and more, without an error). `F.linear` of inputs that
    are not contiguous, as attention's are, copies the weight once for each token.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is Tensor.register_hook:
            raise InputError("a hook of the backward pass, which does not run under vmap: engine='loop'")
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
