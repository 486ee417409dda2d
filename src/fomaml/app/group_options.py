"""The options of tasks that are groups of rows: tables, arrays and recordings with a task key."""

from __future__ import annotations

from dataclasses import dataclass

from fomaml.app.parser import option
from fomaml.app.settings import Draw, Kind


@dataclass(frozen=True)
class GroupOptions:
    """Groups of rows (table, arrays, windows)."""

    task: str | None = option(
        "the column, or the array's key, that says which task a row belongs to", metavar="COLUMN"
    )
    target: tuple[str, ...] | None = option(
        "what is learned; several columns for regression", metavar="COLUMN"
    )
    order: str | None = option(
        "what the rows of a task are sorted by: numbers, or dates like 2026-01-31", metavar="COLUMN"
    )
    features: tuple[str, ...] | None = option(
        "for table: the columns to learn from; default: all the others, and the order where it holds numbers",
        metavar="COLUMN",
    )
    categorical: tuple[str, ...] | None = option(
        "for table: features that are no numbers; the model gets whole numbers for them, as `categories` beside "
        "`numbers`",
        metavar="COLUMN",
    )
    separator: str | None = option(
        "for table: what stands between columns: a character, tab or space", metavar="X"
    )
    decimal: str | None = option("for table: the decimal point of its numbers, . (default) or ,", metavar="X")
    drop_missing: bool = option(
        "for table: leave out rows that lack a value, instead of refusing them", False
    )
    inputs: tuple[str, ...] | None = option(
        "for arrays and windows: the key of the inputs; several of arrays reach the model as keywords",
        metavar="KEY",
    )
    lengths: str | None = option(
        "for windows: the key of the lengths of the recordings, which stand one after the other in the inputs",
        metavar="KEY",
    )
    window: int | None = option("for windows: the samples of a window")
    hop: int | None = option("for windows: the samples from one window to the next")
    skip_short: bool = option("for windows: leave out recordings shorter than a window", False)
    kind: Kind | None = option(
        "default: classification where the target is text, true or false, or whole numbers (in a table at most 20 "
        "different ones), with the same classes in all tasks; else regression"
    )
    draw: Draw | None = option(
        "which rows of a task are its support set: random, or the first in the order, before all query rows (default "
        "where there is an order), or anytime, as first from a random row on"
    )
    train_draw: Draw | None = option("the same in training; default: as --draw, for windows anytime")
    gap: int | None = option(
        "the rows left out between support and query set (default: 0; for windows so many that no sample is in both)"
    )
    query_all: bool = option(
        "judge validation and test tasks on all the rows that are left for the query set", False
    )
    skip_small_groups: bool = option("leave out tasks with too few rows, instead of refusing them", False)
    fewer_classes: bool = option(
        "take a task without the classes that have too few rows in it, where two or more are left", False
    )
    test_keys: tuple[str, ...] | None = option(
        "the tasks for the test; all others are for training. Default: --shares", metavar="KEY"
    )
    validation_keys: tuple[str, ...] | None = option(
        "the tasks for validation, beside --test-keys", metavar="KEY"
    )
    split_seed: int | None = option("the seed that --shares deal out tasks with (default: 0)")
    scale: bool | None = option(
        "scale features and targets to mean 0 and deviation 1 of the training tasks (default); results are told in the "
        "targets' own unit"
    )
