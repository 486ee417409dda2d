"""What ends a command, in one line on standard error and a status: bad input, and what the machine refuses.

Converted are errors that say something of the input or the machine, whichever line raised them: those of the operating
system, a damaged safetensors file, memory that ran out, text that cannot be written as it is, numbers no machine type
holds, and JSON or a value of Python that is nested too deeply. Any other exception is a mistake in this program, or in
code of the user's own that was not called as such, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from safetensors import SafetensorError

from fomaml.app.wording import spoken
from fomaml.engines.common import out_of_memory
from fomaml.errors import InputError, escaped, in_one_line
from fomaml.memory import in_units
from fomaml.ranks import RankError

BAD_INPUT = 2
OTHER_ENDED = 1  # another process of the same run
PIPE_CLOSED = 141  # 128 and the number of SIGPIPE, as the shell tells of programs that the signal ends
CURES = {
    errno.ENOSPC: "make room there, or give another place",
    errno.EDQUOT: "make room there, or give another place",
    errno.EROFS: "give a place that can be written to",
    errno.EACCES: "look at its permissions, or give another place",
    errno.EPERM: "look at its permissions, or give another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "was it moved or deleted?",
    errno.EMFILE: "raise the limit of open files, ulimit -n",
}
LONG = 240  # letters of a word
SMALLER = "give --tasks-at-once 1, a smaller --meta-batch-size, or fewer --shots and --query-shots"
PARSERS = ("json", "ast.py")  # whose recursion follows what they are given


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Within a command: bad input and what the machine refuses is one line on standard error, and the exit status 2;
    that another process of a run has ended is one too, and the status 1.

    Where nobody reads standard output any more, as after `| head`, the command ends quietly with status 141.
    """
    before, output = sys.stdout, None if sys.stdout is None else Output(sys.stdout)
    sys.stdout = output  # type: ignore[assignment]
    try:
        try:
            yield
        except SystemExit:
            _flush(output)
            raise
        _flush(output)
    except InputError as error:
        _end(spoken(str(error)))
    except RankError as error:
        _end(str(error), OTHER_ENDED)
    except OutputError as error:
        _give_up(before)
        if error.errno == errno.EPIPE:
            raise SystemExit(PIPE_CLOSED) from None
        _end(f"standard output cannot be written to: {error.strerror}")
    except Exception as error:
        text = told(error)
        if text is None:
            raise
        _end(text)
    finally:
        sys.stdout = before


class OutputError(OSError):
    """What is printed cannot be written, as on a full disk or where nobody reads a pipe any more."""


class Output:
    """Standard output that tells its own errors from those of other files. What its encoding lacks is escaped.

    refused: the error that it had, which some of those who print take no note of.
    """

    def __init__(self, stream: IO[str]):
        self.stream = stream
        self.refused: OutputError | None = None
        with contextlib.suppress(AttributeError, ValueError):  # it is no text file
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        with self._told():
            return self.stream.write(text)

    def flush(self) -> None:
        with self._told():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refused = OutputError(error.errno, error.strerror)
            raise self.refused from error


def told(error: BaseException) -> str | None:
    """An error of the input or the machine in one line; None of any other."""
    if isinstance(error, OSError):
        return _told_by_system(error)
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged, or cannot be written ({_first(error)})"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
        tried = re.search(r"tried to allocate (\d+) bytes", str(error))
        what = f"{in_units(int(tried[1]))} were asked for" if tried else _first(error)
        return f"out of memory ({what}): {SMALLER}"
    if isinstance(error, UnicodeError):
        return f"text that is not {getattr(error, 'encoding', 'of its encoding')}: {_first(error)}"
    if isinstance(error, OverflowError):
        return f"a number is too large: {_first(error)}"
    if isinstance(error, RecursionError) and _in_parser(error):
        return "what was read is nested too deeply: JSON and values of options have a few levels"
    return None


def one_line(text: str) -> str:
    """A text without line breaks, see `escaped`. Words that are no words, such as thousands of digits, are cut."""
    return escaped(re.sub(rf"(\S{{{LONG // 2}}})\S{{{LONG},}}(\S{{{LONG // 4}}})", r"\1…\2", text))


def _told_by_system(error: OSError) -> str:
    if error.errno is None:
        return in_one_line(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    place = " and ".join(names)
    if not place and error.errno == errno.ENOENT and not _has_directory():
        return "the current directory is not there any more: go to one that is"
    cure = CURES.get(error.errno)
    return f"{place + ': ' if place else ''}{_reason(error)}" + (f"; {cure}" if cure else "")


def _reason(error: OSError) -> str:
    return error.strerror or _first(error)


def _first(error: BaseException) -> str:
    """The first sentence of an error, without its kind."""
    return in_one_line(error).partition(": ")[2] or type(error).__name__


def _in_parser(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(
        part in PARSERS for part in frames[-1].filename.replace("\\", "/").split("/")[-2:]
    )


def _has_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _flush(output: Output | None) -> None:
    if output is not None:  # else it was closed before this program began
        output.flush()
        if output.refused is not None:
            raise output.refused


def _give_up(stream: IO[str]) -> None:
    """Let what is still to be written vanish: at its exit Python would complain of it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _end(text: str, status: int = BAD_INPUT) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody is told
        print(f"fomaml: error: {one_line(text)}", file=sys.stderr, flush=True)
    raise SystemExit(status) from None
