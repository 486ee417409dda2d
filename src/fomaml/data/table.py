"""Tables with a task column: csv, tsv and parquet files, and DataFrames, as arrays of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fomaml.choices import check_choice, nearest_first
from fomaml.data.keys import Kind, key_of
from fomaml.data.table_files import read_file
from fomaml.errors import InputError, in_one_line, shown

MOST_CLASSES = 20  # whole numbers of more different values are quantities


class Columns(NamedTuple):
    """What a table says: the arguments of `GroupSource`, and what it keeps beside them."""

    inputs: Any
    targets: np.ndarray
    groups: np.ndarray
    order: np.ndarray | None
    kind: Kind
    features: list[str]
    target_names: list[str]
    categories: dict[str, list[str]]
    dropped: int


def read_columns(
    table: Any,
    task: str,
    target: str | Sequence[str],
    order: str | None = None,
    features: Sequence[str] | None = None,
    kind: Kind | None = None,
    categorical: Sequence[str] = (),
    drop_missing: bool = False,
    separator: str | None = None,
    decimal: str = ".",
) -> Columns:
    """The columns of a table; arguments and errors as of `GroupSource.from_table`."""
    if kind is not None:
        check_choice("kind", kind, Kind)
    frame, origin = read_table(table, separator, decimal)
    targets = [target] if isinstance(target, str) else list(target)
    chosen = None if features is None else [features] if isinstance(features, str) else list(features)
    texts = [categorical] if isinstance(categorical, str) else list(categorical)
    _check_roles(frame, origin, task, targets, order, chosen, texts)
    if chosen is None:
        chosen = _other_columns(frame, origin, task, targets, order)
    chosen += [name for name in texts if name not in chosen]
    used = list(dict.fromkeys([task, *targets, *chosen, *([order] if order else [])]))
    kept, dropped = without_missing(frame[used], origin, drop_missing)
    kind = kind or _kind(kept, frame, targets, origin)
    if kind == "classification" and len(targets) > 1:
        raise InputError(
            f"classification has one target, got {', '.join(targets)}; several are for regression"
        )
    names = [name for name in chosen if name not in texts]
    numbers = numbers_of(kept, frame, names, origin, "feature")
    inputs: Any = numbers
    categories: dict[str, list[str]] = {}
    if texts:
        codes = np.empty((len(kept), len(texts)), dtype=np.int64)
        for column, name in enumerate(texts):
            own, codes[:, column] = np.unique(plain_column(kept[name]), return_inverse=True)
            categories[name] = [key_of(value) for value in own]
        inputs = {"numbers": numbers, "categories": codes}
    if kind == "classification":
        labels = _labels(kept, targets[0], origin)
    else:
        labels = numbers_of(kept, frame, targets, origin, "target")
        for name, values in zip(targets, labels.T):
            if (values == values[0]).all():
                raise InputError(
                    f"the target {name!r} of {origin} is {values[0]:g} in all {len(values)} rows: there is nothing to "
                    "learn"
                )
    return Columns(
        inputs,
        labels,
        plain_column(kept[task]),
        None if order is None else _order(kept, order, origin),
        kind,
        [*names, *texts],
        targets,
        categories,
        dropped,
    )


# --- the file -------------------------------------------------------------------------------------


def pandas() -> Any:
    """pandas, imported only where a table is read."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise InputError("no pandas, which reads tables; pip install 'fomaml[tables]'") from None
    return pandas


def read_table(table: Any, separator: str | None = None, decimal: str = ".") -> tuple[Any, str]:
    """A file or a DataFrame as a DataFrame of pandas with rows and named columns, and what to call it in messages."""
    pd = pandas()
    if isinstance(table, str | Path):
        path = Path(table).expanduser()
        frame, origin = read_file(pd, path, separator, decimal), str(path)
    else:
        frame = table.to_pandas() if type(table).__module__.partition(".")[0] == "polars" else table
        origin = "the table"
        if not isinstance(frame, pd.DataFrame):
            raise InputError(f"a table is a path or a DataFrame, got a {type(table).__name__}")
    frame = frame.reset_index(drop=True).rename(columns=str)
    twice = [name for name, number in Counter(frame.columns).items() if number > 1]
    if twice:
        raise InputError(f"{origin} has two columns {twice[0]!r}; rename one")
    if not len(frame):
        raise InputError(f"{origin} has no rows")
    return frame, origin


# --- which columns --------------------------------------------------------------------------------


def _check_roles(
    frame: Any,
    origin: str,
    task: str,
    targets: list[str],
    order: str | None,
    features: list[str] | None,
    categorical: list[str],
) -> None:
    """Raise `InputError` for columns that are not there, or that cannot be two things at once."""
    roles = {"task": [task], "target": targets, "order": [order] if order else []}
    roles |= {"feature": features or [], "categorical feature": categorical}
    for names in roles.values():
        for name in names:
            if name not in frame.columns:
                raise InputError(
                    f"{origin} has no column {name!r}; there are: {nearest_first(name, list(frame.columns))}"
                )
    if not targets or (features == [] and not categorical):
        raise InputError(f"no {'features' if targets else 'target'} given; name one column or more")
    for role in ("target", "feature", "categorical feature"):
        if twice := next((name for name in roles[role] if roles[role].count(name) > 1), None):
            raise InputError(f"the {role} {twice!r} is given twice")
    for role, others in (
        ("task", ("target", "feature", "categorical feature", "order")),
        ("target", ("feature", "categorical feature", "order")),
    ):
        for other in others:
            if both := next((name for name in roles[other] if name in roles[role]), None):
                raise InputError(
                    f"the column {both!r} is given both as {role} and as {other}; it can be one of them"
                )


def _other_columns(frame: Any, origin: str, task: str, targets: list[str], order: str | None) -> list[str]:
    """All columns but the task and the targets; the order among them where it holds numbers."""
    names = [name for name in frame.columns if name not in (task, *targets)]
    if order in names and not _is_number(frame[order]):
        names.remove(order)
    for name in names:
        if not name.strip() or name.startswith("Unnamed: "):
            raise InputError(f"{origin} has a column without a name, as an index has: name the features")
    if not names:
        raise InputError(
            f"{origin} has no columns besides the task and the targets: there is nothing to learn from"
        )
    return names


def without_missing(frame: Any, origin: str, drop: bool) -> tuple[Any, int]:
    """The rows that have all values, and how many were left out.

    Raises:
        InputError: missing values, unless they are to be dropped; no rows that have all.
    """
    missing = frame.isna()
    rows = missing.any(axis=1).to_numpy()
    if not rows.any():
        return frame, 0
    counts = {name: int(number) for name, number in missing.sum().items() if number}
    first = int(rows.argmax())
    where = next(name for name in frame.columns if missing[name].iloc[first])
    if not drop:
        by = ", ".join(f"{name!r} {number}" for name, number in list(counts.items())[:5])
        raise InputError(
            f"{origin} lacks values in {int(rows.sum())} of {len(frame)} rows, the first in row {first + 1}, column "
            f"{where!r} (by column: {by}): fill them in, or drop these rows (drop_missing=True)"
        )
    if rows.all():
        raise InputError(f"{origin} lacks values in every row, the first in column {where!r}: leave it out")
    return frame[~rows], int(rows.sum())


# --- values ---------------------------------------------------------------------------------------


def _is_number(column: Any) -> bool:
    """Whether it holds numbers, or true and false."""
    types = pandas().api.types
    return types.is_numeric_dtype(column.dtype) and not types.is_complex_dtype(column.dtype)


def plain_column(column: Any) -> np.ndarray:
    """A column without missing values as numpy has it: numbers or text."""
    if _is_number(column):
        kind = np.dtype(getattr(column.dtype, "numpy_dtype", column.dtype))
        return column.to_numpy(dtype=kind)
    return np.array([key_of(value) for value in column], dtype=str)


def _kind(frame: Any, whole: Any, targets: list[str], origin: str) -> Kind:
    """Classification where the one target is no number, or has few different values, all whole numbers.

    Raises:
        InputError: many different texts, most of which read as numbers; the message says where.
    """
    if len(targets) > 1:
        return "regression"
    column = frame[targets[0]]
    values = np.unique(plain_column(column))
    if not _is_number(column):
        read = pandas().to_numeric(np.char.replace(values, ",", "."), errors="coerce")
        numbers, commas = np.isfinite(read), np.char.find(values, ",") >= 0
        if (len(values) > MOST_CLASSES and numbers.mean() > 0.5) or (numbers.all() and commas.any()):
            # a quantity, with a flaw
            raise InputError(_text(column, targets[0], origin, "target"))
        return "classification"
    # whole numbers of which some are missing are kept as floating ones
    counted = values.dtype.kind in "biu" or (
        whole[targets[0]].isna().any() and bool((values == np.round(values)).all())
    )
    return "classification" if counted and len(values) <= MOST_CLASSES else "regression"


def numbers_of(frame: Any, whole: Any, names: list[str], origin: str, role: str) -> np.ndarray:
    """(rows, columns) float64.

    Raises:
        InputError: text or infinite values; the message says where.
    """
    numbers = np.empty((len(frame), len(names)))
    for place, name in enumerate(names):
        column = frame[name]
        if not _is_number(column):
            others = [f"{own!r}" for own in names[place + 1 :] if not _is_number(frame[own])]
            more = f" (as do {', '.join(others)})" if others else ""
            raise InputError(_text(column, name, origin, role) + more)
        numbers[:, place] = plain_column(column)
        wrong = ~np.isfinite(numbers[:, place])
        if wrong.any():
            row = int(frame.index[int(wrong.argmax())]) + 1
            raise InputError(
                f"the {role} {name!r} of {origin} is infinite in {int(wrong.sum())} rows, the first is row {row}: mend "
                "them or leave them out"
            )
    return numbers


def _text(column: Any, name: str, origin: str, role: str) -> str:
    """What to say of a column of text where numbers are expected."""
    pd = pandas()
    if pd.api.types.is_datetime64_any_dtype(column.dtype) or pd.api.types.is_timedelta64_dtype(column.dtype):
        return f"the {role} {name!r} of {origin} holds dates, expected numbers: make numbers of them, or leave it out"
    values = [key_of(value) for value in column]
    read = pd.to_numeric(pd.Series(values), errors="coerce").isna().to_numpy()
    bad = int(read.argmax())
    where = f"{values[bad]!r} in row {int(column.index[bad]) + 1}"
    value = column.iloc[bad]
    what = "text" if isinstance(value, str) else f"values of type {type(value).__name__}"
    text = f"the {role} {name!r} of {origin} holds {what}, expected numbers: {where}"
    if not read.any():
        return f"{text}; it reads as numbers: convert it"
    commas = pd.to_numeric(pd.Series(values).str.replace(",", "."), errors="coerce").isna().to_numpy()
    if commas.sum() < read.sum() and not commas[bad]:
        return f"{text}, with a comma for the decimal point: give decimal=','"
    if read.sum() < len(values) / 2:
        return f"{text}, the first of {int(read.sum())} such rows of {len(values)}; mend them"
    if role == "target":
        return f"{text}; text is for classification"
    return f"{text}; list it as categorical, or leave it out of the features"


def _labels(frame: Any, name: str, origin: str) -> np.ndarray:
    """(rows,) labels, for classification."""
    labels = plain_column(frame[name])
    if labels.dtype.kind == "f" and (labels != np.round(labels)).any():
        raise InputError(
            f"the target {name!r} of {origin} holds numbers such as {labels[labels != np.round(labels)][0]:g}, which "
            "are no classes: take kind regression"
        )
    found = np.unique(labels)
    if len(found) < 2:
        raise InputError(
            f"the target {name!r} of {origin} has one class only, {key_of(found[0])!r} in all {len(labels)} rows"
        )
    return labels


def _order(frame: Any, name: str, origin: str) -> np.ndarray:
    """(rows,) numbers or dates; text is read as dates of ISO 8601."""
    column = frame[name]
    if _is_number(column):
        return plain_column(column)
    pd = pandas()
    if not pd.api.types.is_datetime64_any_dtype(column.dtype):
        try:
            column = pd.to_datetime(column.astype(str), format="ISO8601", utc=True)
        except (ValueError, TypeError) as error:
            raise InputError(
                f"the order {name!r} of {origin} holds text such as {shown(key_of(frame[name].iloc[0]))}, expected "
                f"numbers or dates like 2026-01-31 ({in_one_line(error)})"
            ) from None
    return (
        column.dt.tz_localize(None).to_numpy()
        if column.dt.tz is None
        else column.dt.tz_convert(None).to_numpy()
    )
