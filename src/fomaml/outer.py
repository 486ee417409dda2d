"""One outer step up to the meta-gradient: of one process, and of the processes of a group, each with its tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml.devices import random_state
from fomaml.engines import MetaGradient, Plan
from fomaml.engines import plan as make_plan
from fomaml.engines.common import check_sum
from fomaml.episodes import TaskSequence, ways_of_each
from fomaml.layout import laid
from fomaml.learning.learner import MetaLearner
from fomaml.learning.statistics import Met, move
from fomaml.measures import exact
from fomaml.metrics import Metric, scores
from fomaml.models import BatchNorm
from fomaml.ranks import OTHERS, Ranks, as_ranks, digest_of
from fomaml.scoring import measured_for, query_targets, scores_at, weighted_mean
from fomaml.streams import batch_of
from fomaml.tasks import Batch


class Step(NamedTuple):
    """What an outer step is made of. gradients: by name, the mean over the tasks of the meta-batch.

    meta_loss: (). before: () the mean score at θ, and after: what gives the one at φ_K; None where the step is not
    measured. tasks: those that this process has, the first of the meta-batch among them where it is rank 0. random: the
    states of torch's random numbers before the meta-gradient, by device. moments, statistics: see `MetaGradient`, of
    that task.
    """

    gradients: dict[str, Tensor]
    meta_loss: Tensor
    before: Tensor | None
    after: Callable[[], Tensor] | None
    tasks: Batch | None
    random: dict[str, Tensor]
    moments: Mapping[str, Tensor]
    statistics: Met


class Outer:
    """The outer steps of one process.

    plan: how meta-gradients are computed; made by `asked` of the first meta-batch, where there is none.
    """

    def __init__(
        self,
        learner: MetaLearner,
        episodes: TaskSequence,
        meta_batch_size: int,
        metric: Metric,
        plan: Plan | None,
        asked: Mapping[str, Any],
    ):
        self.learner, self.episodes, self.meta_batch_size = learner, episodes, meta_batch_size
        self.metric, self.plan, self.asked = metric, plan, asked

    def step(self, iteration: int, measured: bool) -> Step:
        """The step of an iteration, from 0, at the meta-parameters as they are."""
        tasks = self.batch(iteration * self.meta_batch_size, self.meta_batch_size)
        plan = self.plan = self.plan or make_plan(self.learner, tasks, **self.asked)
        before = self._scores(plan, tasks, 0).mean() if measured else None
        adapted = self._adapted(plan, tasks, measured)
        random = random_state()
        result = plan(tasks, ways=ways_of_each(self.episodes))
        return Step(
            result.gradients,
            weighted_mean(result.query_losses, plan.weights(tasks)),
            before,
            (lambda: self._after(tasks, result, adapted).mean()) if measured else None,
            tasks,
            random,
            result.moments,
            result.statistics,
        )

    def all_tasks(self, step: Step, iteration: int) -> Batch:
        """Those of the whole meta-batch."""
        assert step.tasks is not None
        return step.tasks

    def carry_moments(self, step: Step, iteration: int) -> None:
        """See `MetaLearner.carry_moments`."""
        if step.moments:
            self.learner.moments.take_over(step.moments)
        elif self.learner.moments.names:  # an objective that takes no path from θ to φ_K
            assert step.tasks is not None and self.plan is not None
            with self.plan.precision(step.tasks):
                self.learner.carry_moments(step.tasks)

    def update_statistics(self, step: Step, iteration: int) -> None:
        """See `MetaLearner.update_statistics`."""
        if step.statistics:
            return move(self.learner.model, step.statistics)
        if not self.moved_layers:
            return
        assert step.tasks is not None and self.plan is not None
        with self.plan.precision(step.tasks):
            self.learner.update_statistics(step.tasks)

    @functools.cached_property
    def moved_layers(self) -> list[BatchNorm]:
        """See `MetaLearner.moving_norms`; found once, as walking through modules is a part of a small step."""
        return self.learner.moving_norms()

    def batch(self, start: int, tasks: int) -> Batch:
        return batch_of(self.episodes, start, tasks, self.learner.model)

    def _scores(self, plan: Plan, tasks: Batch, steps: int) -> Tensor:
        return scores_at(plan, tasks, self.metric, steps, ways_of_each(self.episodes))

    def _adapted(self, plan: Plan, tasks: Batch, measured: bool) -> Tensor | None:
        """The scores at φ_K where the meta-gradient gives no outputs to score."""
        if not measured or not measured_for(self.learner, self.metric):
            return None
        return self._scores(plan, tasks, self.learner.inner_steps)

    def _after(self, tasks: Batch, result: MetaGradient, adapted: Tensor | None) -> Tensor:
        """(tasks,) the scores at φ_K."""
        if adapted is not None:
            return adapted
        return scores(self.metric, result.query_outputs, query_targets(tasks), result.query_losses)


class Part(NamedTuple):
    """What this rank has computed of a piece of a meta-batch, a range of its tasks.

    before, adapted: (tasks,) scores at θ, and those at φ_K where they are not made of the result's outputs.
    """

    piece: range
    tasks: Batch
    result: MetaGradient
    before: Tensor | None
    adapted: Tensor | None


class SharedOuter(Outer):
    """The outer steps of the processes of a group, all of which take each step: what it gives is equal on all of them.

    A piece of a meta-batch is computed by one rank, which alone draws its tasks. The random numbers of its forward
    passes are a function of (seed, iteration, piece), where the seed is that of rank 0's torch. Whether a step has
    failed on a rank is read by all before they go on, which waits for the device.
    """

    def __init__(self, ranks: Ranks, own: Outer):
        super().__init__(**vars(own))
        self.ranks = ranks
        own = self.learner.meta_parameters()
        self.like = {name: (each.shape, each.dtype, each.stride()) for name, each in own.items()}
        dtype = torch.float32  # at least, to be added up in
        for parameter in own.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        self.nothing = torch.zeros(
            sum(parameter.numel() for parameter in own.values()),
            dtype=dtype,
            device=next(iter(own.values())).device,
        )
        seed = torch.tensor([torch.initial_seed() % 2**63])
        ranks.take_over([seed])
        self.seed = int(seed)
        ranks.take_over([*self.learner.state_dict().values()])

    def step(self, iteration: int, measured: bool) -> Step:
        ranks, first = self.ranks, iteration * self.meta_batch_size
        if self.plan is None:
            with ranks.agreeing(), self._drawing(iteration, OTHERS):
                whole = self.batch(first, self.meta_batch_size)
                self.plan = make_plan(self.learner, whole, **self.asked)
            agree(ranks, self.plan)
        return self._step(iteration, measured, self.plan, {})

    def _step(self, iteration: int, measured: bool, plan: Plan, drawn: dict[int, Batch]) -> Step:
        """The step by a plan. drawn: the tasks that this rank has already."""
        ranks, first = self.ranks, iteration * self.meta_batch_size
        pieces = ranks.pieces(self.meta_batch_size)
        own = {index: pieces[index] for index in ranks.share(len(pieces))}
        compiled = plan.compile
        known, at_once, parts = set(plan.seen), plan.tasks_at_once, []
        weights, total = None, float(self.meta_batch_size)
        if plan.task_weights != "equal":
            weights, total = self._weights(plan, first, own, drawn)
        error: Exception | None = None
        try:
            for index, piece in own.items():
                tasks = drawn[index] = drawn.get(index) or self.batch(first + piece.start, len(piece))
                before = adapted = None
                if measured:
                    with self._drawing(iteration, OTHERS + 1 + index):
                        before = self._scores(plan, tasks, 0)
                        adapted = self._adapted(plan, tasks, measured)
                among = (None if weights is None else weights[piece.start : piece.stop]), total
                # that a shape has come before is known from earlier steps alone, whoever has computed it
                plan.seen, found = set(known), plan.seen
                with self._drawing(iteration, index):
                    result = plan(tasks, part_of=among, ways=ways_of_each(self.episodes))
                plan.seen |= found
                parts.append(Part(piece, tasks, result, before, adapted))
        except Exception as raised:  # whatever a module raises
            error, parts = raised, []
        gradient, losses = self._added_up(parts, len(pieces), error, plan, known, at_once)
        if compiled and not plan.compile:  # the same on all ranks
            return self._step(iteration, measured, plan, drawn)
        return Step(
            gradient,
            weighted_mean(losses, weights),
            self._collected([(part.piece, part.before) for part in parts]).mean() if measured else None,
            (lambda: self._scored(parts)) if measured else None,
            parts[0].tasks if parts else None,
            random_state(),
            parts[0].result.moments if parts else {},
            parts[0].result.statistics if parts else {},
        )

    def all_tasks(self, step: Step, iteration: int) -> Batch:
        return self.batch(iteration * self.meta_batch_size, self.meta_batch_size)

    def carry_moments(self, step: Step, iteration: int) -> None:
        if self.learner.moments.names:
            moved = list(self.learner.moments.buffers())
            self._of_first(
                step, iteration, lambda: super(SharedOuter, self).carry_moments(step, iteration), moved
            )

    def update_statistics(self, step: Step, iteration: int) -> None:
        moved = [buffer for layer in self.moved_layers for buffer in layer.buffers()]
        if moved:
            self._of_first(
                step, iteration, lambda: super(SharedOuter, self).update_statistics(step, iteration), moved
            )

    def _of_first(self, step: Step, iteration: int, move: Callable[[], None], moved: list[Tensor]) -> None:
        """What the first task of the meta-batch moves: rank 0 has it, and the others take over what it has become."""
        with self.ranks.agreeing(), self._drawing(iteration, OTHERS):
            if self.ranks.rank == 0:
                move()
        self.ranks.take_over(moved)

    def _drawing(self, iteration: int, piece: int) -> AbstractContextManager[None]:
        return self.ranks.drawing(self.seed, iteration, piece)

    def _weights(
        self, plan: Plan, first: int, own: Mapping[int, range], drawn: dict[int, Batch]
    ) -> tuple[list[float] | None, float]:
        """The weights of all tasks of a meta-batch, None if they are all the same, and their sum; `drawn` gets those of
        this rank.
        """
        found = []
        with self.ranks.agreeing():
            for index, piece in own.items():
                drawn[index] = self.batch(first + piece.start, len(piece))
                each = plan.each_weight(drawn[index])
                found.append((piece, torch.tensor(each, dtype=torch.float64)))
        weights: list[float] = self._collected(found).tolist()
        check_sum(weights)
        same = len(set(weights)) == 1
        return (None, float(len(weights))) if same else (weights, sum(weights))

    def _added_up(
        self,
        parts: list[Part],
        pieces: int,
        error: Exception | None,
        plan: Plan,
        known: set[str],
        at_once: int,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The meta-gradient and the query losses (tasks,), of all ranks.

        Raises this rank's error, or what another rank's has become, on all of them.
        """
        ranks = self.ranks
        flat = [torch.cat([g.to_dense().reshape(-1) for g in p.result.gradients.values()]) for p in parts]
        flat = [each.to(self.nothing) for each in flat]
        losses = self.nothing.new_zeros(self.meta_batch_size)
        for part in parts:
            losses[part.piece.start : part.piece.stop] = part.result.query_losses
        changed = plan.seen != known or plan.tasks_at_once != at_once
        told = [float(error is not None), float(changed), float(bool(plan.compiling.failure))]
        told += map(float, ranks.notes())
        facts = torch.cat([losses, self.nothing.new_tensor(told)])
        if ranks.same_bits:
            facts = ranks.sum(facts)
        else:
            flat_and_facts = ranks.sum(torch.cat([flat[0] if flat else self.nothing, facts]))
            whole, facts = flat_and_facts.split([len(self.nothing), len(facts)])
        losses, rest = facts.split([len(losses), len(told)])
        failed, any_changed, uncompiled, *ranks.noted = rest.tolist()
        if failed:
            ranks.fail(error)
        if uncompiled and plan.compile:
            plan.run_eagerly(plan.compiling.failure or ELSEWHERE)
        if ranks.same_bits:
            whole = ranks.in_order(flat, pieces, self.nothing)
        if any_changed:
            plan.choice = plan.choice._replace(tasks_at_once=ranks.fewest(plan.tasks_at_once))
            plan.seen = ranks.union(plan.seen)
        split = whole.split([shape.numel() for shape, *_ in self.like.values()])
        gradients = {
            name: laid(each.reshape(shape).to(dtype, copy=True), strides)
            for each, (name, (shape, dtype, strides)) in zip(split, self.like.items())
        }
        return gradients, losses

    def _collected(self, found: Iterable[tuple[range, Tensor | None]]) -> Tensor:
        """(tasks,) float64 values of all ranks, of this one's in their places."""
        own = torch.zeros(self.meta_batch_size, dtype=torch.float64)
        for piece, values in found:
            assert values is not None
            own[piece.start : piece.stop] = exact(values.detach())
        return self.ranks.sum(own)

    def _scored(self, parts: list[Part]) -> Tensor:
        """The mean score at φ_K."""
        with self.ranks.agreeing():
            found = [(part.piece, self._after(part.tasks, part.result, part.adapted)) for part in parts]
        return self._collected(found).mean()


ELSEWHERE = "another process cannot"


def agree(ranks: Ranks, plan: Plan | None) -> None:
    """Where one process runs uncompiled, such as for want of a compiler, all do."""
    compiled = int(plan is None or plan.compile)
    if ranks.fewest(compiled) < compiled and plan is not None:
        plan.run_eagerly(ELSEWHERE)


def shared(group: Any, own: Outer, optimizer: torch.optim.Optimizer, told: tuple) -> Outer:
    """The outer steps of this process among those of a group, whose processes have all been given the same; its own
    where there is no group. group: of `train`.

    told: what else they must have in common.
    """
    if group is None:
        return own
    ranks, plan = as_ranks(group), own.plan
    meta_parameters = own.learner.meta_parameters()
    shapes = [(name, p.shape, p.dtype, p.requires_grad) for name, p in meta_parameters.items()]
    plain = [value for value in own.asked.values() if not callable(value)]
    agree(ranks, plan)
    of_plan = plan and (plan.choice._replace(why=""), plan.compile, plan.autocast)
    numbers = ranks.same_bits, ranks.threads, ranks.piece, own.meta_batch_size, *told
    ranks.check_same(
        {
            "the learner": shapes,
            "the optimiser": (type(optimizer).__name__, digest_of(optimizer.state_dict())),
            "what train is told": (numbers, plain, of_plan),
        }
    )
    return SharedOuter(ranks, own)
