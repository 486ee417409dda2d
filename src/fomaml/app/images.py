"""A folder of the user's own images for a run: are there enough classes and images in each part, and what would do."""

from __future__ import annotations

import math
from typing import NamedTuple

from fomaml.app.settings import Settings
from fomaml.app.wording import with_shares
from fomaml.data.folder import Folder, few_listed, load_folder
from fomaml.data.shares import split_counts
from fomaml.data.source import ClassSource
from fomaml.errors import InputError

PARTS = ("training", "validation", "test")
KEPT = {None: None, "once": True, "drawn": False}  # the option --decode as `load_folder` has it
# what `load_folder` says, and what stands for it here
SPOKEN = ("other shares", "other --shares"), ("ask for fewer of a class", "take fewer --query-shots")


class Images(NamedTuple):
    """A folder that suffices for a run. unvalidated: why there is no validation, or nothing."""

    folder: Folder
    unvalidated: str = ""


def images_needed(train_shots: int, query_shots: int, shots: int, test_query_shots: int) -> tuple[int, int]:
    """How many images a class of training, and one of validation or test, must have. Baselines are tuned on tasks like
    those of the test, of training classes."""
    test = shots + test_query_shots
    return max(test, train_shots + query_shots), test


def load_images(settings: Settings, path: str) -> Images:
    """The classes of a folder.

    Raises:
        InputError: as `load_folder`; classes with too few images; fewer classes than ways in training or in test. Where
            validation alone is short, there is none.
    """
    try:
        folder = load_folder(
            path,
            size=settings.image_size,
            colour="rgb" if settings.rgb else "grey",
            shares=settings.shares,
            min_images=settings.skip_small_classes or 1,
            in_memory=KEPT[settings.decode],
        )
    except InputError as error:
        raise InputError(with_shares(str(error), settings.shares, SPOKEN)) from None
    sources = (folder.train, folder.validation, folder.test)
    _check_images(settings, path, sources)
    short = _short(settings, [len(source) if source else 0 for source in sources])
    if short and short != ["validation"]:
        raise InputError(f"{path}: {_told(settings, folder, short)}")
    if folder.validation is None:
        why = "no directory val" if folder.given else "no share of the classes for validation"
        return Images(folder, f"the folder {path} has {why}")
    if short:
        return Images(folder._replace(validation=None), f"{path}: {_told(settings, folder, short)}")
    return Images(folder)


def _check_images(settings: Settings, path: str, sources: tuple[ClassSource | None, ...]) -> None:
    """Raise `InputError` where a class has too few images."""
    own = settings.train_shots, settings.query_shots, settings.shots, settings.test_query_shots
    train, test = images_needed(*own)
    few = [
        (name, count)
        for source, needed in zip(sources, (train, test, test))
        if source is not None
        for name, count in zip(source.names, source.counts.tolist())
        if count < needed
    ]
    if few:
        few.sort()
        total = sum(len(source) for source in sources if source is not None)
        needs = f"{train}" if train == test else f"{train} in training and {test} at test"
        has = "has" if len(few) == 1 else "have"
        raise InputError(
            f"{path}: {len(few)} of {total} classes {has} fewer images than a task takes, {needs} with the query shots "
            f"({few_listed(few)}): train with --skip-small-classes, which leaves them out, or fewer --query-shots"
        )


def _short(settings: Settings, counts: list[int]) -> list[str]:
    """The parts with fewer classes than a task takes; validation may be none."""
    train, validation, test = counts
    short = ["training"] if train < _train_classes(settings) else []
    short += ["validation"] if 0 < validation < settings.ways else []
    return short + (["test"] if test < settings.ways else [])


def _train_classes(settings: Settings) -> int:
    """The classes that training needs: baselines are tuned on tasks like those of the test."""
    made = {"rotations": 4, "warps": math.inf}.get(settings.augment, 1)
    return max(settings.ways, math.ceil(settings.train_ways / made))


def _told(settings: Settings, folder: Folder, short: list[str]) -> str:
    """How the classes are split, which parts are short, and what would do, tried."""
    parts = {"training": folder.train, "validation": folder.validation, "test": folder.test}
    counts = [len(part) if part else 0 for part in parts.values()]
    total = sum(counts)
    if folder.given:
        there = {name: str(len(part)) for name, part in parts.items() if part}
        how = f"its directories for {_joined(list(there))} hold {' / '.join(there.values())} classes"
    else:
        how = f"{total} classes were split {' / '.join(map(str, counts))}"
    if folder.left_out:
        how += f" ({len(folder.left_out)} with too few images were left out)"
    needs = dict.fromkeys(short, settings.ways)
    if "training" in short:
        needs["training"] = _train_classes(settings)
    if len(set(needs.values())) == 1:
        [needed] = set(needs.values())
        wanted = f"{_joined(short)} need{'s' if len(short) == 1 else ''} {needed}{' each' if len(short) > 1 else ''}"
    else:
        wanted = _joined([f"{part} needs {needed}" for part, needed in needs.items()])
    cures = [] if folder.given else _shares_that_do(settings, total)
    fewer = min(count for count in counts if count)
    if 2 <= fewer < settings.ways and settings.train_ways == settings.ways:
        cures.append(f"--ways {fewer}")
    given = f"give {_joined(cures, ' or ')}, or " if cures else ""
    return f"{how}; {wanted}: {given}add classes"


def _joined(words: list[str], last: str = " and ") -> str:
    return last.join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _shares_that_do(settings: Settings, total: int) -> list[str]:
    """As options, shares that give every part its classes, or else training and test."""
    for validation, note in ((settings.ways, ""), (0, " (without validation)")):
        wanted = (total - validation - settings.ways, validation, settings.ways)
        for digits in (1, 2, 3, 4):
            last = [round(count / total, digits) for count in wanted[1:]]
            shares = (round(1 - sum(last), digits), *last)
            counts = split_counts(total, shares)
            if (
                min(shares[0], shares[2]) > 0
                and not _short(settings, list(counts))
                and bool(counts[1]) == bool(validation)
            ):
                return [f"--shares {' '.join(f'{share:g}' for share in shares)}{note}"]
    return []
