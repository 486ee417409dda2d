"""Files of tables, csv, tsv and parquet, as DataFrames; what they declare is looked at before they are read."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from fomaml import regular
from fomaml.errors import InputError, in_one_line, shown
from fomaml.memory import check_fits

SEPARATORS = {"\t": "tabs", ";": "';'", "|": "'|'", ",": "','", " ": "spaces"}


def read_file(pd: Any, path: Path, separator: str | None, decimal: str) -> Any:
    """A file by its suffix."""
    if decimal not in (".", ","):
        raise InputError(f"decimal must be '.' or ',', got {shown(decimal)}")
    suffix = path.suffix.lower()
    if path.is_dir() or not path.exists():
        raise InputError(f"{path} is a folder, expected a table" if path.is_dir() else f"no file {path}")
    try:
        size = regular.check_regular(path)
        check_fits(f"the table {path}", size, "give a part of its rows")
        if suffix in (".parquet", ".pq"):
            _check_parquet(path, size)
            return pd.read_parquet(path)
        if suffix not in (".csv", ".tsv", ".txt"):
            raise InputError(f"{path} ends in {suffix!r}, expected .csv, .tsv or .parquet")
        separator = separator or ("\t" if suffix == ".tsv" else ",")
        _check_header(path, separator)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(path, sep=separator, decimal=decimal, encoding="utf-8-sig", low_memory=False)
    except InputError:
        raise
    except ImportError:
        raise InputError("no pyarrow, which reads parquet; pip install 'fomaml[tables]'") from None
    except Exception as error:  # pandas and pyarrow have their own for each fault
        why = getattr(error, "strerror", None) or in_one_line(error)
        if "C error: " in str(error):
            why = str(error).split("C error: ")[-1].strip()
        raise InputError(f"{path} cannot be read as a table ({why}); mend it") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise InputError(
            f"{path} has rows with more values than the {len(frame.columns)} names of its first line"
        )
    return frame


def _check_parquet(path: Path, size: int) -> None:
    """Raise `InputError` for a file that declares more than may be made of its bytes."""
    from pyarrow import parquet

    with regular.opened(path) as file:
        told = parquet.read_metadata(file)
    _check_columns(path, told.num_columns)
    least = 8 * max(told.num_rows, 0) * told.num_columns  # as numbers, or as places of texts
    declared = sum(max(0, told.row_group(group).total_byte_size) for group in range(told.num_row_groups))
    regular.check_unpacked(str(path), max(least, declared), size)


def _check_columns(path: Path, number: int) -> None:
    if number > regular.COLUMNS:
        raise InputError(f"{path} has {number} columns, more than the {regular.COLUMNS} that are read")


def _check_header(path: Path, separator: str) -> None:
    """Raise `InputError` for a first line that names no columns, two alike, or one where another separator stands."""
    with regular.opened(path) as file:
        start = file.read(regular.LINE + 1)
    whole, line_end, _ = start.rpartition(b"\n") if len(start) > regular.LINE else (start, b"\n", b"")
    if not line_end:
        raise InputError(f"{path} has a first line of more than {regular.LINE} bytes; is it a table?")
    lines = io.StringIO(whole.decode("utf-8-sig"), newline="")
    names = next(csv.reader(lines, delimiter=separator), [])
    _check_columns(path, len(names))
    if not any(name.strip() for name in names):
        raise InputError(f"{path} is empty, expected a line of column names and rows below it")
    twice = [name for name, number in Counter(names).items() if number > 1 and name]
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}; rename one")
    if len(names) == 1:
        other = next((own for own in SEPARATORS if own != separator and own in names[0]), None)
        cure = f"; it seems to be separated by {SEPARATORS[other]}: give separator={other!r}" if other else ""
        own = SEPARATORS.get(separator, repr(separator))
        raise InputError(
            f"{path} has one column, {shown(names[0])}, where columns are separated by {own}{cure}"
        )
