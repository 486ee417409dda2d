"""How a comparison that was interrupted goes on: what it was for, and what each finished algorithm has cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fomaml.app import rundir
from fomaml.app.commands import CompareOptions, given
from fomaml.app.parser import parse_command
from fomaml.app.search import words_of
from fomaml.errors import InputError
from fomaml.files import write_json
from fomaml.regular import read_text
from fomaml.sealed import unsealed

BEGUN = "comparison.json"  # the options
COSTS = "costs"  # a folder with a file for each algorithm that is finished
COMPARISON = "compare.json"


def begin(options: CompareOptions, out: Path) -> None:
    """Make the folder of a comparison, and write down what it is for.

    Raises:
        InputError: it holds something, or cannot be made.
    """
    try:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"{out} already holds results; give another --out, or delete it, or --resume {out}"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out}: {error.strerror}") from None
    write_json(out / BEGUN, {"words": words_of(given(options), CompareOptions)})


def begun_before(options: CompareOptions, out: Path) -> str:
    """Whether a folder holds a comparison of these very options, "begun" or "finished"; else ""."""
    if not (out / BEGUN).exists() or _words(out) != words_of(given(options), CompareOptions):
        return ""
    return "finished" if (out / COMPARISON).exists() else "begun"


def begun(options: CompareOptions) -> CompareOptions:
    """The options of the comparison in the folder of --resume.

    Raises:
        InputError: there is none, it is finished or damaged, or other options are given beside --resume.
    """
    folder = options.resume
    assert folder is not None
    if set(given(options)) != {"resume"}:
        raise InputError("--resume takes the options of the comparison: give no others")
    words = _words(folder)
    if (folder / COMPARISON).exists():
        raise InputError(f"the comparison in {folder} is finished; see {folder / 'compare.txt'}")
    found: Any = parse_command({"compare": CompareOptions}, ["compare", *words], "fomaml", "")
    return found


def _words(folder: Path) -> list[str]:
    """The options of the comparison in a folder, as they were typed."""
    try:
        words = unsealed(read_text(folder / BEGUN), required=True)["words"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise TypeError
        return words
    except OSError:
        raise InputError(f"{folder} holds no comparison that was begun (no {BEGUN})") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / BEGUN} is damaged: it is not what the comparison began with") from None


def costs_file(out: Path) -> Path:
    """Where the costs of the algorithm with this run directory are written."""
    return out.parent / COSTS / f"{out.name}.json"


def costs_of(out: Path) -> dict[str, Any] | None:
    """What the run of a finished algorithm returned; None of one that is not finished.

    Raises:
        InputError: it is damaged.
    """
    if not rundir.is_finished(out):
        return None
    path = costs_file(out)
    try:
        found = unsealed(read_text(path), required=True)
        found["scores"] = {int(steps): scores for steps, scores in found["scores"].items()}
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is damaged: delete {out}, to have it trained again") from None
