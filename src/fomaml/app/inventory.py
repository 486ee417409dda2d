"""What a run directory says of itself: README.txt, what each file is and what to type next, and the classes by part."""

from __future__ import annotations

import shlex
from pathlib import Path

from fomaml.app import rundir
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.build import Data
from fomaml.app.calibrate import CALIBRATION
from fomaml.app.named import resume_line, resume_options
from fomaml.app.report import align
from fomaml.app.settings import Settings
from fomaml.app.sources import source_of, split_name
from fomaml.files import write_json, write_text

README, PARTS = "README.txt", "parts.json"
FILES = {
    rundir.CONFIG: "every setting",
    PARTS: "which classes or groups are for training, for validation and for the test",
    rundir.METRICS: "a line of JSON for each measured iteration and each validation",
    rundir.STATE: "while it trains: what an interrupted run goes on from",
    rundir.STATE_BEFORE: "the state before that, should it be damaged",
    rundir.WEIGHTS: "the weights: the best by validation where there is one, else the last",
    rundir.LAST: "the last weights, where the others are the best",
    CALIBRATION: "temperatures, which make probabilities of classes mean something",
    rundir.RESULT_TEXT: "the figures on unseen tasks",
    rundir.RESULT: "the same for programs, with the protocol, the seed, the machine and the commit",
}


def describe_directory(settings: Settings, data: Data, out: Path) -> None:
    """Write README.txt and, of data that are not made by a formula, parts.json into a run directory."""
    parts = parts_of(data)
    if parts:
        write_json(out / PARTS, parts)
    lacking = set() if parts else {PARTS}
    lacking |= set() if settings.validate_every else {rundir.LAST, CALIBRATION}
    lacking |= {CALIBRATION} if source_of(settings).kind == "regression" else set()
    files = {name: what for name, what in FILES.items() if name not in lacking}
    lines = [
        f"A run of fomaml: {ALGORITHMS[settings.algorithm].title} on {data.name}.",
        "",
        align([["file", "what it is"], *map(list, files.items())], left=True),
        "",
        "What is not there yet is written later.",
        "",
        "What to type next:",
        "",
        align([["command", "what it does"], *commands(settings, out)], left=True),
        "",
    ]
    write_text(out / README, "\n".join(lines))


def parts_of(data: Data) -> dict[str, list[str]]:
    """The names of the classes, or of the groups of rows, of each part; empty of tasks that are made by a formula."""
    found = {"training": data.train, "validation": data.validation, "test": data.test}
    sources = {part: getattr(episodes, "source", None) for part, episodes in found.items()}
    if data.own_classes is not None:  # as the data have them, before they are turned or warped into more
        sources["training"] = data.own_classes
    return {
        part: list(map(str, source.names))
        for part, source in sources.items()
        if source is not None and hasattr(source, "names")
    }


def commands(settings: Settings, out: Path) -> list[list[str]]:
    """Each with what it does."""
    run, again = shlex.quote(str(out)), resume_options(settings)
    pictures = split_name(settings.source)[0] in ("mnist", "omniglot", "folder")
    rows = source_of(settings).path and not pictures

    def of(command: str, rest: str = "") -> str:
        return " ".join(filter(None, ["fomaml", command, run, rest, again]))

    found = [
        [resume_line(settings, out), "goes on after an interruption"],
        [f"fomaml show {run}", "prints the curves and the result"],
        [of("report"), "writes a page with plots and examples"],
        [of("evaluate"), "tests it again"],
    ]
    if pictures or rows:
        support = "FOLDER" if pictures else "FILE"
        found += [
            [of("adapt", f"--support {support} --out MODEL"), "learns from labelled examples of your own"],
            ["fomaml predict MODEL INPUT", "says what the adapted model takes an input for"],
        ]
    if pictures:
        found.append([of("demo"), "a page to draw or upload pictures on, and see it learn them"])
    return found
