"""What a run's confidence is worth: temperatures and the best numbers of steps, fitted on validation tasks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fomaml import regular
from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import Data, for_test, open_data
from fomaml.app.report import align
from fomaml.app.rundir import is_number
from fomaml.app.settings import DIGESTS, Settings
from fomaml.app.sources import source_of
from fomaml.engines import plan
from fomaml.errors import InputError
from fomaml.evaluate import batches
from fomaml.files import write_json
from fomaml.learning.forward import called
from fomaml.learning.learner import MetaLearner
from fomaml.learning.mistakes import selected
from fomaml.sealed import unsealed
from fomaml.serve.calibration import calibrated
from fomaml.tasks import Batch, Examples, are_labels, count, one

CALIBRATION = "calibration.json"
FORMAT = 1
TASKS = 100  # by default
AT_ONCE = 20
OF_STEPS = ("temperature", "error", "error_before", "accuracy")


class Known(NamedTuple):
    """The calibration of tasks of so many ways and shots.

    by_steps: after each number of steps its temperature, error, error_before and accuracy.
    """

    ways: int
    shots: int
    tasks: int
    by_steps: dict[int, dict[str, float]]

    @property
    def best_steps(self) -> int:
        """The number of steps with the highest accuracy, of equal ones the fewest."""
        return max(self.by_steps, key=lambda steps: (self.by_steps[steps]["accuracy"], -steps))

    def at(self, steps: int) -> int:
        """The nearest number of steps that there is a temperature for."""
        return min(self.by_steps, key=lambda own: (abs(own - steps), own))

    def temperature_after(self, steps: int) -> float:
        return self.by_steps[self.at(steps)]["temperature"]

    def told(self, steps: int) -> dict[str, Any]:
        """JSON-able: what the temperature is from."""
        own = self.at(steps)
        return {
            "ways": self.ways,
            "shots": self.shots,
            "tasks": self.tasks,
            "steps": own,
            **self.by_steps[own],
        }


def read_calibration(run: Path, checked: bool = False) -> list[Known]:
    """The calibrations of a run directory; none where there is no file. checked: it must have a digest.

    Raises:
        InputError: a damaged file.
    """
    path = run / CALIBRATION
    try:
        rows = unsealed(regular.read_text(path), required=checked)["calibrations"]
        return [_known(row) for row in rows]
    except InputError:
        raise
    except OSError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged; delete it, and run fomaml calibrate again") from None


def _known(row: dict[str, Any]) -> Known:
    """A calibration as it is kept; what was not finite is null there.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is none.
    """
    counts = [row[name] for name in ("ways", "shots", "tasks")]
    by_steps = {
        int(steps): {name: math.nan if own[name] is None else own[name] for name in OF_STEPS}
        for steps, own in row["by_steps"].items()
    }
    numbers = [value for own in by_steps.values() for value in own.values()]
    if not by_steps or not all(map(is_number, [*counts, *numbers])) or min(counts) < 1:
        raise ValueError
    if not all(own["temperature"] > 0 for own in by_steps.values()):
        raise ValueError
    ways, shots, tasks = counts
    return Known(ways, shots, tasks, by_steps)


def nearest(known: Sequence[Known], ways: int, shots: int) -> Known | None:
    """The calibration whose ways and shots are nearest by ratio; None where there are none."""

    def distance(own: Known) -> float:
        return abs(math.log(own.ways / ways)) + abs(math.log(own.shots / shots))

    return min(known, key=distance, default=None)


def calibrate(
    run: Path,
    settings: Settings,
    learner: MetaLearner,
    ways: Sequence[int] | None = None,
    shots: Sequence[int] | None = None,
    tasks: int = TASKS,
    say: Callable[[str], None] = lambda line: None,
) -> list[Known]:
    """Fit temperatures on validation tasks and write calibration.json; what it has of other ways and shots is kept.

    Raises:
        InputError: a run of regression, or without validation tasks; ways that its head does not allow; too few
            examples for the shots; labels that are not one for each example.
    """
    if source_of(settings).kind == "regression":
        raise InputError("a temperature is for classes: this run predicts numbers")
    if settings.fixed_classes and ways not in (None, (settings.ways,)):
        raise InputError(
            f"the classes of the run are {settings.ways}, the same ones in all tasks: give no --ways"
        )
    if ways is not None and not ALGORITHMS[settings.algorithm].any_ways and set(ways) != {settings.ways}:
        raise InputError(
            f"the run learned a head for {settings.ways} ways; only a head made of classes takes any number "
            f"({', '.join(ANY_WAYS)})"
        )
    known = read_calibration(run, settings.format >= DIGESTS)
    found = {(own.ways, own.shots): own for own in known}
    for n in ways or (settings.ways,):
        for k in shots or sorted({settings.shots, 1, 5}):
            say(f"calibrating {n}-way {k}-shot on {tasks} validation tasks")
            try:
                own = dataclasses.replace(settings, ways=n, shots=k)
                found[n, k] = fitted(own, learner, open_data(own), tasks)
            except InputError as error:
                if shots is not None or k == settings.shots:
                    raise
                say(f"left out: {error}")
    write_calibration(run, found.values())
    return sorted(found.values())


def write_calibration(run: Path, found: Iterable[Known]) -> None:
    rows = [own._asdict() for own in sorted(found)]
    write_json(run / CALIBRATION, {"format": FORMAT, "calibrations": rows})


def calibrated_result(
    settings: Settings, learner: MetaLearner, data: Data, run: Path, say: Callable[[str], None]
) -> dict:
    """What the result of a training says of its probabilities; the temperature goes into calibration.json."""
    try:
        found = fitted(settings, learner, data, min(TASKS, settings.validation_tasks))
    except InputError as error:
        say(f"probabilities are not calibrated: {error}")
        return {}
    write_calibration(run, [found])
    return {"calibration": found.told(settings.test_steps[-1])}


def fitted(settings: Settings, learner: MetaLearner, data: Data, tasks: int) -> Known:
    """The calibration of the ways and shots of these settings, with the statistics that an adapted model has.

    Raises:
        InputError: data without validation tasks; labels that are not one for each example.
    """
    if data.validation is None:
        raise InputError(f"{data.unvalidated}: temperatures are fitted on validation tasks")
    learner = for_test(settings, learner)
    logits: dict[int, list[Tensor]] = {steps: [] for steps in settings.test_steps}
    labels: list[Tensor] = []
    for batch in batches(data.validation, tasks, AT_ONCE, learner.model):
        adapted = _curve if learner.loss is None else _one_by_one
        for query, outputs in adapted(learner, batch, settings.test_steps):
            if not are_labels(query.targets) or query.targets.dim() != 1:
                raise InputError(
                    "a temperature is fitted on one label for each example, which these tasks lack"
                )
            labels.append(query.targets.cpu())
            for own, found in zip(logits.values(), outputs):
                own.append(found[:, : settings.ways].cpu())
    by_steps = {}
    for steps, own in logits.items():
        found = calibrated(own, labels)
        right = (torch.cat(own).argmax(1) == torch.cat(labels)).double().mean().item()
        by_steps[steps] = {
            "temperature": found.temperature,
            "error": found.error,
            "error_before": found.error_before,
            "accuracy": right,
        }
    return Known(settings.ways, settings.shots, tasks, by_steps)


def _curve(learner: MetaLearner, tasks: Batch, steps: Sequence[int]) -> Iterator[tuple[Examples, list]]:
    """The query set of each task, and its outputs after each number of steps, that query examples do not inform.

    steps: ascending.
    """
    found = plan(learner, tasks).curve(tasks, [(number, "support") for number in steps])
    for index in range(count(tasks)):
        yield one(tasks, index).query, [outputs[index] for _, outputs in found]


def _one_by_one(learner: MetaLearner, tasks: Batch, steps: Sequence[int]) -> Iterator[tuple[Examples, list]]:
    """`_curve` with the adapted modules themselves, as for a loss, whose outputs may be of examples together."""
    for index in range(count(tasks)):
        support, query = one(tasks, index)
        modules = [learner.adapt(support, number, "support").eval() for number in steps]
        with torch.no_grad():
            yield query, [selected(called(own, own, query.inputs), learner.output) for own in modules]


def describe(found: Sequence[Known]) -> str:
    """The calibrations as a table."""
    lines = [["tasks", "steps", "accuracy, %", "temperature", "calibration error, %", "before"]]
    for own in found:
        for steps, row in own.by_steps.items():
            best = " (best)" if steps == own.best_steps else ""
            lines.append(
                [
                    f"{own.ways}-way {own.shots}-shot",
                    f"{steps}{best}",
                    f"{100 * row['accuracy']:.1f}",
                    f"{row['temperature']:.3f}",
                    f"{100 * row['error']:.1f}",
                    f"{100 * row['error_before']:.1f}",
                ]
            )
    return align(lines, left=True)
