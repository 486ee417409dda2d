"""N-way K-shot task batches, each a pure function of (seed, index)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fomaml.data.augment import jittered, turned
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.devices import sent
from fomaml.draws import Numbers, checked_seed, distinct, first, generator, uniforms
from fomaml.errors import InputError, not_negative, positive, shown, whole
from fomaml.memory import check_fits
from fomaml.tasks import Batch, Examples, Task, one, stack
from fomaml.trees import Tree, mapped

FLOAT64 = 8  # bytes
FEWER = "take fewer tasks at once, or smaller ways, shots or query_shots"


class TaskSequence(Protocol):
    """What training and evaluation take tasks from, each a function of its index alone; `Episodes` is one.

    ways: the number of classes of a task; None for regression, or where it is not known.
    complete: whether the support set of each task has examples of all of them, with the labels 0 … ways - 1.
    copies: how many times each image of a set stands in it, one after the other, see `Episodes`.

    An object of one's own may have `batch` alone: it then counts as tasks of unknown ways and of one copy. A type
    checker wants `ways` and `copies` too, which a subclass of this has.
    """

    @property
    def ways(self) -> int | None:
        return None

    @property
    def copies(self) -> int:
        return 1

    def batch(self, start: int, tasks: int, /) -> Batch:
        """Tasks start … start + tasks - 1, with a leading axis (tasks, ...); or, of unequal shapes, a list of them."""
        ...


def ways_of(episodes: TaskSequence) -> int | None:
    return getattr(episodes, "ways", None)


def ways_of_each(episodes: TaskSequence) -> int | None:
    """The number of classes that each support set has, where the episodes know it, so that no label has to be read."""
    return ways_of(episodes) if getattr(episodes, "complete", False) else None


def copies_of(episodes: TaskSequence) -> int:
    return getattr(episodes, "copies", 1)


Augment: TypeAlias = Callable[[Any, np.random.Generator], Any]
AugmentTask: TypeAlias = Callable[[Task, np.random.Generator], Task]


class Augmentation:
    """Random changes of tasks, functions of seed and index: the same bits in whichever batch and process.

    augment: (inputs, random) → inputs, of the inputs (examples, ...) of one set, decoded, a nesting where they are one.
        It is called for the support set and then for the query set, with the same `random`: noise or a crop of each
        example for itself.
    augment_task: (task, random) → task, after it: the same change of support and query, as a sensor that is mounted in
        another way, or a change of one of the two sets alone.

    `random` is a numpy generator of the seed and the task's index; what else is random in them would not be repeated.
    Both are given one task, without an axis of tasks, whose tensors they may change in place.

    Raises:
        InputError: they give other structures, shapes, dtypes or devices than they are given.
    """

    def __init__(self, seed: int, augment: Augment | None = None, augment_task: AugmentTask | None = None):
        for name, given in (("augment", augment), ("augment_task", augment_task)):
            if given is not None and not callable(given):
                raise InputError(f"{name} must be a function of two arguments, got {shown(given)}")
        self.seed, self.augment, self.augment_task = seed, augment, augment_task

    def __bool__(self) -> bool:
        return self.augment is not None or self.augment_task is not None

    def __call__(self, tasks: list[Task], start: int) -> list[Task]:
        """The tasks start, start + 1 …, changed."""
        return [self._changed(task, start + number) for number, task in enumerate(tasks)]

    def _changed(self, task: Task, index: int) -> Task:
        if self.augment is not None:
            random = generator(self.seed, index, stream=1)
            sets = []
            for name, part in zip(Task._fields, task):
                found = self.augment(_own_nesting(part.inputs), random)
                _check_alike(found, part.inputs, "augment", f"the {name} inputs", index)
                sets.append(part._replace(inputs=found))
            task = Task(*sets)
        if self.augment_task is not None:
            found = self.augment_task(_own_nesting(task), generator(self.seed, index, stream=2))
            _check_alike(found, task, "augment_task", "", index)
            task = found
        return task


def _own_nesting(tree: Tree) -> Tree:
    """The same tensors in dicts and tuples of their own, so that what a function puts into a dict is seen."""
    return mapped(lambda tensor: tensor, tree)


def _check_alike(found: Any, given: Tree, function: str, what: str, index: int) -> None:
    """Raise `InputError` where a nesting differs from the one given in more than its numbers."""
    difference = _difference(found, given, "")
    if difference is not None:
        place, got, expected = difference
        own = f"{what}{place}".lstrip(".")
        raise InputError(
            f"{function} gave {got} for {own + ' of ' if own else ''}task {index}, expected {expected}: it may change "
            "numbers alone"
        )


def _difference(found: Any, given: Tree, place: str) -> tuple[str, str, str] | None:
    """The first place where they differ, what is there, and what was."""
    if isinstance(given, Tensor):
        kinds = _kind(found), _kind(given)
        return None if kinds[0] == kinds[1] else (place, *kinds)
    keys = list(given) if isinstance(given, dict) else range(len(given))
    own = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, tuple) else None
    if type(found) is not type(given) or own != keys:
        return place, _kind(found), _kind(given)
    fields = getattr(given, "_fields", None)
    for number, key in enumerate(keys):
        within = f".{fields[number]}" if fields else f"[{key!r}]"
        if (difference := _difference(found[key], given[key], place + within)) is not None:
            return difference
    return None


def _kind(given: Any) -> str:
    """A tensor or a nesting, in words."""
    if isinstance(given, Tensor):
        return f"{given.dtype} {tuple(given.shape)} on {given.device}"
    more = f" of {', '.join(map(repr, given))}" if isinstance(given, dict) else ""
    more = f" of {len(given)}" if isinstance(given, tuple | list) else more
    return f"{type(given).__name__}{more}"


class Episodes:
    """An endless, indexable sequence of N-way K-shot classification tasks (Vinyals et al. 2016).

    `episodes[i]` is one `Task`; `episodes.batch(i, n)` is the tasks i … i + n - 1 stacked. Both are
    pure functions of the seed and the index: no state, the same bits in every process. Classes of a
    task are drawn without replacement and numbered 0 … ways - 1 in random order; support and query
    never share an example.

    turns: each class of a task is turned as a whole by 0, 90, 180 or 270 degrees, drawn anew in each task
        (as in the code of Finn et al. 2017, for training and test). The classes and examples drawn are
        the same as without. `augment.rotated` is the other way: there, two turns of one class can meet in a task.
    jitter: the strength of a small random affine map of each image, see `augment.jittered`; 0 for none.
    copies: each image stands so many times in its set, first as it is and then moved by jitter. The classes and
        examples drawn are the same as without. For test-time augmentation: `evaluate` averages a query image's
        outputs over its copies.
    augment, augment_task: random changes of a set's inputs and of a whole task, see `Augmentation`, after all else.
        The classes and examples drawn are the same as without.

    Shapes of one task: support inputs (ways · shots · copies, ...), query inputs (ways · query_shots · copies, ...),
    targets int64. Examples are ordered by class, an image's copies one after the other. Tensors live where
    the source's inputs do.

    Raises:
        InputError: fewer classes than ways, or a class with fewer than shots + query_shots
            examples (the message names it), or a number that is not positive, turns of what is no
            square image, or jitter of what is no image, or copies without jitter; what `Augmentation` raises.
    """

    complete = True

    def __init__(
        self,
        source: ClassSource,
        *,
        ways: int,
        shots: int,
        query_shots: int,
        seed: int = 0,
        turns: bool = False,
        jitter: float = 0.0,
        copies: int = 1,
        augment: Augment | None = None,
        augment_task: AugmentTask | None = None,
    ):
        self.source = source
        self.ways = positive("ways", ways, integer=True)
        self.shots = positive("shots", shots, integer=True)
        self.query_shots = positive("query_shots", query_shots, integer=True)
        self.seed = checked_seed(seed)
        self.turns = turns
        self.jitter = not_negative("jitter", jitter)
        self.copies = positive("copies", copies, integer=True)
        self.augmentation = Augmentation(self.seed, augment, augment_task)
        if copies > 1 and not jitter:
            raise InputError(
                f"{copies} copies of each image are the same without jitter, got jitter {jitter}"
            )
        shape = tuple(source.inputs.shape[1:])
        if jitter and len(shape) != 3:
            raise InputError(
                f"jitter needs images (channels, height, width), but the inputs have shape {shape}"
            )
        if turns and (len(shape) != 3 or shape[1] != shape[2]):
            raise InputError(
                f"turns by 90 degrees need square images (channels, side, side), but the inputs have shape {shape}"
            )
        if len(source) < self.ways:
            raise InputError(f"{ways} ways need {ways} classes, but there are {len(source)}")
        drawn = self.shots + self.query_shots
        smallest = int(source.counts.argmin())
        if source.counts[smallest] < drawn:
            raise InputError(
                f"class {source.names[smallest]!r} has {int(source.counts[smallest])} examples, but "
                f"{shots} shots + {query_shots} query examples per class need {drawn}"
            )

    @property
    def draws_aside(self) -> bool:
        """Whether another thread may draw tasks: no function or array of the user's is called."""
        return not self.augmentation and self.source.reads_aside

    @property
    def only_gathers(self) -> bool:
        """Whether tasks are rows of what lies in a CPU's memory, as they are."""
        inputs = self.source.inputs
        ready = isinstance(inputs, Tensor) and inputs.is_cpu and self.source.decode is None
        return ready and not (self.turns or self.jitter or self.augmentation)

    def __getitem__(self, index: int) -> Task:
        return one(self.batch(index, 1), 0)

    def classes_of(self, index: int) -> list[str]:
        """The names of the classes of a task, in the order of its labels."""
        # the first numbers of a task decide on its classes, see `batch`
        randoms = generator(self.seed, whole("the number of a task", index)).random(len(self.source))
        return [self.source.names[number] for number in randoms.argsort()[: self.ways]]

    def batch(self, start: int, tasks: int) -> Task:
        """Tasks start … start + tasks - 1, with a leading axis (tasks, ...)."""
        return self.taken(self.numbers(start, tasks), start)

    def numbers(self, start: int, tasks: int) -> Numbers:
        """Which examples tasks start … start + tasks - 1 consist of, and how these are moved; see `taken`."""
        start, tasks = whole("the number of the first task", start), whole("tasks", tasks)
        drawn = self.shots + self.query_shots
        examples = self.ways * drawn
        # their random numbers alone
        check_fits(f"{tasks} tasks of {examples} examples", 2 * FLOAT64 * tasks * examples, FEWER)
        parts = [
            *(len(self.source), examples, examples),
            *(self.ways if self.turns else 0, 6 * examples * self.copies if self.jitter else 0),
        ]
        randoms = uniforms(self.seed, start, tasks, sum(parts))
        for_classes, for_examples, for_order, for_turns, for_jitter = np.split(
            randoms, np.cumsum(parts)[:-1], axis=1
        )
        classes = first(for_classes, self.ways)  # (tasks, ways)
        rows = distinct(
            self.source.counts.numpy()[classes],
            for_examples.reshape(tasks, self.ways, drawn),
            for_order.reshape(tasks, self.ways, drawn),
        )
        return Numbers(
            rows + self.source.offsets.numpy()[classes][..., None],
            (4 * for_turns).astype(np.int64) if self.turns else None,
            for_jitter.reshape(tasks, self.ways, drawn, self.copies, 6) if self.jitter else None,
        )

    def taken(self, numbers: Numbers, start: int) -> Task:
        """The tasks of such numbers. start: the number of the first of them, for an augmentation."""
        tasks = len(numbers.rows)
        device = self.source.inputs.device if isinstance(self.source.inputs, Tensor) else torch.device("cpu")
        given = [torch.from_numpy(each) for each in numbers if each is not None]
        if self.jitter:
            exact = torch.float64 in (self.source.inputs.dtype, torch.get_default_dtype())
            given[-1] = given[-1] if exact or device.type == "cpu" else given[-1].float()
        rows, *others = sent(given, device)
        split = [self.shots, self.query_shots]
        quarters = others.pop(0) if self.turns else None
        maps = others.pop().split(split, dim=2) if self.jitter else (None, None)
        targets = torch.arange(self.ways, device=device).view(1, -1, 1).expand(rows.shape)
        batch = Task(
            *(
                self._examples(own, labels, quarters, own_maps)
                for own, labels, own_maps in zip(
                    self.source.take_each(rows.split(split, dim=2)), targets.split(split, dim=2), maps
                )
            )
        )
        if self.augmentation and tasks:
            batch = stack(self.augmentation([one(batch, number) for number in range(tasks)], start))
        return batch

    def _examples(
        self, inputs: Tensor, targets: Tensor, quarters: Tensor | None, maps: Tensor | None
    ) -> Examples:
        """inputs: (tasks, ways, examples, ...)."""
        if quarters is not None:
            inputs = turned(inputs, quarters)
        if maps is not None:
            copies = inputs.unsqueeze(3).expand(*targets.shape, self.copies, *inputs.shape[3:])
            moved = jittered(copies, maps, self.jitter)
            if self.copies > 1:
                moved[:, :, :, 0] = inputs
            inputs = moved.flatten(2, 3)
            targets = targets.repeat_interleave(self.copies, dim=2)
        return Examples(inputs.flatten(1, 2), targets.flatten(1).contiguous().to(inputs.device))


class Family(Protocol):
    """Functions to regress on. inputs: the interval that their arguments are drawn from."""

    @property
    def inputs(self) -> tuple[float, float]: ...

    def draw(self, random: np.random.Generator, /) -> Callable[[np.ndarray], np.ndarray]:
        """One function of the family, from (n,) to (n,)."""
        ...


class RegressionEpisodes:
    """An endless, indexable sequence of regression tasks drawn from a family of functions.

    family: what the functions are drawn from; `fomaml.data.synthetic.Sinusoids` is one.
    Shapes of one task: inputs and targets (shots, 1) and (query_shots, 1), in torch's default dtype.
    """

    ways = None
    copies = 1

    def __init__(self, family: Family, *, shots: int, query_shots: int, seed: int = 0, device=None):
        self.family = family
        self.shots = positive("shots", shots, integer=True)
        self.query_shots = positive("query_shots", query_shots, integer=True)
        self.seed = checked_seed(seed)
        self.device = device

    def __getitem__(self, index: int) -> Task:
        return one(self.batch(index, 1), 0)

    def batch(self, start: int, tasks: int) -> Task:
        """Tasks start … start + tasks - 1, with a leading axis (tasks, ...)."""
        start, tasks = whole("the number of the first task", start), whole("tasks", tasks)
        drawn = self.shots + self.query_shots
        check_fits(f"{tasks} tasks of {drawn} examples", 2 * FLOAT64 * tasks * drawn, FEWER)
        if type(self.family) is Sinusoids:
            inputs, targets = self.family.many(uniforms(self.seed, start, tasks, Sinusoids.numbers + drawn))
        else:
            inputs, targets = self._one_by_one(start, tasks, drawn)
        if not np.isfinite(targets).all():
            row = int(np.isfinite(targets).all(axis=(1, 2)).argmin())
            raise InputError(
                f"the function of task {start + row} is not finite for some inputs; change the family, "
                f"{shown(self.family)}, or the interval of its inputs"
            )
        dtype = torch.get_default_dtype()
        both = sent([torch.from_numpy(each).to(dtype) for each in (inputs, targets)], self.device)
        support, query = zip(*(each.split([self.shots, self.query_shots], dim=1) for each in both))
        # each in memory of its own, once for all the batches that are made of these tasks
        return Task(*(Examples(*(each.contiguous() for each in part)) for part in (support, query)))

    def _one_by_one(self, start: int, tasks: int, drawn: int) -> tuple[np.ndarray, np.ndarray]:
        """(tasks, drawn, 1) inputs and targets."""
        inputs, targets = np.empty((tasks, drawn, 1)), np.empty((tasks, drawn, 1))
        for row in range(tasks):
            random = generator(self.seed, start + row)
            function = self.family.draw(random)
            inputs[row, :, 0] = random.uniform(*self.family.inputs, drawn)
            targets[row, :, 0] = function(inputs[row, :, 0])
        return inputs, targets
