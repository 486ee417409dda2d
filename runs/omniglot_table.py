"""The Omniglot table of docs/results.md, out of the folders that runs/omniglot_keep.py kept."""

from __future__ import annotations

import json
from pathlib import Path

from fomaml.app.cli import told_in_one_line
from fomaml.app.presets import PRESETS
from fomaml.app.report import duration
from fomaml.errors import InputError
from fomaml.files import write_text

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- omniglot: begin -->", "<!-- omniglot: end -->"
HEADING = (
    *("run", "published", "measured, published protocol", "the same, inductive", "by further protocols"),
    *("15 query a class", "15 query a class, inductive", "seed", "iterations", "wall time", "command"),
)


def main(docs: Path = DOCS) -> None:
    """Rewrite what stands between the two marks of results.md."""
    page = docs / "results.md"
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{page} needs the marks {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(page, f"{before}{BEGIN}\n{table(docs / 'results')}{END}{after}")


def table(folder: Path) -> str:
    """A row for each kept run; the runs of one number of ways and shots one after the other."""
    kept = []
    for path in sorted(folder.glob("*/evaluations.json")):
        config, result, judged = (
            json.loads((path.parent / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("config", "result", "evaluations")
        )
        settings = {
            (found["protocol"]["ways"], found["protocol"]["shots"]) for found in judged["evaluations"]
        }
        kept += [(*setting, path.parent.name, config, result, judged) for setting in settings]
    lines = [f"| {' | '.join(HEADING)} |", "|" + "---|" * len(HEADING)]
    for run in sorted(kept, key=lambda run: run[:3]):
        lines.append(row(*run))
    return "\n".join(lines) + "\n"


def row(ways: int, shots: int, name: str, config: dict, result: dict, judged: dict) -> str:
    """One row: published beside measured by the published protocol, then by others.

    Tasks of other ways or shots than the run's own have K query images a class, and stand beside the published figure
    of its own algorithm, or else beside second-order MAML.
    """
    is_own = (ways, shots) == (config["ways"], config["shots"])
    trained = config["preset"] or ""
    published = [trained]
    if not is_own:
        published = [f"{each}-omniglot-{ways}w{shots}s" for each in (trained.partition("-")[0], "maml")]
    preset = next((PRESETS[each] for each in published if each in PRESETS), None)
    evaluations = [
        found
        for found in judged["evaluations"]
        if (found["protocol"]["ways"], found["protocol"]["shots"]) == (ways, shots)
    ]
    augments = {found["protocol"]["test_augment"] for found in evaluations}
    mark = {"turns": "", "none": "not turned, " if "turns" in augments else ""}
    queries = config["test_query_shots"] if is_own else shots
    by_query, further = {}, []
    for found in evaluations:
        protocol = found["protocol"]
        plain = mark[protocol["test_augment"]]
        if protocol.get("balanced"):
            further.append(f"{plain}balanced: {figure(found)}")
        elif protocol.get("copies", 1) > 1:
            further.append(f"{plain}{protocol['copies']} copies: {both(found)}")
        elif plain and protocol["query_shots"] == queries:
            further.append(f"{plain}{both(found)}")
        else:
            by_query[protocol["query_shots"]] = found
    own, many = by_query[queries], by_query[15]
    support = own["by_statistics"]["support"]
    if preset and preset.statistics == "with-query":
        own = own["by_statistics"]["with-query"]
    weights = result["weights"]
    iterations = f"{result['iterations']}"
    if weights["kept"] != "last" and judged.get("weights") != "last":
        iterations += f", best at {weights['iteration']}"
    spent = duration(result["training_seconds"] + result["validation_seconds"])
    cores = result["machine"].rpartition(", ")[2]
    cells = [
        f"{ways}-way {shots}-shot, [{name}](results/{name})",
        f"{preset.aim} ({preset.source})" if preset else "",
        f"{figure(own)} {kind(own)}, {own['tasks']} tasks",
        figure(support),
        "; ".join(further),
        f"{mark[many['protocol']['test_augment']]}{figure(many)} {kind(many)}",
        figure(many["by_statistics"]["support"]),
        f"{config['seed']}, tasks {judged['seed']}",
        iterations,
        f"{spent}, {result['threads']} thread{'s' * (result['threads'] > 1)} of {cores}",
        f"`sh runs/{name}.sh`",
    ]
    return f"| {' | '.join(cells)} |"


def kind(result: dict) -> str:
    """How the published figures call the statistics of a result."""
    protocol = result["protocol"]
    if protocol["statistics"] == "with-query":
        return "with-query"
    return "transductive" if protocol["transductive"] else "inductive"


def both(result: dict) -> str:
    return f"{figure(result)}, inductive {figure(result['by_statistics']['support'])}"


def figure(result: dict) -> str:
    return f"{100 * result['accuracy']:.2f} ± {100 * result['interval']:.2f}"


if __name__ == "__main__":
    with told_in_one_line():
        main()
