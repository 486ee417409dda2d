"""Inner steps alone, without a meta-gradient, compiled: curves of many tasks, and tasks adapted one after the other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fomaml.choices import Statistics, check_choice
from fomaml.engines.common import Curve, Group, Measure, Reached, curves, groups, in_order, one_by_one
from fomaml.engines.known import AS_ASKED, ENGINES
from fomaml.engines.pays import Compile, begin_kernels, check_compile
from fomaml.engines.probes import flops, has_images, is_convolutional, suits_kernels, vmaps
from fomaml.errors import whole
from fomaml.layout import fills_its_memory
from fomaml.learning.adapt import ordinary_modes
from fomaml.learning.learner import MetaLearner
from fomaml.learning.replica import Replicas
from fomaml.learning.turns import turn_of
from fomaml.tasks import Batch, Examples, Task, as_examples, chunks, count, device_of, shape_of
from fomaml.trees import Tree, joined, mapped

if TYPE_CHECKING:
    from fomaml.engines.compiled.trace import Compiled

SMALL = 5e7  # operations of the support set, up to which convolutions are stacked
STACK = 16  # stacked convolutions at once: 32 leave the cache

# --- what pays --------------------------------------------------------------------------------------


def compiles(
    compile: Compile, learner: MetaLearner, tasks: Batch, number: int, points: Sequence[tuple]
) -> bool:
    """Whether to compile the curves of so many tasks like these at these points; see `pays`."""
    check_compile(compile)
    if isinstance(compile, bool):
        return compile
    return isinstance(tasks, Task) and pays(learner, tasks, number, points[-1][0], len(points))


def pays(learner: MetaLearner, tasks: Task, number: int, steps: int, points: int = 1) -> bool:
    """Whether so many tasks are enough that adaptation is compiled for them; on a CPU alone, where it was measured.

    A rule by numbers alone, so that it does not depend on how busy a machine is. What a learner is refused for when it
    is asked for is no warning here: it runs uncompiled. Measured on two cores: an eager inner
    step of a convolutional net has 25 billion operations a second, and compiled half of its time is left; tracing takes
    0.2 s and 0.25 s for a step. A step of a stack of dense layers takes about 1 ms beside its operations, most of which
    a trace saves.
    """
    from fomaml.engines.compiled.cache import too_old
    from fomaml.engines.cpu.build import compiler

    exact = all(p.dtype in (torch.float32, torch.float64) for p in learner.parameters())
    if device_of(tasks).type != "cpu" or not exact or too_old():
        return False
    operations = number * (
        3 * steps * flops(learner, tasks, of_support=True) + points * flops(learner, tasks)
    )
    traced = 0.2 + 0.25 * (steps + points)
    if is_convolutional(learner):
        return bool(compiler()) and 0.5 * operations / 25e9 > 2 * traced
    stacks = math.ceil(number / 100)
    return stacks * 1e-3 * (steps + points) > 2 * traced


def pays_again(learner: MetaLearner, tasks: Task, calls: int, steps: int) -> bool:
    """Whether so many calls for one task each pay for compiling; as `pays`, from what a step of one task saves."""
    if not pays(learner, tasks, 10**12, steps):  # nothing pays there
        return False
    traced = 0.2 + 0.25 * steps
    step = 2e-4
    if is_convolutional(learner):
        step = 0.4 * 3 * flops(learner, tasks, of_support=True) / 25e9
    return calls * steps * step > 2 * traced


# --- curves -----------------------------------------------------------------------------------------


class Way(NamedTuple):
    """How tasks are adapted when compiled. stacks: small convolutions, by the kernels that go through them."""

    engine: str
    tasks_at_once: int
    stacks: bool


class Adapting(Protocol):
    """What a plan has by which curves are computed."""

    learner: MetaLearner
    way: Way | None

    @property
    def engine(self) -> str: ...
    @property
    def why(self) -> str: ...
    @property
    def tasks_at_once(self) -> int: ...
    def halve(self, size: int, error: Exception, tasks: Task) -> None: ...


def way(learner: MetaLearner, tasks: Task, engine: str, asked: bool, most: int) -> Way:
    """How to adapt tasks like these.

    engine, asked, most: those of the uncompiled plan, whether they were asked for, and how many tasks it takes at once.
    """
    number = count(tasks)
    on_cpu = device_of(tasks).type == "cpu"
    if not (on_cpu and is_convolutional(learner)):
        return Way(engine, 1 if engine == "loop" else min(most, number), False)
    begin_kernels(learner, tasks)
    if not asked:
        # images that the kernels do not take: 1.1 to 2 times as fast one by one
        suits = suits_kernels(learner) or not has_images(learner)
        small = flops(learner, tasks, of_support=True) <= SMALL
        engine = "batched" if suits and small and vmaps(learner, tasks) else "loop"
    if engine == "loop":
        return Way(engine, 1, False)
    return Way(engine, even(number, STACK), True)


def way_of(plan: Adapting, group: Group) -> Way:
    """How to adapt such tasks of a plan."""
    return way(plan.learner, group.tasks, plan.engine, plan.why == AS_ASKED, plan.tasks_at_once)


def even(number: int, most: int) -> int:
    """How many of so many tasks to take at once, at most: the number that fills the last stack and all threads best."""
    threads = torch.get_num_threads()
    most = min(most, number)
    sizes = range(most, most // 2, -1)
    return min(sizes, key=lambda size: math.ceil(number / size) * math.ceil(size / threads))


def curve_of(
    plan: Adapting,
    tasks: Batch,
    points: Sequence[tuple[int, Statistics]],
    measured: Measure | bool = False,
    compile: bool = False,
    quietly: bool = False,
    ways: int | None = None,
) -> list[tuple[Tensor, Tree]]:
    """`Plan.curve`, of a batch that was looked at."""
    measure = measured if callable(measured) else None
    engine = "loop" if measure else plan.engine
    problem = partial(ENGINES[engine], plan.learner, evaluating=True, measured=measured is True)
    own = groups(plan.learner, tasks, ways=ways)
    parts: list[list[tuple[Tensor, Tree]]] = []
    for number, group in enumerate(own):
        compiles = compile and measure is None
        if compiles and plan.way is None:
            plan.way = way_of(plan, group)
        if plan.way is not None:  # few tasks of a shape do not fill a stack
            compiles = compiles and (isinstance(tasks, Task) or 2 * len(group.rows) > plan.way.tasks_at_once)
        while len(parts) <= number:
            size = most = 1 if measure else min(plan.tasks_at_once, len(group.rows))
            try:
                found = None
                if compiles and plan.way is not None:
                    most = max(size, plan.way.tasks_at_once)
                    found = compiled_curve(plan.learner, group, points, plan.way, measured is True, quietly)
                if found is None:
                    problems = (problem(chunk, ways=group.ways) for chunk in chunks(group.tasks, size))
                    found = curves(problems, points, measure)
                parts.append(found)
            except Exception as error:  # whatever a module raises
                plan.halve(most, error, group.tasks)
    listed = not isinstance(tasks, Task) and measure is None
    return [
        (in_order(own, losses), (one_by_one if listed else in_order)(own, outputs))
        for losses, outputs in (zip(*of_groups) for of_groups in zip(*parts))
    ]


def compiled_curve(
    learner: MetaLearner,
    group: Group,
    points: Sequence[tuple[int, Statistics]],
    own: Way,
    measured: bool = False,
    quietly: bool = False,
) -> list[tuple[Tensor, Tree]] | None:
    """As `curves`, compiled; None where that cannot be, which a warning has then said, or where a model draws random
    numbers, which are to be those of the uncompiled engine. quietly: without that warning.

    The last stack is filled up with its last task, so that one shape is enough.
    """
    find = partial(_curve, learner, tuple(points), group.ways, measured)
    facts = ("curve", own.engine, group.ways, tuple(points), measured)
    parts = [*chunks(group.tasks, own.tasks_at_once)]
    missing = own.tasks_at_once - count(parts[-1])
    if missing:
        parts[-1] = mapped(lambda t: torch.cat([t, t[-1:].expand(missing, *t.shape[1:])]), parts[-1])
    function = _function(learner, parts, find, facts, own, quietly)
    if function is None:
        return None
    found = [part.points for part in function.map(parts)]
    return [mapped(lambda tensor: tensor[: len(group.rows)], joined([*of_point])) for of_point in zip(*found)]


def _function(
    learner: MetaLearner, parts: Sequence[Task], find: Any, facts: tuple, own: Way, quietly: bool = False
) -> Compiled | None:
    """What is compiled for such chunks, see `cache.function`."""
    from fomaml.engines.compiled import cache

    alone = partial(find, "loop") if own.stacks else None
    side_by_side = 1 < torch.get_num_threads() <= len(parts)
    on_cpu = device_of(parts[0]).type == "cpu"
    made = cache.function(
        learner, parts[0], partial(find, own.engine), facts, alone, side_by_side, parts[1:], plainly=on_cpu
    )
    if not quietly and (text := made.warning()):
        warnings.warn(text, RuntimeWarning, stacklevel=6)
    return None if made.function is None or made.function.draws else made.function


def _curve(
    learner: MetaLearner,
    points: Sequence[tuple[int, Statistics]],
    ways: int | None,
    measured: bool,
    engine: str,
    chunk: Task,
) -> Curve:
    problem = ENGINES[engine](learner, chunk, evaluating=True, ways=ways, measured=measured)
    return Curve([], tuple(curves([problem], points)))


# --- one task after the other -----------------------------------------------------------------------


class _Kept:
    """What an adapter keeps, which refers to no learner. ways: by shapes and number of classes. calls: likewise."""

    def __init__(self) -> None:
        self.ways: dict[tuple, Way] = {}
        self.calls: dict[tuple, int] = {}
        self.replicas: tuple[Compiled, Replicas] | None = None


class Adapter:
    """Adapts to one task after the other, each of the same shapes; see `adapter`, which makes it."""

    def __init__(
        self,
        learner: MetaLearner,
        steps: int,
        statistics: Statistics,
        compile: Compile = True,
        kept: _Kept | None = None,
    ):
        self.learner = learner
        self.steps = steps
        self.statistics = statistics
        self.compile = compile
        self._kept = _Kept() if kept is None else kept

    def __call__(self, support: Examples | list[Examples]) -> Any:
        """The module adapted to a task, as `learner.adapt` returns it; of a list of support sets a list of modules."""
        if isinstance(support, list) and all(isinstance(each, Examples) for each in support):
            return [self(each) for each in support]
        learner = self.learner
        with turn_of(learner.model), ordinary_modes():
            given = as_examples(support, learner.model)
            tasks = Task(given, given).map(lambda tensor: tensor[None])
            function = self._compiled(tasks, given) if self.compile and self.steps else None
            if function is None:
                return learner.adapt(given, self.steps, self.statistics)
            found = function(tasks)
            if self._kept.replicas is None or self._kept.replicas[0] is not function:
                self._kept.replicas = function, Replicas(learner.model, evaluating=True)
            parameters = {
                name: value[0] if fills_its_memory(value) else value[0].clone()
                for name, value in found.parameters.items()
            }
            buffers = {name: value[0] for name, value in found.buffers.items()}
            replicas = self._kept.replicas[1]
            return learner.module_at(
                replicas, parameters, buffers, given, self.steps, self.statistics, fresh=True
            )

    def _compiled(self, tasks: Task, given: Examples) -> Compiled | None:
        [group] = groups(self.learner, tasks)
        key = group.ways, shape_of(tasks)
        kept = self._kept
        if self.compile == "auto" and key not in kept.ways:
            kept.calls[key] = calls = kept.calls.get(key, 0) + 1
            if not pays_again(self.learner, tasks, calls, self.steps):
                return None
        own = kept.ways.get(key)
        if own is None:
            # whatever is wrong with the learner or the examples is told in words
            self.learner.adapt(given, self.steps, self.statistics)
            own = kept.ways[key] = way(self.learner, tasks, "loop", True, 1)
        find = partial(_reach, self.learner, self.steps, group.ways)
        facts = ("adapt", own.engine, group.ways, self.steps)
        return _function(self.learner, [tasks], find, facts, own, quietly=self.compile == "auto")


def _reach(learner: MetaLearner, steps: int, ways: int | None, engine: str, chunk: Task) -> Reached:
    problem = ENGINES[engine](learner, chunk, evaluating=True, ways=ways)
    adapted, losses = problem.start, []
    for adapted, loss in islice(problem.path(first_order=True), steps):
        losses.append(loss)
    found = (
        {name: value.detach() for name, value in adapted.items()},
        dict(problem.buffers),
        torch.stack(losses, -1),
    )
    return Reached([], *(found if problem.stacked else mapped(lambda tensor: tensor[None], found)))


def adapter(
    learner: MetaLearner,
    support_like: Examples,
    steps: int | None = None,
    statistics: Statistics = "own",
    *,
    compile: Compile = True,
) -> Adapter:
    """What adapts to tasks like this one again and again, faster than `learner.adapt` does: `adapter(support)`.

    support_like: a support set (examples, ...) of the shapes that are to come; others are taken too, and are compiled
        when they come. steps, statistics: as of `learner.adapt`.
    compile: the inner steps are traced once for each shape and compared with the uncompiled ones, which takes a second
        or more; on a CPU convolutions go through the kernels of this library. Where that cannot be a warning says so,
        and `learner.adapt` is called. False: always. "auto": as in `adapt`.

    Raises:
        InputError: as `learner.adapt`, at once and at each call; a `compile` that is none of the three.
    """
    found = _adapter(learner, steps, statistics, compile, _Kept())
    found(support_like)
    return found


def adapt(
    learner: MetaLearner,
    support: Examples | list[Examples],
    steps: int | None = None,
    statistics: Statistics = "own",
    *,
    compile: Compile = False,
) -> Any:
    """`learner.adapt`, whose inner steps may be compiled; of a list of support sets a list of modules.

    compile: False; True, which is for shapes that come back: what is compiled is kept with the learner; or "auto", from
        the call on with which those of the same shapes before it would have paid for it.

    Raises:
        InputError: as `learner.adapt`; a `compile` that is none of the three.
    """
    kept = _kept.setdefault(learner, {}).setdefault((steps, statistics), _Kept())
    return _adapter(learner, steps, statistics, compile, kept)(support)


def _adapter(
    learner: MetaLearner, steps: int | None, statistics: Statistics, compile: Compile, kept: _Kept
) -> Adapter:
    check_compile(compile)
    check_choice("statistics of an adapted module", statistics, ("own", "support"))
    steps = learner.inner_steps if steps is None else whole("steps", steps)
    return Adapter(learner, steps, statistics, compile, kept)


_kept: WeakKeyDictionary[MetaLearner, dict[tuple, _Kept]] = WeakKeyDictionary()
