"""Classes or tasks dealt out to training, validation and test, by shares and a seed or by lists of their keys."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, combinations, pairwise
from typing import Any, TypeVar

from fomaml.data.keys import key_of
from fomaml.errors import InputError, plain, positive

SHARES = (0.6, 0.2, 0.2)
PARTS = ("train", "validation", "test")
Item = TypeVar("Item")


def check_shares(shares: object) -> None:
    """Raise `InputError` unless these are three numbers that add up to 1; that of validation may be 0."""
    if not isinstance(shares, (tuple, list)) or len(shares) != 3:
        raise InputError(f"shares must be three numbers, for train, validation and test, got {shares!r}")
    for part, share in zip(PARTS, shares):
        if share != 0 or part != "validation":
            positive("each of shares", share)
    if not math.isclose(sum(shares), 1):
        raise InputError(f"shares must add up to 1, got {shares!r}, which is {sum(shares)}")


def split_counts(items: int, shares: Sequence[float]) -> tuple[int, int, int]:
    """How many of the items go to training, validation and test."""
    first, second = round(items * shares[0]), round(items * (shares[0] + shares[1]))
    return first, second - first, items - second


def dealt(items: Sequence[Item], shares: Sequence[float], seed: int) -> list[list[Item]]:
    """Those for training, validation and test, each in the order given; `random.Random(seed)` shuffles them first."""
    seed = plain(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed must be a whole number, got {seed!r}")
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    ends = list(accumulate(split_counts(len(items), shares), initial=0))
    return [[items[number] for number in sorted(order[a:b])] for a, b in pairwise(ends)]


def parted(
    names: Sequence[str],
    shares: tuple[float, float, float] | None,
    seed: int,
    lists: Mapping[str, Iterable[Any] | None],
) -> dict[str, Any]:
    """The keys of each part, JSON-able, with the shares and the seed where these have made it.

    lists: keys by part, None for one that has no list; arguments and errors as of `GroupSource.split`.
    """
    given = {part: [key_of(key) for key in own] for part, own in lists.items() if own is not None}
    record: dict[str, Any] = {part: given.get(part, []) for part in PARTS}
    if given:
        if shares is not None:
            raise InputError(
                f"tasks are split by lists of their keys, where no shares are of use, got {shares}"
            )
        if "test" not in given:
            raise InputError("tasks that are split by lists of their keys need one for the test")
        for part, other in combinations(PARTS, 2):
            if both := [name for name in record[part] if name in record[other]]:
                raise InputError(f"the task {both[0]!r} is listed for {part} and for {other}")
        if "train" not in given:
            record["train"] = [n for n in names if n not in {*record["validation"], *record["test"]}]
    else:
        shares = SHARES if shares is None else shares
        check_shares(shares)
        record = dict(zip(PARTS, dealt(names, shares, seed)))
        record |= {"shares": list(shares), "seed": plain(seed)}
    counts = [len(record[part]) for part in PARTS]
    wanted = "validation" in given or bool(shares and shares[1])
    if not counts[0] or not counts[2] or (wanted and not counts[1]):
        how = "the lists" if given else f"the shares {shares}"
        raise InputError(
            f"{len(names)} tasks, which {how} split {'/'.join(map(str, counts))} into train/validation/test; "
            "expected some in each: give more tasks or another split"
        )
    return record
