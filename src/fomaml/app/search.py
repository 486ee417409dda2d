"""What `fomaml tune` searches: from its options, or from the folder of a search that was begun."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fomaml import regular
from fomaml.app.check_settings import read_settings
from fomaml.app.commands import given, headings
from fomaml.app.named import AGAIN, named_again
from fomaml.app.settings import Settings, to_json
from fomaml.app.settle import settle
from fomaml.app.tune_options import TRIALS, TuneOptions
from fomaml.app.wording import option as typed
from fomaml.errors import InputError, positive, whole
from fomaml.sealed import sealed, unsealed
from fomaml.tuning import LogUniform, Space

SEARCH = "tune.json"
FORMAT = 1
SEARCHED = ("inner_lr", "inner_steps", "meta_lr")
OWN = {"trials", "trial_iterations", "search_seed", "resume", "accept_changed_code"} | {
    f"{name}_range" for name in SEARCHED
}
TENTH = 10  # of the iterations are those of a trial; from a tenth to ten times a step size is searched


class Search(NamedTuple):
    """What is searched.

    settings: of the run without a search. words: the options of `fomaml train` that were given. space: by name of the
    setting, the least and the greatest value. iterations: of a trial.
    """

    settings: Settings
    words: list[str]
    space: dict[str, tuple[float, float]]
    trials: int
    iterations: int
    seed: int

    def spaces(self) -> Space:
        return {name: LogUniform(*bounds, whole=name == "inner_steps") for name, bounds in self.space.items()}


def asked(options: TuneOptions) -> Search:
    """What the options ask to search.

    Raises:
        InputError: as `settle`; ranges that are none, or of what is given; nothing to search; a budget in seconds.
    """
    everything = given(options)
    of_run = {name: value for name, value in everything.items() if name not in OWN}
    if "seconds" in of_run:
        raise InputError("a search counts iterations: give --trial-iterations, no --seconds")
    settings = settle(**of_run)
    usual = {
        "inner_lr": (settings.inner_lr / TENTH, settings.inner_lr * TENTH),
        "inner_steps": (1, max(5, 2 * settings.inner_steps)),
        "meta_lr": (settings.meta_lr / TENTH, settings.meta_lr * TENTH),
    }
    space = {}
    for name in SEARCHED:
        bounds = everything.get(f"{name}_range")
        if name not in of_run:
            space[name] = _range(name, bounds or usual[name])
        elif bounds:
            raise InputError(f"{typed(name)} is given, and so not searched: give no {typed(name)}-range")
    if not space:
        raise InputError(f"there is nothing to search: leave out one of {', '.join(map(typed, SEARCHED))}")
    trials = positive("--trials", everything.get("trials", TRIALS), integer=True)
    usual_iterations = max(1, settings.iterations // TENTH)
    iterations = positive(
        "--trial-iterations", everything.get("trial_iterations", usual_iterations), integer=True
    )
    seed = everything.get("search_seed", settings.seed)
    return Search(settings, words_of(of_run), space, trials, iterations, seed)


def _range(name: str, bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    for bound in bounds:
        if name == "inner_steps":
            whole(f"each number of {typed(name)}-range", bound, 1)
        positive(f"each number of {typed(name)}-range", bound)
    if high < low:
        raise InputError(f"{typed(name)}-range is the least and the greatest value, got {low:g} and {high:g}")
    return low, high


def words_of(options: Mapping[str, Any], kind: type = TuneOptions) -> list[str]:
    """Options as they are typed, the source first; the folder to write is not among them. kind: whose they are."""
    words = [str(options["source"])] if "source" in options else []
    order = [name for names in headings(kind).values() for name in names]
    for name in sorted(options, key=order.index):
        value = options[name]
        if name in ("source", "out"):
            continue
        if isinstance(value, bool):
            words.append(typed(name) if value else f"--no-{typed(name).removeprefix('--')}")
        else:
            words += [typed(name), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def resumed(options: TuneOptions) -> Search:
    """What the search in a folder was for.

    Raises:
        InputError: no search is there; an option that does not go with it; code that has changed or is not named.
    """
    folder, more = options.resume, given(options)
    assert folder is not None
    again = {name: more.pop(name, None) for name in AGAIN}
    accept, trials = more.pop("accept_changed_code", False), more.pop("trials", None)
    if set(more) != {"resume"}:
        raise InputError(
            "--resume takes the options of the search; no other option goes with it, but more --trials, and --model, "
            "--features-of, --loss and --metric where they are your own code"
        )
    path = folder / SEARCH
    try:
        kept = unsealed(regular.read_text(path))
        settings = read_settings(json.dumps(kept["settings"]), str(path))
        space = {name: tuple(bounds) for name, bounds in kept["space"].items()}
        found = Search(settings, kept["words"], space, kept["trials"], kept["iterations"], kept["seed"])
    except OSError:
        raise InputError(f"{folder} holds no search (no {SEARCH})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not the record of a search ({error})") from None
    if trials is not None:
        found = found._replace(trials=positive("--trials", trials, integer=True))
    return found._replace(settings=named_again(found.settings, folder, **again, accept_changed_code=accept))


def as_json(search: Search) -> str:
    kept = search._asdict() | {"format": FORMAT, "settings": json.loads(to_json(search.settings))}
    return sealed(kept)
