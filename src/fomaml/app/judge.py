"""What a trained learner is worth: evaluated beside baselines on the same unseen tasks, and told in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fomaml.app import sizing
from fomaml.app.agenda import Noted
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.build import Data, build_model, for_test, head_name, open_data
from fomaml.app.group_tasks import in_own_unit, of_units
from fomaml.app.report import table, verdict
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of
from fomaml.baselines import fine_tune, nearest_centroid, pretrain
from fomaml.choices import Statistics
from fomaml.data.source import ClassSource
from fomaml.errors import InputError
from fomaml.evaluate import estimate, evaluate, evaluate_at
from fomaml.learning.learner import MetaLearner
from fomaml.models import NATIVE_BATCH_NORMS, BatchNorm


def judge(
    settings: Settings, learner: MetaLearner, data: Data, say=lambda line: None
) -> tuple[dict, dict[int, Tensor]]:
    """Evaluate a trained learner on unseen tasks.

    Returns the result, and by number of inner steps the (tasks,) scores behind it.
    """
    say(f"evaluating on {settings.test_tasks} unseen tasks")
    tasks = settings.test_tasks
    found = evaluate(
        for_test(settings, learner),
        data.test,
        tasks=tasks,
        at_steps=settings.test_steps,
        statistics=settings.statistics,
        metric=in_own_unit(settings, source_of(settings).metric),
    )
    return summary(settings, learner, data, found, settings.statistics), found


def has_baselines(settings: Settings, data: Data) -> bool:
    """Whether there is something to compare a run with: functions have no classes."""
    return settings.baselines and data.own_classes is not None


def beside_baselines(
    settings: Settings,
    data: Data,
    result: dict,
    scores: Tensor,
    say=lambda line: None,
    note: Callable[[float], None] = lambda cost: None,
) -> Iterator[dict]:
    """The result with one baseline more each time, on the same unseen tasks as the (tasks,) scores of its headline.

    note: is told of each part of the work as it begins, by its cost, see sizing.py.
    """
    metric = source_of(settings).metric
    rows, differences = list(result["rows"]), list(result["differences"])
    for label, own, facts in baselines(settings, data, say, note):
        row = _row(label, of_units(data.test, own), **facts)
        rows.append(row)
        paired = estimate(of_units(data.test, scores[: len(own)] - own))
        differences.append({"to": label, "mean": paired.mean, "interval": paired.interval})
        say(f"baseline: {label}: {metric.text(row['mean'], row['interval'])} {metric.unit}".rstrip())
        yield result | {"rows": list(rows), "differences": list(differences)}


def summary(
    settings: Settings,
    learner: MetaLearner,
    data: Data,
    found: Mapping[int, Tensor],
    statistics: Statistics = "own",
    rows: list[dict] | None = None,
    differences: Sequence[dict] = (),
    balanced: bool = False,
) -> dict:
    """The result as JSON-able facts: the headline figure, the protocol, the rows and the paired differences."""
    steps = max(found)
    name = ALGORITHMS[settings.algorithm].title
    headline = estimate(of_units(data.test, found[steps]))
    metric = source_of(settings).metric.name
    facts = protocol(settings, data, learner, statistics, balanced) | {"inner_steps": steps}
    if rows is None:
        rows = [
            _row(f"{name}, {_steps(k)}", of_units(data.test, scores), steps=k) for k, scores in found.items()
        ]
    return {
        metric: headline.mean,
        "interval": headline.interval,
        "tasks": len(found[steps]),
        "protocol": facts,
        "name": name,
        "steps": steps,
        "metric": metric,
        "measured": source_of(settings).measured,
        "rows": rows,
        "differences": list(differences),
    }


def protocol(
    settings: Settings, data: Data, learner: MetaLearner, statistics: Statistics, balanced: bool = False
) -> dict:
    """What an accuracy is an accuracy of."""
    test: Any = data.test
    return {
        "data": data.name,
        "question": settings.question or settings.split,
        "ways": None if source_of(settings).kind == "regression" else settings.ways,
        "shots": settings.shots,
        "query_shots": None if settings.query_all else settings.test_query_shots,
        "test_augment": settings.test_augment,
        "copies": settings.test_copies,
        "jitter": settings.test_jitter if settings.test_copies > 1 else 0.0,
        "model": settings.model,
        "statistics": statistics,
        "transductive": statistics == "own" and _is_transductive(learner),
        "balanced": balanced,
        "overlap": overlap(data),
    } | ({} if data.facts is None else {"groups": len(test)})


def overlap(data: Data) -> str | None:
    """Which test classes are no new ones, in words: those of training, and those that the weights were selected by."""
    if data.own_classes is None:
        return None
    episodes: Any = data.test  # of classes too
    tested = episodes.source.names
    told = []
    seen = {"seen in training": set(data.own_classes.names)}
    if data.validation is not None and data.validation is not data.test:
        seen["used in validation"] = set(data.validation.source.names)
    for how, names in seen.items():
        if shared := [name for name in tested if name in names]:
            which = "all" if len(shared) == len(tested) else f"{len(shared)} of"
            told.append(f"{which} {len(tested)} test classes were {how}")
    return " and ".join(told) or None


def baselines(settings: Settings, data: Data, say, note: Callable[[float], None] = lambda cost: None):
    """(label, scores, facts) of each baseline on the test tasks, step size and count tuned on training classes."""
    own_classes, classes = data.own_classes, data.classes
    if own_classes is None or classes is None:
        return
    sizes = sizing.of_baselines(settings)
    counts: dict[str, Any] = {"tasks": sizes.tasks, "tuning_tasks": sizes.tuning_tasks}
    counts |= {"inner_lrs": sizing.INNER_LRS, "at_steps": sizes.at_steps, "statistics": settings.statistics}
    costs = sizing.tuning(settings, sizes), sizing.adaptation(settings, max(sizes.at_steps))
    tuning = Noted(data.tuning, lambda tasks: note(tasks * costs[0]))
    test = Noted(data.test, lambda tasks: note(tasks * costs[1]))
    few = f", on {sizes.tasks} tasks" if sizes.tasks < settings.test_tasks else ""
    say("baseline: the same network from a random start")
    tuned = fine_tune(lambda n: build_model(settings, 1000 + n), tuning, test, **counts)
    yield f"random start, support set only{few}", tuned.scores, _facts(tuned)
    learned = {"pretrained classifier, fine-tuned": own_classes}
    if settings.augment != "none":
        learned["pretrained on augmented, fine-tuned"] = classes
    for label, known in learned.items():
        say(f"baseline: the same network pretrained as a classifier of {len(known)} classes")
        seen: Any = Noted(known, lambda examples: note(examples * sizing.PASSES))
        model = pretrained(settings, seen, sizes.pretraining)
        tuned = fine_tune(model, tuning, test, **counts)
        yield f"{label}{few}", tuned.scores, _facts(tuned)
    yield "nearest centroid of the pixels", nearest_centroid(data.test, tasks=settings.test_tasks), {}


def pretrained(settings: Settings, classes: ClassSource, iterations: int = 1000) -> nn.Module:
    """The run's network as an ordinary classifier of these classes has learned it, with a head of zeros: the
    classifier's own head means nothing under new labels.
    """
    model = build_model(settings)
    owner, _, last = head_name(model).rpartition(".")
    owner = model.get_submodule(owner)
    head = getattr(owner, last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        setattr(owner, last, nn.Linear(head.in_features, len(classes)).to(head.weight))
    pretrain(model, classes, iterations=iterations, batch_size=sizing.BATCH, seed=settings.seed)
    setattr(owner, last, head)
    return model


def evaluate_run(
    settings: Settings,
    learner: MetaLearner,
    statistics: Sequence[Statistics] | None = None,
    seed: int | None = None,
    part: str = "test",
    balanced: bool = False,
) -> dict:
    """Evaluate a loaded run on unseen tasks; statistics, part and balanced as in `EvaluateOptions`.

    Of several statistics the result is that of the first, those of the others stand by name under "by_statistics", and
    "warning" says so where the paired difference of the first two is larger than its interval.

    Raises:
        InputError: no data, or no validation classes in them; balanced, and tasks without classes.
    """
    data = open_data(settings, test_seed=seed)
    if part == "validation":
        if data.validation is None:
            raise InputError(f"{data.unvalidated}; take --part test")
        data = dataclasses.replace(data, test=data.validation)

    kinds = list(dict.fromkeys(statistics or [settings.statistics]))
    points = [(steps, kind) for kind in kinds for steps in settings.test_steps]
    scores = evaluate_at(
        for_test(settings, learner),
        data.test,
        points,
        settings.test_tasks,
        balanced=balanced,
        metric=in_own_unit(settings, source_of(settings).metric),
    )
    found = [{steps: each for (steps, own), each in scores.items() if own == kind} for kind in kinds]
    result, *others = (
        summary(settings, learner, data, *each, balanced=balanced) for each in zip(found, kinds)
    )
    result |= {"part": part, "seed": settings.seed if seed is None else seed}
    if others:
        result["by_statistics"] = dict(zip(kinds[1:], others))
        paired = estimate(of_units(data.test, found[0][result["steps"]] - found[1][result["steps"]]))
        result["difference"] = paired._asdict()
        if abs(paired.mean) > paired.interval:
            result["warning"] = (
                f"with the statistics {kinds[1]!r} the accuracy is {100 * -paired.mean:+.1f} ± "
                f"{100 * paired.interval:.1f} points from that with {kinds[0]!r}"
                + (": query examples inform each other" if result["protocol"]["transductive"] else "")
            )
    return result


def describe(result: dict) -> str:
    """The result as text: what was measured, the table, the verdict."""
    protocol = result["protocol"]
    ways = f"{protocol['ways']}-way " if protocol["ways"] else ""
    heading = f"{ways}{protocol['shots']}-shot"
    turns = ", each class turned at random" if protocol.get("test_augment") == "turns" else ""
    if protocol.get("copies", 1) > 1:
        turns += f", each image {protocol['copies']} times (jitter {protocol['jitter']:g})"
    balanced = (
        ", balanced: the same number of query examples per class assumed" if protocol.get("balanced") else ""
    )
    queries = f"{protocol['query_shots']} query {'example' if protocol['query_shots'] == 1 else 'examples'}"
    if protocol["query_shots"] is None:
        queries = "all others as query examples"
    shared = f" ({protocol['overlap']})" if protocol.get("overlap") else ""
    groups = f" of {protocol['groups']} groups, which the intervals are over" if "groups" in protocol else ""
    part = "validation" if result.get("part") == "validation" else "unseen"
    lines = [
        f"{', '.join(filter(None, (protocol['data'], protocol['question'])))}, {heading}, "
        f"{result['tasks']} {part} tasks{shared}{groups}, {queries}{' per class' if ways else ''}{turns}, "
        f"{told(protocol)}{balanced}",
        "",
        table([(heading, result)]),
    ]
    if "unfinished" in result:
        lines += ["", result["unfinished"]]
    if result["differences"]:
        lines += ["", verdict(result)]
    for other in result.get("by_statistics", {}).values():
        lines += ["", describe(other)]
    if "warning" in result:
        lines.append(f"warning: {result['warning']}")
    return "\n".join(lines).rstrip() + "\n"


def told(protocol: dict) -> str:
    """Of a protocol, whether query examples inform each other, and by whose statistics they do not."""
    by = {"support": ", statistics of the support set", "with-query": ", one query example at a time"}
    kind = "transductive" if protocol["transductive"] else "inductive"
    return kind + by.get(protocol["statistics"], "")


def _row(label: str, scores, **facts) -> dict:
    found = estimate(scores)
    return {"label": label, "mean": found.mean, "interval": found.interval, **facts}


def _facts(tuned) -> dict:
    return {"inner_lr": tuned.inner_lr, "steps": tuned.steps}


def _steps(steps: int) -> str:
    return {0: "before adaptation", 1: "after 1 step"}.get(steps, f"after {steps} steps")


def _is_transductive(learner: MetaLearner) -> bool:
    """Whether a layer normalises the query set by statistics of its own, so that its examples inform each other."""

    def mixes(layer: nn.Module) -> bool:
        if isinstance(layer, BatchNorm):
            return layer.policy == "batch"
        native = isinstance(layer, NATIVE_BATCH_NORMS)
        return native and (layer.training or not layer.track_running_stats)

    return any(map(mixes, learner.model.modules()))
