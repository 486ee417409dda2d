"""What a trained learner is worth: evaluated beside baselines on the same unseen tasks, and told in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fomaml.app import rivals
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.build import Data, for_test, open_data
from fomaml.app.data_identity import other_data
from fomaml.app.group_tasks import of_units
from fomaml.app.launch import Launch
from fomaml.app.report import table, verdict
from fomaml.app.scores import facts_of, headline, measured, metric_in, metrics_of
from fomaml.app.settings import DIGESTS, Settings
from fomaml.app.sources import source_of, split_name
from fomaml.app.together import Together
from fomaml.choices import Statistics
from fomaml.errors import InputError
from fomaml.evaluate import estimate, evaluate_all
from fomaml.learning.learner import MetaLearner
from fomaml.metrics import Metric
from fomaml.models import NATIVE_BATCH_NORMS, BatchNorm, takes_statistics
from fomaml.scoring import metrics_of as of_learner

# by name of the metric, then by number of inner steps: the (tasks,) scores
Scores = Mapping[str, Mapping[int, Tensor]]


def judge(
    settings: Settings, learner: MetaLearner, data: Data, say=lambda line: None, group: Any = None
) -> tuple[dict, Scores]:
    """Evaluate a trained learner on unseen tasks; returns the result, and the scores behind it.

    group: as of `evaluate`.
    """
    say(f"evaluating on {settings.test_tasks} unseen tasks")
    kinds = (settings.statistics, *_beside(settings, learner))
    (found, *others), spoiled = _scored(settings, for_test(settings, learner), data, kinds, group=group)
    result = summary(settings, learner, data, found, settings.statistics) | spoiled
    return result | _other_way(settings, data, others), found


def _beside(settings: Settings, learner: MetaLearner) -> tuple[Statistics, ...]:
    """The statistics whose figure is named beside that of a folder of pictures, each of which is judged alone."""
    own_pictures = split_name(settings.source)[0] == "folder" and settings.statistics == "support"
    return ("own",) if own_pictures and _is_transductive(learner) else ()


def _other_way(settings: Settings, data: Data, found: Sequence[Scores]) -> dict:
    """Of the scores of `_beside`, what the result says."""
    if not found:
        return {}
    scores = found[0][headline(settings).name]
    return {"transductive": estimate(of_units(data.test, scores[max(scores)]))._asdict()}


def _scored(
    settings: Settings,
    tested: MetaLearner,
    data: Data,
    kinds: Sequence[Statistics],
    balanced: bool = False,
    group: Any = None,
) -> tuple[list[Scores], dict]:
    """The scores with each kind of statistics; and how many tasks gave what is no number, where some did."""
    points = [(steps, kind) for kind in kinds for steps in settings.test_steps]
    asked = of_learner(tested, metrics_of(settings))
    number = settings.test_tasks
    told: list[int] = []
    scores = evaluate_all(tested, data.test, points, number, 100, "auto", balanced, asked, group, told.append)
    found: list[Scores] = [
        {
            name: {steps: each for (steps, own), each in of_metric.items() if own == kind}
            for name, of_metric in scores.items()
        }
        for kind in kinds
    ]
    return found, {"spoiled_tasks": told[0]} if told[0] else {}


def beside_baselines(
    settings: Settings,
    data: Data,
    result: dict,
    scores: Scores,
    say=lambda line: None,
    note: rivals.Note = lambda kind, cost: None,
) -> Iterator[dict]:
    """The result with one baseline more each time, on the same unseen tasks as the scores of the learner.

    note: is told of each part of the work as it begins, by its kind and its cost, see sizing.py.
    """
    first = headline(settings)
    steps = settings.test_steps[-1]
    for label, found, facts in rivals.baselines(settings, data, say, note):
        grown = []
        for own in (result, *result.get("others", ())):
            theirs = found.get(own["metric"])
            if theirs is None:  # the pixels have no loss
                grown.append(own)
                continue
            paired = estimate(of_units(data.test, scores[own["metric"]][steps][: len(theirs)] - theirs))
            difference = {"to": label, "mean": paired.mean, "interval": paired.interval}
            rows = [*own["rows"], _row(label, data.test, theirs, **facts)]
            grown.append(own | {"rows": rows, "differences": [*own["differences"], difference]})
        result = grown[0] | ({"others": grown[1:]} if grown[1:] else {})
        mean, interval = estimate(of_units(data.test, found[first.name]))
        say(f"baseline: {label}: {first.text(mean, interval)} {first.unit}".rstrip())
        yield result


def summary(
    settings: Settings,
    learner: MetaLearner,
    data: Data,
    found: Scores,
    statistics: Statistics = "own",
    balanced: bool = False,
) -> dict:
    """The result as JSON-able facts: the headline figure, the protocol, the rows and the paired differences; under
    "others" the same of each further metric.
    """
    first, *others = (
        _of_metric(settings, data, metric, found[metric.name]) for metric in metrics_of(settings)
    )
    facts = protocol(settings, data, learner, statistics, balanced) | {"inner_steps": first["steps"]}
    result = first | {"protocol": facts}
    return result | {"others": others} if others else result


def _of_metric(settings: Settings, data: Data, metric: Metric, found: Mapping[int, Tensor]) -> dict:
    steps = max(found)
    name = ALGORITHMS[settings.algorithm].title
    last = estimate(of_units(data.test, found[steps]))
    return {
        metric.name: last.mean,
        "interval": last.interval,
        "tasks": len(found[steps]),
        "name": name,
        "steps": steps,
        **facts_of(metric),
        "measured": measured(settings, metric),
        "rows": [_row(f"{name}, {_steps(k)}", data.test, scores, steps=k) for k, scores in found.items()],
        "differences": [],
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


def evaluate_run(
    settings: Settings,
    learner: MetaLearner,
    statistics: Sequence[Statistics] | None = None,
    seed: int | None = None,
    part: str = "test",
    balanced: bool = False,
    baselines: bool = False,
    say: Callable[[str], None] = lambda line: None,
    launch: Launch | None = None,
) -> dict:
    """Evaluate a loaded run on unseen tasks; statistics, part, balanced and baselines as in `EvaluateOptions`.

    launch: of many processes, each of which evaluates its share of the tasks; the first one alone has the baselines.

    Of several statistics the result is that of the first, those of the others stand by name under "by_statistics", and
    "warning" says so where the paired difference of the first two is larger than its interval.

    Raises:
        InputError: no data, or no validation classes in them; balanced, and tasks without classes, or baselines.
    """
    launch = launch or Launch({})
    with launch.checking():
        if baselines and balanced:
            raise InputError(
                "--balanced scales the outputs of the learner alone: give no --baselines beside it"
            )
        data = open_data(settings, test_seed=seed)
        if settings.format < DIGESTS:
            say(
                "the run is of an earlier version: its files are not all checked for damage, nor its data compared"
            )
        told = other_data(settings, data)
        if part == "validation":
            if data.validation is None:
                raise InputError(f"{data.unvalidated}; take --part test")
            data = dataclasses.replace(data, test=data.validation)

    beside = () if statistics else _beside(settings, learner)
    kinds = list(dict.fromkeys(statistics or [settings.statistics]))
    together = Together(launch, settings)
    with launch.computing(settings.threads if settings.same_bits else None), together.joined():
        tested = for_test(settings, learner)
        found, spoiled = _scored(settings, tested, data, [*kinds, *beside], balanced, together.ranks)
    result, *others = (
        summary(settings, learner, data, *each, balanced=balanced) for each in zip(found, kinds)
    )
    result |= spoiled | _other_way(settings, data, found[len(kinds) :])
    if told:
        result["other_data"] = told
    result |= {"part": part, "seed": settings.seed if seed is None else seed}
    if baselines and launch.first:
        like = dataclasses.replace(settings, baselines=True, statistics=kinds[0])
        for more in beside_baselines(like, data, result, found[0], say):
            result = more
    if others:
        result["by_statistics"] = dict(zip(kinds[1:], others))
        metric = headline(settings)
        apart = found[0][metric.name][result["steps"]] - found[1][metric.name][result["steps"]]
        paired = estimate(of_units(data.test, apart))
        result["difference"] = paired._asdict()
        if abs(paired.mean) > paired.interval:
            result["warning"] = (
                f"with the statistics {kinds[1]!r} the {metric.name} is {'+' if paired.mean < 0 else ''}"
                f"{metric.text(-paired.mean, paired.interval)}{' points' if metric.unit == '%' else ''} from that with "
                f"{kinds[0]!r}"
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
    for other in result.get("others", ()):
        lines += ["", table([(heading, other)])]
    if "unfinished" in result:
        lines += ["", result["unfinished"]]
    if result["differences"]:
        lines += ["", verdict(result)]
        named = [other for other in result.get("others", ()) if other["differences"]]
        lines += [f"by {other['metric']}: {verdict(other)}" for other in named]
    for other in result.get("by_statistics", {}).values():
        lines += ["", describe(other)]
    if "transductive" in result:
        found = f"{metric_in(result).text(**result['transductive'])} {result['unit']}".rstrip()
        how = f"query examples that inform each other (transductive), {_steps(result['steps'])}"
        lines += ["", f"{how}: {found}"]
    if calibration := result.get("calibration"):
        lines += ["", worth(calibration)]
    if "spoiled_tasks" in result:
        lines += [
            "",
            f"note: {result['spoiled_tasks']} of {result['tasks']} tasks gave outputs that are no numbers: inner loops "
            "that diverge; try a smaller inner_lr",
        ]
    if "other_data" in result:
        lines += ["", f"note: {result['other_data']}"]
    if "warning" in result:
        lines.append(f"warning: {result['warning']}")
    return "\n".join(lines).rstrip() + "\n"


def worth(calibration: dict) -> str:
    """What probabilities are worth, of what is kept of a `Known`."""
    return (
        f"probabilities of an adapted model: temperature {calibration['temperature']:.3g} of {calibration['ways']}-way "
        f"{calibration['shots']}-shot validation tasks, calibration error {100 * calibration['error']:.1f} % "
        f"({100 * calibration['error_before']:.1f} % without)"
    )


def told(protocol: dict) -> str:
    """Of a protocol, whether query examples inform each other, and by whose statistics they do not."""
    by = {"support": ", statistics of the support set", "with-query": ", one query example at a time"}
    kind = "transductive" if protocol["transductive"] else "inductive"
    return kind + by.get(protocol["statistics"], "")


def _row(label: str, episodes: Any, scores: Tensor, **facts) -> dict:
    """A row of the table; of groups of rows with the score of each group."""
    units = of_units(episodes, scores)
    found = estimate(units)
    row = {"label": label, "mean": found.mean, "interval": found.interval, **facts}
    if hasattr(episodes, "groups_of"):
        row["by_group"] = dict(zip(episodes.groups_of(len(scores)), units.tolist()))
    return row


def _steps(steps: int) -> str:
    return {0: "before adaptation", 1: "after 1 step"}.get(steps, f"after {steps} steps")


def _is_transductive(learner: MetaLearner) -> bool:
    """Whether a layer normalises the query set by statistics of its own, so that its examples inform each other."""

    def mixes(layer: nn.Module) -> bool:
        if isinstance(layer, BatchNorm):
            return layer.policy == "batch"
        return isinstance(layer, NATIVE_BATCH_NORMS) and takes_statistics(layer)

    return any(map(mixes, learner.model.modules()))
