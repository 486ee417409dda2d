"""Plans that nobody keeps: `meta_gradient` and `curve` find again what was chosen for a learner and such tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fomaml.choices import Statistics
from fomaml.engines.adaptation import Way, curve_of, way_of
from fomaml.engines.common import Measure, MetaGradient, TaskWeights, check_asked, groups
from fomaml.engines.compiling import Choice, Compiling, like_of
from fomaml.engines.pays import Compile, check_compile, least
from fomaml.engines.plan import Plan, choice
from fomaml.engines.probes import check_labels_again, check_outputs
from fomaml.learning.adapt import ordinary_modes
from fomaml.learning.learner import MetaLearner
from fomaml.learning.turns import turn_of
from fomaml.tasks import Batch, Task, as_batch, shape_of
from fomaml.trees import Tree


def meta_gradient(
    learner: MetaLearner,
    tasks: Batch,
    *,
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: Compile = False,
    autocast: torch.dtype | None = None,
    task_weights: TaskWeights = "equal",
) -> MetaGradient:
    """The gradient of the meta-loss by meta-parameter name, averaged over a batch of tasks: stacked ones, or a list of
    single tasks of any shapes.

    The short form of a call of a `plan`, which has the same arguments. A plan is kept for each learner and shapes.
    How often it will be called nobody knows: `compile="auto"` compiles when there have been so many calls with these
    shapes that compiling would have paid.

    Raises:
        InputError: an unknown engine, one that does not take this learner, or outputs narrower than
            the number of classes.
    """
    check_asked(task_weights, autocast)
    check_compile(compile)
    with turn_of(learner.model), ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        compiling = Compiling(compile is True)
        if compile == "auto":
            compiling = _by_now(learner, tasks, engine, tasks_at_once, autocast)
        known, key = _known(learner, tasks, engine, tasks_at_once, compiling.on, autocast)
        kept = known.get(key)
        chosen = kept or choice(learner, tasks, engine, tasks_at_once, compiling.on)
        own = Plan(learner, chosen, compiling, autocast, task_weights)
        own.seen = _kept[learner].seen
        result = own._compute(tasks)
        if compiling.failure and compile == "auto":
            return result
    if own.choice is not kept:
        if len(known) >= MOST:  # lists of tasks of any sizes seldom come back
            known.clear()
        known[key] = own.choice  # only now: what fails may be the fault of these very tasks
    return result


def _by_now(
    learner: MetaLearner, tasks: Batch, engine: str, tasks_at_once: int | None, autocast: torch.dtype | None
) -> Compiling:
    """Whether "auto" compiles this call: see `meta_gradient`. What cannot be compiled is not tried again."""
    known, key = _known(learner, tasks, engine, tasks_at_once, False, autocast)
    if key not in known:
        known[key] = choice(learner, tasks, engine, tasks_at_once, False)
    counted = _kept[learner].counted
    if key not in counted:
        if len(counted) >= MOST:
            counted.clear()
        counted[key] = Counted(least(learner, tasks, known[key].engine, autocast))
    own = counted[key]
    own.calls += 1
    if own.calls <= own.least or (own.compiling is not None and not own.compiling.on):
        return Compiling(False)
    own.compiling = own.compiling or Compiling(True, known[key], like_of(groups(learner, tasks)[0]))
    return own.compiling


@dataclass
class Counted:
    """Calls with "auto" of a learner and such tasks. least: from how many on compiling pays."""

    least: float
    calls: int = 0
    compiling: Compiling | None = None


def curve(
    learner: MetaLearner,
    tasks: Batch,
    at_steps: Sequence[int],
    *,
    statistics: Statistics = "own",
    engine: str = "auto",
    tasks_at_once: int | None = None,
    compile: bool = False,
) -> list[tuple[Tensor, Tree]]:
    """Query losses (tasks,) and outputs (tasks, examples, ...) after each of `at_steps` inner steps, ascending.

    statistics: see `Problem.query`. compile: see `Plan.curve`.
    """
    points = [(steps, statistics) for steps in at_steps]
    return curve_at(learner, tasks, points, engine, tasks_at_once, compile=compile)


def curve_at(
    learner: MetaLearner,
    tasks: Batch,
    points: Sequence[tuple[int, Statistics]],
    engine: str = "auto",
    tasks_at_once: int | None = None,
    measured: Measure | bool = False,
    compile: bool = False,
) -> list[tuple[Tensor, Tree]]:
    """`curve` at pairs of steps and statistics, ascending: tasks are adapted once for all of them.

    measured, compile: see `Plan.curve`.
    """
    with turn_of(learner.model), ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        known, key = _known(learner, tasks, engine, tasks_at_once)
        own = Plan(learner, known.get(key) or choice(learner, tasks, engine, tasks_at_once, compile=False))
        result = curve_of(own, tasks, points, measured, compile)
    known[key] = own.choice
    return result


def kept_plan(learner: MetaLearner, tasks: Batch, engine: str = "auto", compile: bool = False) -> Plan:
    """A plan for curves, whose choices are kept as those of `curve` are: to evaluate a learner again tries nothing."""
    with turn_of(learner.model), ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        known, key = _known(learner, tasks, engine, None)
        if key not in known:
            known[key] = choice(learner, tasks, engine, None, compile=False)
        plan = Plan(learner, known[key])
        if compile:
            ways = _kept[learner].ways
            if key not in ways:
                ways[key] = way_of(plan, groups(learner, tasks)[0])
            plan.way = ways[key]
    return plan


def check_outputs_once(learner: MetaLearner, tasks: Batch) -> None:
    """`check_outputs`; where tasks of these shapes have passed it, it looks at labels alone and computes nothing."""
    with turn_of(learner.model), ordinary_modes():
        tasks = as_batch(tasks, learner.model)
        _, key = _known(learner, tasks, "auto", None)
        passed = _kept[learner].outputs
        outputs = passed.get(key)
        if outputs is not None and isinstance(tasks, Task):
            return check_labels_again(learner, tasks, outputs)
        found = check_outputs(learner, tasks)
        if found is not None and learner.start is None and isinstance(tasks, Task):
            passed[key] = found


MOST = 100


def _known(
    learner: MetaLearner,
    tasks: Batch,
    engine: str,
    tasks_at_once: int | None,
    compile: bool = False,
    autocast: torch.dtype | None = None,
) -> tuple[dict[tuple, Choice], tuple]:
    """The choices that the short forms keep of a learner, and the key of the one for these tasks.

    The key holds all that a choice depends on, so that what is kept is what would be chosen anew; only that fewer tasks
    at once are kept where memory ran out.
    """
    kept = _kept.get(learner)
    if kept is None or not kept.is_of(learner):
        kept = _kept[learner] = _Kept(learner)
    if isinstance(tasks, Task):
        (a, b), (c, d) = tasks
        if (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and isinstance(c, Tensor)
            and isinstance(d, Tensor)
        ):
            # in full, as it is a part of a small meta-gradient
            like: tuple = (a.device, a.shape, b.shape, c.shape, d.shape, a.dtype, b.dtype, c.dtype, d.dtype)
        else:
            like = shape_of(tasks)
    else:
        like = "a list", *map(shape_of, tasks)
    sizes = learner.inner_batch_size, learner.inner_accumulate
    numbers = (learner.inner_steps, *sizes, torch.get_num_threads())
    names = (*learner.adapted, None, *learner.meta_learned)
    modes = [module.training for module in kept.modules]
    return kept.choices, (engine, tasks_at_once, compile, autocast, *like, *numbers, *names, *modes)


class _Kept:
    """What the short forms keep of a learner while it consists of the same parts: choices by all else."""

    def __init__(self, learner: MetaLearner):
        self.choices: dict[tuple, Choice] = {}
        self.counted: dict[tuple, Counted] = {}
        self.ways: dict[tuple, Way] = {}
        self.outputs: dict[tuple, torch.Size] = {}  # their shapes, see `check_outputs_once`
        self.seen: set[str] = set()  # see `Plan`
        self.modules = tuple(learner.modules())[1:]  # not itself: it would live as long as what is kept
        slots = [slot for module in learner.modules() for slot in (module._modules, module._parameters)]
        self._filled = [slot for slot in slots if slot]
        self._empty = [slot for slot in slots if not slot]
        self._parts = self._parts_of(learner)  # held, so that their ids stay theirs
        self._ids = tuple(map(id, self._parts))

    def is_of(self, learner: MetaLearner) -> bool:
        """Whether no part was replaced since; a walk through all modules would take four times as long."""
        return not any(self._empty) and tuple(map(id, self._parts_of(learner))) == self._ids

    def _parts_of(self, learner: MetaLearner) -> list:
        parts = [learner.optimizer, learner.objective, learner.criterion, learner.loss, learner.output]
        parts += [learner.start, learner.first_order]
        for slot in self._filled:
            parts += slot.values()
        return parts


_kept: WeakKeyDictionary[MetaLearner, _Kept] = WeakKeyDictionary()
