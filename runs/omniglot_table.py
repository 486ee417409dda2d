"""The Omniglot tables of docs/results.md and README.md, out of the folders that runs/omniglot.py kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fomaml.app.cli import told_in_one_line
from fomaml.app.presets import AIMS, PRESETS, TASKS, Preset
from fomaml.app.report import duration
from fomaml.errors import InputError
from fomaml.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MANY = 15  # query images per class


@dataclass(frozen=True)
class Kept:
    """One kept run: the facts beside its weights."""

    name: str
    config: dict
    result: dict
    judged: dict

    def tasks(self) -> list[tuple[int, int]]:
        """The (ways, shots) that it was judged on."""
        return sorted({_task(evaluation) for evaluation in self.judged["evaluations"]})

    def evaluations(self, task: tuple[int, int]) -> list[dict]:
        return [each for each in self.judged["evaluations"] if _task(each) == task]

    def is_own(self, task: tuple[int, int]) -> bool:
        return task == (self.config["ways"], self.config["shots"])

    def preset(self, task: tuple[int, int]) -> Preset | None:
        """Whose published figure it stands beside: on its own task its preset's, else that of its algorithm, or of
        second-order MAML.
        """
        names = [self.config["preset"] or ""]
        if not self.is_own(task):
            ways, shots = task
            names = [f"{each}-omniglot-{ways}w{shots}s" for each in (names[0].partition("-")[0], "maml")]
        return next((PRESETS[name] for name in names if name in PRESETS), None)

    def measured(self, task: tuple[int, int]) -> dict:
        """The evaluation by the protocol of the published figure: as many query images per class, no copies, not
        balanced, and turned where it was judged so.
        """
        queries = self.config["test_query_shots"] if self.is_own(task) else task[1]
        plain = [
            each
            for each in self.evaluations(task)
            if each["protocol"]["query_shots"] == queries
            and each["protocol"].get("copies", 1) == 1
            and not each["protocol"].get("balanced")
        ]
        return max(plain, key=lambda each: each["protocol"]["test_augment"] == "turns")

    def row(self) -> str:
        """Its name in runs/omniglot.py, whose `folder` this undoes: fomaml-omniglot-5w1s for omniglot_fomaml_5w1s."""
        _, algorithm, *rest = self.name.split("_")
        return "-".join([algorithm, "omniglot", *rest])


def main(root: Path = ROOT) -> None:
    """Rewrite what stands between the marks of both pages."""
    kept = load(root / "docs" / "results")
    put(root / "docs" / "results.md", "omniglot", tables(kept))
    put(root / "docs" / "results.md", "omniglot appendix", appendix(kept))
    put(root / "README.md", "omniglot", overview(kept))


def load(folder: Path) -> list[Kept]:
    """The kept runs by name."""
    kept = []
    for path in sorted(folder.glob("*/evaluations.json")):
        facts = (
            json.loads((path.parent / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("config", "result", "evaluations")
        )
        kept.append(Kept(path.parent.name, *facts))
    return kept


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        InputError: the page has not each mark once.
    """
    begin, end = (f"<!-- {name}: {what} -->" for what in ("begin", "end"))
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1:
        raise InputError(f"{page} needs the marks {begin} and {end} once each")
    before, rest = whole.split(begin)
    write_text(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def tables(kept: list[Kept]) -> str:
    """A table for each task: each run's figure beside the published one."""
    parts = []
    for task in sorted({task for run in kept for task in run.tasks()}):
        rows = [row(run, task) for run in kept if task in run.tasks()]
        heading = ("run", "published", "here, same protocol", "here, support-set statistics", "training")
        parts.append(f"### {name_of(task)}\n\n{markdown(heading, rows)}")
    return "\n\n".join(parts)


def row(run: Kept, task: tuple[int, int]) -> list[str]:
    """Link, published figure, the same protocol here, the same with the support set's statistics, time of training."""
    preset, measured = run.preset(task), run.measured(task)
    support = measured["by_statistics"]["support"]
    if preset and preset.statistics == "with-query":
        measured = measured["by_statistics"]["with-query"]
    few = f", {measured['tasks']} tasks" if measured["tasks"] != 1000 else ""
    return [
        link(run),
        f"{preset.aim} ({preset.source})" if preset else "",
        f"{figure(measured)} {kind(measured)}{few}",
        figure(support),
        spent(run),
    ]


def appendix(kept: list[Kept]) -> str:
    """How each run was trained, and every evaluation of it."""
    training = []
    for run in kept:
        command = f"`python runs/omniglot.py {run.row()}`"
        training.append([link(run), command, iterations(run), str(run.config["seed"]), machine(run)])
    protocols = [
        protocol(run, task, evaluation)
        for task in sorted({task for run in kept for task in run.tasks()})
        for run in kept
        for evaluation in run.evaluations(task)
    ]
    return "\n\n".join(
        [
            markdown(("run", "command", "outer steps", "seed", "wall time"), training),
            markdown(("task and run", "protocol", "own", "support", "with-query"), protocols),
        ]
    )


def protocol(run: Kept, task: tuple[int, int], evaluation: dict) -> list[str]:
    """One evaluation: what it was of, and the figures by whose statistics."""
    facts = evaluation["protocol"]
    queries = facts["query_shots"]
    choices = [
        f"{queries} query image{'s' * (queries > 1)} per class",
        "classes turned" if facts["test_augment"] == "turns" else "",
        f"{facts['copies']} copies" if facts.get("copies", 1) > 1 else "",
        "balanced" if facts.get("balanced") else "",
        f"{evaluation['tasks']} tasks",
    ]
    others = evaluation["by_statistics"]
    by_statistics = [figure(others[name]) if name in others else "" for name in ("support", "with-query")]
    return [
        f"{name_of(task)}, {link(run)}",
        ", ".join(filter(None, choices)),
        figure(evaluation),
        *by_statistics,
    ]


def overview(kept: list[Kept]) -> str:
    """The README's table: FOMAML and the best first-order run beside the published figures."""
    heading = ("Omniglot, accuracy in %", *map(name_of, TASKS))
    rows = [
        ["FOMAML, published", *AIMS["fomaml"]],
        ["FOMAML, here", *here(kept, "fomaml-")],
        ["MAML (second order), published", *AIMS["maml"]],
        ["`best-omniglot` (first order), here", *here(kept, "best-")],
    ]
    return markdown(heading, rows)


def here(kept: list[Kept], prefix: str) -> list[str]:
    """The figures on each task of the runs whose preset begins with `prefix`, preferring the run of the task itself."""
    cells = []
    for task in TASKS:
        runs = [run for run in kept if run.config["preset"].startswith(prefix) and task in run.tasks()]
        best = max(runs, key=lambda run: run.is_own(task), default=None)
        cells.append(figure(best.measured(task)) if best else "")
    return cells


def name_of(task: tuple[int, int]) -> str:
    return f"{task[0]}-way {task[1]}-shot"


def link(run: Kept) -> str:
    return f"[{run.row()}](results/{run.name})"


def iterations(run: Kept) -> str:
    """The outer steps, and after how many of them the kept weights were the best."""
    weights = run.result["weights"]
    is_best = weights["kept"] != "last" and run.judged.get("weights") != "last"
    return f"{run.result['iterations']}" + (f", best at {weights['iteration']}" if is_best else "")


def spent(run: Kept) -> str:
    return duration(run.result["training_seconds"] + run.result["validation_seconds"])


def machine(run: Kept) -> str:
    threads, cores = run.result["threads"], run.result["machine"].rpartition(", ")[2]
    return f"{spent(run)}, {threads} thread{'s' * (threads > 1)} of {cores}"


def kind(result: dict) -> str:
    """What the papers call the statistics of a result."""
    facts = result["protocol"]
    if facts["statistics"] == "with-query":
        return "with-query"
    return "transductive" if facts["transductive"] else "inductive"


def figure(result: dict) -> str:
    return f"{100 * result['accuracy']:.2f} ± {100 * result['interval']:.2f}"


def markdown(heading: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(heading), ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _task(evaluation: dict) -> tuple[int, int]:
    return evaluation["protocol"]["ways"], evaluation["protocol"]["shots"]


if __name__ == "__main__":
    with told_in_one_line():
        main()
