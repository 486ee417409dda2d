"""The README.md of what is kept: what it is, on what data, by what protocol, and what to expect of it.

It begins with the front matter that the Hugging Face hub reads, https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.calibrate import Known
from fomaml.app.judge import describe
from fomaml.app.run_record import command
from fomaml.app.scores import metric_in
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of, split_name

PICTURES, ROWS = ("folder", "mnist", "omniglot"), ("table", "arrays")
SPECIAL = set("\\`*_{}[]<>#|!&$~")


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a card says of a run's result, JSON-able: its protocol in words, its figure, and each row of its table."""
    metric = metric_in(dict(result))
    rows = [{name: row[name] for name in ("label", "mean", "interval")} for row in result["rows"]]
    kept = {name: result[name] for name in (metric.name, "interval", "tasks", "name", "steps", "differences")}
    return {
        **{"metric": metric.name, "direction": metric.direction, "unit": metric.unit},
        **kept,
        "measured": result.get("measured", metric.name),
        "protocol": describe(dict(result)).splitlines()[0],
        "transductive": result["protocol"]["transductive"],
        "rows": rows,
    }


def card(facts: Mapping[str, Any], settings: Settings, license: str | None = None) -> str:
    """The card of an adapted model, in markdown.

    facts: those of model.json. license: as the hub names it, say "mit".
    """
    support = facts["support"]
    classes, targets = facts["classes"], facts["targets"]
    task = f"It tells {len(classes)} classes apart: {_listed(classes)}." if classes else ""
    task = task or f"It predicts {_listed(targets)}."
    given = f"{support['examples']} labelled examples"
    if by_class := support.get("by_class"):
        given += f" ({', '.join(f'{said(name)} {number}' for name, number in by_class.items())})"
    calibration = facts["calibration"]
    lines = [
        *_front_matter(settings, license, ["adapted"]),
        "# An adapted model",
        "",
        f"{task} Made on {facts['made']} by `fomaml adapt`, from {given}, in {facts['steps']} inner steps.",
        *_use(
            ["fomaml predict THIS_FOLDER INPUT", "fomaml evaluate THIS_FOLDER --query LABELLED_INPUTS"],
            ['model = fomaml.load_adapted("THIS_FOLDER")', "predictions = model.predict(INPUTS)"],
        ),
        "## Where it comes from",
        "",
        *_origin(settings),
        f"- the weights it started from: SHA-256 {facts['run_weights']}",
    ]
    if base := facts.get("base"):
        lines.append(
            f"- tensors that adaptation left as they were are not in this folder: they are read from the run "
            f"{said(base['run'])}, whose weights have the digest {base['sha256']}"
        )
    if calibration:
        lines.append(
            f"- probabilities: temperature {facts['temperature']:.3g}, fitted on {calibration['tasks']} validation "
            f"tasks of {calibration['ways']} ways and {calibration['shots']} shots, where the calibration error is "
            f"{100 * calibration['error']:.1f} % ({100 * calibration['error_before']:.1f} % without)"
        )
    elif classes:
        lines.append("- probabilities: not calibrated; `fomaml calibrate RUN`, then adapt again")
    lines += ["", "## Figures of the run it comes from", ""]
    lines += _figures(facts["figures"])
    lines += [
        "These are of the run, on tasks of its own. How good this model is on its task has not been measured: "
        "`fomaml evaluate THIS_FOLDER --query LABELLED_INPUTS` does.",
        "",
        "## Limits",
        "",
        "- It knows nothing but its training and the examples above. An input of another kind gets one of the answers "
        "above all the same. Score it on labelled inputs of your own before you rely on it.",
        *_limits(facts["figures"]),
        "",
    ]
    return "\n".join(lines)


def card_of_run(
    settings: Settings,
    result: Mapping[str, Any] | None,
    known: Sequence[Known],
    parts: Mapping[str, Sequence[str]],
    license: str | None = None,
) -> str:
    """The card of a run, in markdown. result: of result.json. known: its calibrations. parts: of parts.json."""
    figures = None if result is None else figures_of(result)
    title = ALGORITHMS[settings.algorithm].title
    lines = [
        *_front_matter(settings, license, [], figures),
        f"# {title}, meta-trained on {said(_data(settings))}",
        "",
        "A start from which a few gradient steps on a handful of labelled examples solve a new task of the kind below. "
        "It answers nothing before it is adapted.",
        *_use(
            [
                "fomaml adapt THIS_FOLDER --support LABELLED_EXAMPLES --out MODEL",
                "fomaml predict MODEL INPUT",
            ],
            [
                'run = fomaml.load_run("THIS_FOLDER")',
                "model = run.adapt(LABELLED_EXAMPLES)",
                "predictions = model.predict(INPUTS)",
            ],
        ),
        "## Data and training",
        "",
        *_origin(settings),
    ]
    if parts:
        lines.append(
            f"- classes or groups: {', '.join(f'{len(names)} of {part}' for part, names in parts.items())}"
        )
    if settings.facts and settings.facts.get("targets"):
        lines.append(f"- targets: {_listed(settings.facts['targets'])}")
    lines += ["", "Trained by", "", "```sh", command(settings), "```", "", "## Figures", ""]
    lines += _figures(figures)
    if known:
        lines += ["Calibration of its probabilities, on validation tasks:", ""]
        lines += ["| tasks | inner steps | temperature | error | error without it |", "|---|---|---|---|---|"]
        lines += [
            f"| {own.ways}-way {own.shots}-shot | {steps} | {row['temperature']:.3g} | {100 * row['error']:.1f} % | "
            f"{100 * row['error_before']:.1f} % |"
            for own in known
            for steps, row in own.by_steps.items()
        ]
        lines.append("")
    elif source_of(settings).kind == "classification":
        lines += ["Its probabilities are not calibrated.", ""]
    lines += [
        "## Limits",
        "",
        "- The figures are of tasks that are drawn as said above, of data of the same kind. Of other data they promise "
        "nothing.",
        *_limits(figures),
        "",
    ]
    return "\n".join(lines)


def said(text: Any) -> str:
    """A name as markdown shows it, in one line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return "".join(f"\\{c}" if c in SPECIAL else c for c in line)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(said, names))


def _data(settings: Settings) -> str:
    source, path = split_name(settings.source)
    return f"{source} {path.rstrip('/').rpartition('/')[2]}" if path else source


def _use(shell: Sequence[str], python: Sequence[str]) -> list[str]:
    return [
        *["", "## Use", "", "```sh", *shell, "```", ""],
        *["```python", "import fomaml", "", *python, "```", ""],
    ]


def _origin(settings: Settings) -> list[str]:
    question = settings.question or settings.split
    ways = f"{settings.ways}-way " if source_of(settings).kind == "classification" else ""
    return [
        f"- data: {said(_data(settings))}{f', {question}' if question else ''}, {ways}{settings.shots}-shot tasks",
        f"- meta-trained by {settings.algorithm} in {settings.iterations} outer steps of {settings.meta_batch_size} "
        f"tasks, {settings.inner_steps} inner steps of {settings.inner_lr:g}, seed {settings.seed}",
        f"- network: {said(settings.model)}",
    ]


def _figures(figures: Mapping[str, Any] | None) -> list[str]:
    """The protocol, and a row for each method, with its interval and its paired difference."""
    if figures is None:
        return ["The run has no result: nothing of it has been measured.", ""]
    if "rows" not in figures:  # of an earlier version
        value = f"{figures[figures['metric']]:.4g} ± {figures['interval']:.2g} (95 %)"
        told = (
            f"{figures['metric']} {value} on {figures['tasks']} unseen tasks after {figures['steps']} steps"
        )
        return [f"Its {told}.", ""]
    metric = metric_in(dict(figures))
    apart = {row["to"]: metric.text(row["mean"], row["interval"]) for row in figures["differences"]}
    name = figures["name"]
    lines = [f"{said(figures['protocol'])}.", ""]
    lines += [
        f"| | {said(figures['measured'])}, ± 95 % interval |" + (f" {name} minus it |" if apart else "")
    ]
    lines += ["|---|---|" + ("---|" if apart else "")]
    for row in figures["rows"]:
        more = f" {apart.get(row['label'], '')} |" if apart else ""
        lines.append(f"| {said(row['label'])} | {metric.text(row['mean'], row['interval'])} |{more}")
    told = "Differences are paired, on the same tasks." if apart else "No baselines were measured beside it."
    return [*lines, "", told, ""]


def _limits(figures: Mapping[str, Any] | None) -> list[str]:
    if figures is None or not figures.get("transductive"):
        return []
    return [
        "- The figures are transductive: the query examples of a task are judged together, and inform each other by "
        "the statistics of batch norms. An adapted model judges each input alone, by the statistics of the support "
        "set, and may be less often right."
    ]


# --- front matter ---------------------------------------------------------------------------------


def _front_matter(
    settings: Settings, license: str | None, tags: list[str], figures: Mapping[str, Any] | None = None
) -> list[str]:
    """The hub's facts of a model. figures: of the very model, which an adapted one has none of."""
    source = split_name(settings.source)[0]
    kind = source_of(settings).kind
    task = f"tabular-{kind}" if source in ROWS else "image-classification" if source in PICTURES else ""
    lines = ["---", "library_name: fomaml"]
    if license is not None:
        lines.append(f"license: {quoted(license)}")
    if task:
        lines.append(f"pipeline_tag: {task}")
    own = ["few-shot-learning", "meta-learning", settings.algorithm, "model_hub_mixin", *tags]
    lines += ["tags:", *(f"- {quoted(tag)}" for tag in own)]
    if figures is not None:
        metric = metric_in(dict(figures))
        value, interval = (metric.scale * figures[name] for name in (metric.name, "interval"))
        name = f"{metric.name} after {figures['steps']} steps, mean of {figures['tasks']} unseen tasks, ± "
        lines += [
            "model-index:",
            f"- name: {quoted(figures['name'] + ' on ' + _data(settings))}",
            "  results:",
            "  - task:",
            f"      type: {task or f'few-shot-{kind}'}",
            f"      name: {quoted(figures['protocol'])}",
            "    dataset:",
            f"      type: {quoted(source)}",
            f"      name: {quoted(_data(settings))}",
            "    metrics:",
            f"    - type: {quoted(metric.name)}",
            f"      value: {value:.6g}",
            f"      name: {quoted(f'{name}{interval:.3g} (95 % interval)')}",
        ]
    return [*lines, "---", ""]


def quoted(text: str) -> str:
    """A text as YAML reads it, whatever is in it."""

    def one(letter: str) -> str:
        if letter in '"\\':
            return f"\\{letter}"
        return letter if letter.isascii() and letter.isprintable() else f"\\U{ord(letter):08x}"

    return f'"{"".join(map(one, text))}"'
