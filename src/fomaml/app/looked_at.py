"""Test tasks of a run, looked at: what is predicted before and after adaptation, and where that is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fomaml.app.build import Data, for_test
from fomaml.app.calibrate import Known, nearest
from fomaml.app.group_tasks import scaling_of
from fomaml.app.scores import headline
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of
from fomaml.data.rows import each
from fomaml.engines import plan as make_plan
from fomaml.episodes import copies_of
from fomaml.errors import InputError
from fomaml.evaluate import batches, judged
from fomaml.learning.forward import called
from fomaml.learning.learner import MetaLearner
from fomaml.learning.mistakes import selected
from fomaml.measures import exact
from fomaml.metrics import Metric
from fomaml.scoring import measured_for, query_targets
from fomaml.serve.calibration import Reliability, reliability
from fomaml.tasks import Batch, Examples, Task, as_batch, one
from fomaml.trees import Tree, mapped

AT_ONCE = 50  # tasks
GRID = 200  # points of a curve
OVER = 0.05  # that a curve goes on beyond the examples, of their extent


@dataclass(frozen=True)
class TaskLooked:
    """A task with what was said of it.

    name: of its group, where it is of one. classes: of its labels. before, after: its scores. task: inputs and targets
    in their own unit, an image once for all its copies. said_before, said_after: of the query set, (examples, classes)
    probabilities, or (examples, targets) values. curve: of functions of one number x, and y before and after.
    """

    number: int
    name: str | None
    classes: list[str] | None
    before: float
    after: float
    task: Task
    said_before: Tensor
    said_after: Tensor
    curve: tuple[Tensor, Tensor, Tensor] | None = None


@dataclass
class Looked:
    """What was seen on the first test tasks.

    scores: (tasks,) by inner steps, 0 and `steps`. names: of each task. shown: in the order of their numbers.
    confusions: (true class, predicted class) → query examples, after adaptation. reliable: without a temperature and,
    where the run is calibrated, with it. truth, before, after: (examples, targets) in their own unit, of regression.
    """

    steps: int
    metric: Metric
    scores: dict[int, Tensor]
    names: list[str]
    shown: list[TaskLooked] = field(default_factory=list)
    confusions: Counter[tuple[str, str]] = field(default_factory=Counter)
    reliable: dict[str, Reliability] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    truth: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None

    def worst(self, number: int) -> list[int]:
        """The tasks with the worst scores after adaptation, the worst first; a score that is no number is the worst."""
        scores = (self.metric.direction * self.scores[self.steps]).nan_to_num(nan=-torch.inf)
        return scores.argsort(stable=True)[:number].tolist()


def look(
    settings: Settings, learner: MetaLearner, data: Data, tasks: int, shown: int, known: list[Known]
) -> Looked:
    """Adapt to the first test tasks, as the run's test does.

    shown: of so many tasks all examples are kept: the first ones, and the worst. known: calibrations.

    Raises:
        InputError: outputs or targets that are neither of classes nor numbers of each example.
    """
    tested, episodes, steps = for_test(settings, learner), data.test, settings.test_steps[-1]
    regression = source_of(settings).kind == "regression"
    metric = headline(settings)
    points: list[Any] = [(0, settings.statistics), (steps, settings.statistics)]
    if not regression:
        points.append((steps, "support"))  # as an adapted model is used, and as temperatures are fitted
    parts, plan = _Parts(settings, regression), None
    first, last = points[:2]
    scored: dict[Any, list[Tensor]] = {first: [], last: []}
    points = sorted(dict.fromkeys(points), key=lambda point: point[0])
    for batch in batches(episodes, tasks, max(1, AT_ONCE // copies_of(episodes)), tested.model):
        plan = plan or make_plan(tested, batch, engine="auto")
        found = plan.curve(batch, points, learner.loss is not None)
        measures = measured_for(tested, metric)
        own = plan.curve(batch, points, measures) if callable(measures) else found
        for point, (losses, outputs) in zip(points, own):
            if point in scored:
                score = judged(episodes, metric, outputs, query_targets(batch), losses)
                scored[point].append(exact(score))
        parts.add(batch, {point: outputs for point, (_, outputs) in zip(points, found)}, episodes)
    scores = {point: torch.cat(own) for point, own in scored.items()}
    looked = Looked(steps, metric, {0: scores[first], steps: scores[last]}, parts.names)
    if regression:
        looked.targets = _target_names(settings, parts.targets[0].shape[1])
        looked.truth = torch.cat(parts.targets)
        looked.before, looked.after = (torch.cat(parts.said[point]) for point in (first, last))
    else:
        _of_classes(looked, parts, last, (steps, "support"), settings, known)
    for number in _chosen(looked, tasks, shown):
        looked.shown.append(_task(looked, number, parts, episodes, tested, settings, (first, last)))
    return looked


class _Parts:
    """What the tasks have given, task by task: names, classes, targets, and by point what was said."""

    def __init__(self, settings: Settings, regression: bool):
        self.regression = regression
        self.scaling = scaling_of(settings)
        self.names: list[str] = []
        self.classes: list[list[str] | None] = []
        self.targets: list[Tensor] = []
        self.said: dict[Any, list[Tensor]] = {}

    def add(self, batch: Batch, outputs: dict[Any, Tree], episodes: Any) -> None:
        copies = copies_of(episodes)
        for number in range(len(batch.query.targets) if isinstance(batch, Task) else len(batch)):
            task = one(batch, number) if isinstance(batch, Task) else batch[number]
            index = len(self.names)
            classes = None if self.regression else episodes.classes_of(index)
            self.classes.append(classes)
            group = episodes.group(index) if hasattr(episodes, "group") else None
            self.names.append(f"task {index}" if group is None else f"task {index}, of {group}")
            targets = task.query.targets
            for point, of_tasks in outputs.items():
                own = of_tasks[number]
                if not isinstance(own, Tensor) or not isinstance(targets, Tensor):
                    raise InputError("outputs or targets of several tensors are not shown")
                self.said.setdefault(point, []).append(self._said(own.detach().cpu(), targets, copies))
            own = targets[::copies].cpu()
            self.targets.append(self.in_own_unit(own) if self.regression else own)

    def _said(self, outputs: Tensor, targets: Tensor, copies: int) -> Tensor:
        """Logits, averaged over the copies of an image; or values in their own unit."""
        if self.regression:
            if outputs.numel() != targets.numel():
                raise InputError(
                    f"outputs {tuple(outputs.shape)} of targets {tuple(targets.shape)} are not values of them"
                )
            return self.in_own_unit(outputs.reshape(targets.shape))
        if outputs.dim() != 2 or targets.dim() != 1:
            raise InputError(
                f"outputs {tuple(outputs.shape)} of labels {tuple(targets.shape)} are not a row for each example"
            )
        return outputs.double() if copies == 1 else outputs.double().unflatten(0, (-1, copies)).mean(1)

    def in_own_unit(self, values: Tensor) -> Tensor:
        """(examples, targets) float64."""
        columns = values.double() if values.dim() > 1 else values.double()[:, None]
        return self.scaling.unscaled(columns).flatten(1)

    def shown(self, part: Examples, copies: int) -> Examples:
        """Each image once, in the place of its copies; numbers in their own unit."""

        def leaf(values: Tensor, place: str) -> Tensor:
            standard = self.scaling.inputs.get(place)
            return values if standard is None else standard.unscaled(values.double())

        own = mapped(lambda tensor: tensor[::copies], part)
        return own._replace(inputs=each(own.inputs, leaf))


def _of_classes(
    looked: Looked, parts: _Parts, last: Any, served: Any, settings: Settings, known: list[Known]
) -> None:
    """Confusions, and how reliable the probabilities are."""
    for classes, labels, logits in zip(parts.classes, parts.targets, parts.said[last]):
        assert classes is not None
        for true, guess in zip(labels.tolist(), logits.argmax(1).tolist()):
            looked.confusions[
                classes[true], classes[guess] if guess < len(classes) else f"output {guess}"
            ] += 1
    width = min(len(classes or ()) for classes in parts.classes)
    logits = torch.cat([own[:, :width] for own in parts.said[served]])
    labels = torch.cat(parts.targets)
    if not logits.isfinite().all():
        return
    looked.reliable["without a temperature"] = reliability(logits.softmax(1), labels)
    if (own := nearest(known, settings.ways, settings.shots)) is not None:
        temperature = own.temperature_after(looked.steps)
        looked.reliable[f"with the temperature {temperature:.3g}"] = reliability(
            (logits / temperature).softmax(1), labels
        )


def _chosen(looked: Looked, tasks: int, shown: int) -> list[int]:
    """The numbers of the tasks that are shown: the first ones, and the worst of all."""
    if not shown:
        return []
    first = list(range(min(tasks, shown)))
    worst = looked.worst(1)[0]
    return first if worst in first or shown == 1 else [*first[:-1], worst]


def _task(
    looked: Looked,
    number: int,
    parts: _Parts,
    episodes: Any,
    learner: MetaLearner,
    settings: Settings,
    points: Any,
) -> TaskLooked:
    batch = as_batch(episodes.batch(number, 1), learner.model)
    task = one(batch, 0) if isinstance(batch, Task) else batch[0]
    copies = copies_of(episodes)
    said = [parts.said[point][number] for point in points]
    curve = None
    if parts.regression:
        curve = _curve(task, learner, looked, parts, settings)
        task = Task(*(part._replace(targets=parts.in_own_unit(part.targets.cpu())) for part in task))
    else:
        said = [own.softmax(1) for own in said]
    own = [parts.shown(part, copies) for part in task.to("cpu")]
    before, after = (float(looked.scores[steps][number]) for steps in (0, looked.steps))
    group = episodes.group(number) if hasattr(episodes, "group") else None
    return TaskLooked(
        number, group, parts.classes[number], before, after, Task(*own), said[0], said[1], curve
    )


@torch.no_grad()
def _curve(
    task: Task, learner: MetaLearner, looked: Looked, parts: _Parts, settings: Settings
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of a function of one number: places, and values before and after; None of others."""
    inputs = task.support.inputs
    if not isinstance(inputs, Tensor) or tuple(inputs.shape[1:]) != (1,) or len(looked.targets) != 1:
        return None
    both = torch.cat([part.inputs for part in task]).flatten()
    room = OVER * (both.max() - both.min())
    grid = torch.linspace(float(both.min() - room), float(both.max() + room), GRID).to(both)[:, None]
    kind: Any = settings.statistics if settings.statistics != "with-query" else "support"
    values = []
    for steps in (0, looked.steps):
        with torch.enable_grad():
            module = learner.adapt(task.support, steps, kind).eval()
        values.append(
            parts.in_own_unit(selected(called(module, module, grid), settings.output).cpu()).flatten()
        )
    standard = parts.scaling.inputs.get("")
    places = grid.cpu().double() if standard is None else standard.unscaled(grid.cpu().double())
    return places.flatten(), values[0], values[1]


def _target_names(settings: Settings, number: int) -> list[str]:
    names = settings.facts["targets"] if settings.facts is not None else None
    return (
        list(names)
        if names and len(names) == number
        else ["y"]
        if number == 1
        else [f"y{n}" for n in range(number)]
    )
