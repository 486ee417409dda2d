"""The inner problem of one task, or of a stack of tasks: start, support losses, path and query loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fomaml.choices import Statistics, check_choice
from fomaml.errors import InputError
from fomaml.learning.adapt import inner_loop, open_attention
from fomaml.learning.admission import calls_refused, check_parameters
from fomaml.learning.contracts import Adapted, Learner, buffers_of
from fomaml.learning.forward import Forward, Stacked, outputs_of
from fomaml.learning.mistakes import checked_loss, refuse_third_order, refuse_unlike, targets_for
from fomaml.learning.parts import check_mean, counted, minibatch, parts_of, spread, summed
from fomaml.learning.repeated import again
from fomaml.learning.replica import Replicas
from fomaml.learning.statistics import Met, met
from fomaml.metrics import ignored_label
from fomaml.models import NATIVE_BATCH_NORMS, BatchNorm, Seen, normalising, refuse_native, takes_statistics
from fomaml.tasks import Examples, Task, are_labels, count_of, ways_each
from fomaml.tasks import first as first_of
from fomaml.trees import Tree, call, joined, leaves, mapped, rebuilt


class Problem:
    """The inner problem of one task, or, `stacked`, of a stack of tasks with a leading axis on everything.

    start: φ₀ by name, differentiable functions of the meta-parameters; (tasks, ...) each if stacked.
    steps, first_order, iteration: the learner's. state: of the inner optimiser, as the last path has left it.
    met: where it is asked for, and is no longer None, the statistics of the batches on the way from θ to φ_K.
    evaluating: use running statistics where the batch norms have them.
    ways: the number of classes of the task, where a start needs it; by default the largest label and one, or the number
        of probabilities.
    watched: see `Replicas`; of a stack nothing can be seen.
    measured: of a learner with a `loss`, compute the outputs for the inputs too, which the loss may never do; they are
        the empty nesting () else.
    """

    def __init__(
        self,
        learner: Learner,
        task: Task,
        stacked: bool = False,
        evaluating: bool = False,
        ways: int | None = None,
        watched: bool = True,
        measured: bool = False,
    ):
        self.learner = learner
        self._measured = measured
        self._judge = learner.criterion if learner.loss is None else learner.loss
        self.task = task
        self._ways = ways
        self.state: Mapping[str, dict] = {}
        self.met: dict | None = None
        self.stacked = stacked
        self.evaluating = evaluating
        self.steps = learner.inner_steps
        self.iteration = learner.iteration
        choice = learner.first_order
        self.first_order = choice(learner.iteration) if callable(choice) else choice
        self.replicas = Replicas(
            learner.model,
            self._judge,
            evaluating=evaluating,
            open=stacked or self._differentiates_twice,
            watched=watched and not stacked,  # vmap does not tell what depends on what
        )
        learned = set(learner.meta_learned)
        parameters = self.replicas.parameters
        check_parameters(parameters, learner.trainable, learner.adapted)
        own = {n: p if n in learned else p.detach() for n, p in parameters.items()}
        own_buffers = self.replicas.buffers | buffers_of(self._judge)
        self.buffers = {name: buffer.clone() for name, buffer in own_buffers.items()}
        self.meta = dict(own)
        self.start: Adapted = {name: own.pop(name) for name in learner.adapted}
        self.fixed = own
        if stacked:
            tasks = count_of(task.support)
            self.start = {n: p.expand(tasks, *p.shape) for n, p in self.start.items()}
            self.buffers = {n: b.expand(tasks, *b.shape).clone() for n, b in self.buffers.items()}
        if learner.start is not None:
            made, own = learner.start(self.start, self), self.start
            # what a forward pass under autocast gives is too coarse to take small steps from
            self.start = {n: p.to(own[n].dtype) if n in own else p for n, p in made.items()}
        twice = not self.first_order or learner.objective.differentiates_twice
        if learner.loss is not None and twice and not evaluating:
            refuse_third_order(learner.model)

    @property
    def ways(self) -> int:
        targets = self.task.support.targets
        axis = 1 + int(self.stacked)
        if self._ways is not None:
            return self._ways
        if are_labels(targets):
            ignored = ignored_label(self.learner.criterion)
            return max(ways_each(targets if self.stacked else targets[None], ignored))
        if not isinstance(targets, Tensor) or targets.dim() <= axis:
            what = " and ".join(f"{t.dtype} targets of shape {tuple(t.shape)}" for t in leaves(targets))
            raise InputError(
                "the number of classes comes from labels, or from probabilities (examples, classes), got "
                f"{what or 'no targets'}"
            )
        return targets.shape[axis]  # probabilities of classes

    def path(
        self,
        first_order: bool | None = None,
        overwrite: bool = False,
    ) -> Iterator[tuple[Adapted, Tensor]]:
        """(φₖ₊₁, support losses at φₖ) for k = 0, 1, …, without end.

        overwrite: φₖ₊₁ may take the place of φₖ; see `inner_loop`.
        """
        self.state = self.learner.moments.state(self.start)
        return inner_loop(
            again(self, self._support_parts) if overwrite else self._support_parts,
            self.start,
            self.learner.inner_lr,
            optimizer=self.learner.optimizer,
            first_order=self.first_order if first_order is None else first_order,
            state=self.state,
            stacked=self.stacked,
            guard=self.guard,
            overwrite=overwrite,
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
        return losses + self._proximal(adapted) if proximal and self.learner.objective.proximal else losses

    def _support_parts(self, adapted: Mapping[str, Tensor], constant: bool, step: int) -> Iterator[Tensor]:
        """`support_losses` as the terms of a sum, of parts of the support set, each to be differentiated by itself."""
        size = self.learner.inner_accumulate
        if size is None:
            yield self.support_losses(adapted, constant, step)
            return
        examples = minibatch(self.task.support, self.learner.inner_batch_size, step, self.stacked)
        fixed = {n: p.detach() for n, p in self.fixed.items()} if constant else self.fixed
        criterion = self.learner.criterion
        total = counted(criterion, examples.targets, self.stacked) if summed(criterion) else None
        for part, share in parts_of(examples, size, self.stacked):
            losses = self._losses(adapted, fixed, part, step=step, summing=total is not None)[0]
            yield losses * share if total is None else losses / torch.as_tensor(total).to(losses)
        if self.learner.objective.proximal:
            yield self._proximal(adapted)

    def _proximal(self, adapted: Mapping[str, Tensor]) -> Tensor:
        """λ/2 ‖φ - θ‖²: () or (tasks,)."""
        lead = int(self.stacked)
        total: Any = 0.0
        for name, value in adapted.items():
            far = (value - self.start[name].detach()).square()
            total = total + (far.flatten(lead).sum(-1) if far.dim() > lead else far)
        return self.learner.objective.proximal / 2 * total

    def query(
        self,
        adapted: Adapted,
        statistics: Statistics = "own",
        step: int | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tree]:
        """Losses () or (tasks,) and outputs on the query set at φ, see `measured`.

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
            measured=self._measured,
        )

    def outputs(self, adapted: Adapted) -> Tree:
        """The outputs on the query set of one task at φ, no criterion asked."""
        parameters = {**self.fixed, **adapted}
        with self.replicas.holding(parameters, dict(self.buffers)) as (model, _), self.attention():
            return self._outputs(model, self.task.query.inputs, self._support_for("own"), step=0)[0]

    def guard(self) -> AbstractContextManager:
        """Within it gradients are taken: a loss that has the model itself run again there, as `torch.utils.checkpoint`
        does, would find it without the task's weights, which is an `InputError`.
        """
        if self.learner.loss is None:
            return nullcontext()
        return calls_refused(self.replicas.own, "forward, or a module of it, is what the loss may checkpoint")

    def at(self, adapted: Adapted, function: Callable[[Callable, Examples], Any]) -> Any:
        """What a function of the model at φ and of the query set of one task gives."""
        parameters = {**self.fixed, **adapted}
        query = mapped(torch.clone, self.task.query)  # whatever the function does to them
        with self.replicas.holding(parameters, _copied(self.buffers)) as (model, _), self.attention():
            forward = Forward(model, self.learner.model, query.inputs)
            return self._with_gradients(function, forward, query, self.steps)

    def _with_gradients(self, function: Callable, forward: Forward, examples: Examples, step: int) -> Any:
        """What a function of a model and examples gives, which may differentiate whatever the caller's mode is."""
        told = normalising(step=step, running=self.evaluating or None, open=True)
        keeps = torch.is_grad_enabled()
        with told, Stacked() if self.stacked else nullcontext(), torch.enable_grad():
            found = function(forward, examples)
        return found if keeps or not isinstance(found, Tensor) else found.detach()

    def check_parts(self) -> None:
        """Raise `InputError` where the gradient of a support set is not that of its parts, see `inner_accumulate`."""
        if self.learner.inner_accumulate is None:
            return
        mixing = [
            name
            for name, module in self.learner.model.named_modules()
            if (isinstance(module, BatchNorm) and module.policy != "frozen")
            or (isinstance(module, NATIVE_BATCH_NORMS) and takes_statistics(module))
        ]
        if mixing:
            raise InputError(
                f"inner_accumulate takes a support set in parts, and {mixing[0]!r} normalises by the statistics of "
                "all of it: take GroupNorm, or a batch norm in evaluation mode"
            )
        few = spread(self.task.support)
        still = Replicas(self.learner.model, evaluating=True)  # no dropout
        with still.holding(self.meta, _copied(self.buffers)) as (model, _), torch.no_grad():
            check_mean(
                self.learner.criterion, lambda inputs: self._outputs(model, inputs, None, step=0)[0], few
            )

    def _support_for(self, statistics: Statistics) -> Tree | None:
        check_choice("statistics", statistics, Statistics)
        if statistics == "own" and not self.learner.uses_support_statistics():
            return None
        if self.learner.loss is not None:
            raise InputError(
                "loss= makes its own forward passes, which are told of no support set: take the statistics 'own', and "
                "no BatchNorm of the policy 'support'"
            )
        if statistics != "with-query":
            refuse_native(self.learner.model)
        return self.task.support.inputs

    def support_features(self, module: str) -> Tensor:
        """What goes into a module, by name, for the support examples at θ: (..., examples, features)."""
        caught: list[Tensor] = []

        def one_task(buffers, inputs):
            given = dict(buffers)
            with self.replicas.holding(self.meta, buffers) as (model, _):
                call(model, inputs)
            return caught.pop(), _assigned(given, buffers)

        with self.learner.model.get_submodule(module).register_forward_pre_hook(
            lambda _, args: caught.append(args[0])
        ):
            run = torch.func.vmap(one_task, randomness="different") if self.stacked else one_task
            with self.attention():
                features, assigned = run(self.buffers, self.task.support.inputs)
        self.buffers.update(assigned)
        return features

    def _losses(
        self,
        adapted,
        fixed,
        examples,
        support=None,
        step=0,
        apart=False,
        buffers=None,
        summing=False,
        measured=False,
    ) -> tuple[Tensor, Tree]:
        meets = self._meets(examples, support, step)

        def one_task(adapted, buffers, examples, support):
            parameters = {**fixed, **adapted}
            return self._judged(parameters, buffers, examples, support, step, apart, meets, summing, measured)

        buffers = self.buffers if buffers is None else buffers
        arguments = (dict(adapted), buffers, examples, support)
        axes = (0, 0, 0, None if support is None else 0)
        with self.attention():
            if not self.stacked:
                loss, outputs, _, found = one_task(*arguments)
            else:
                run = torch.func.vmap(one_task, axes, randomness="different")
                loss, outputs, assigned, found = run(*arguments)
                buffers.update(assigned)
        if self.met is not None:
            self.met.update(found)
        return loss, outputs

    def _meets(self, examples: Examples, support: Tree | None, step: int) -> bool:
        """Whether a forward pass is one of those on the way from θ to φ_K, the last of them of the query set, whose
        statistics are asked for; the first one of each step.
        """
        if self.met is None or support is not None or self.learner.loss is not None:
            return False
        last = step == self.steps
        return (examples is self.task.query) == last and all(step != known for _, known, _ in self.met)

    def _judged(
        self, parameters, buffers, examples, support, step, apart, meets, summing=False, measured=False
    ) -> tuple[Tensor, Tree, dict, Met]:
        """The loss and the outputs of one task, the buffers that the forward pass has assigned, and what batch norms
        have met, see `_meets`.

        summing: the sum of a cross-entropy, not its mean. measured: the outputs of a learner with a loss too.
        """
        given = dict(buffers)
        outputs: Tree = ()
        seen: list[Seen] = []
        if measured:  # with buffers of its own, so that to look changes nothing
            copied = _copied(buffers)
            with self.replicas.holding(parameters, copied) as (model, _):
                outputs, _ = self._outputs(model, examples.inputs, None, step)
        told = normalising(record=seen) if meets else nullcontext()
        with told, self.replicas.holding(parameters, buffers) as (model, judge):
            criterion = self.learner.criterion
            if criterion is not None:
                outputs, returned = self._outputs(model, examples.inputs, support, step, apart)
                targets = targets_for(criterion, outputs, examples.targets, by_value=not self.stacked)
                own: Any = summed(judge) if summing else judge
                loss = checked_loss(own(returned, targets))
            else:
                # views, so that requires_grad_() in the loss leaves the tensors of the user as they are
                examples = mapped(lambda tensor: tensor.view_as(tensor), examples)
                forward = Forward(model, self.learner.model, examples.inputs)
                loss = checked_loss(self._with_gradients(judge, forward, examples, step), "loss")
        return loss, outputs, _assigned(given, buffers), met(self.learner.model, seen) if meets else {}

    @property
    def _differentiates_twice(self) -> bool:
        # a loss of one's own may differentiate by the inputs, or not
        own = self.learner.loss is not None
        return own or not self.first_order or self.learner.objective.differentiates_twice

    def attention(self) -> AbstractContextManager:
        """Attention written out, where it is differentiated twice or under vmap; as it is elsewhere."""
        return open_attention() if self.stacked or self._differentiates_twice else nullcontext()

    def _outputs(self, model, inputs, support, step, apart=False) -> tuple[Tree, Any]:
        """The outputs for the inputs of one task, batch norms told what they need to know: the tensors, and the object
        that the model returns, where it is one.

        model: the forward pass. apart: one input at a time, each in a batch with the support set.
        """

        def run(inputs, first=None) -> tuple[Tree, Any]:
            told = normalising(first=first, step=step, running=self.evaluating or None)
            with told, Stacked() if self.stacked else nullcontext():
                return outputs_of(self.learner, model, inputs)

        if support is None:
            return run(inputs)
        refuse_unlike(support, inputs)
        if apart:
            singles = zip(*(leaf.split(1) for leaf in leaves(inputs)))
            batches = (joined([support, rebuilt(inputs, iter(own))]) for own in singles)
            outputs = joined([mapped(itemgetter(slice(-1, None)), run(batch)[0]) for batch in batches])
        else:
            first = first_of(support).shape[0]
            outputs = mapped(itemgetter(slice(first, None)), run(joined([support, inputs]), first)[0])
        return outputs, outputs


def _copied(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in buffers.items()}


def _assigned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that are other tensors now. vmap gives back what its function returns, and no more."""
    return {name: buffer for name, buffer in after.items() if buffer is not before.get(name)}
