"""What the library says, in the words of the command line: options in the place of Python arguments."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import ParamSpec, TypeVar

from fomaml.app.settings import Settings
from fomaml.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
NAMES = [field.name for field in dataclasses.fields(Settings)]
_ANY = "|".join(sorted(NAMES, key=len, reverse=True))
_LONG = "|".join(sorted((name for name in NAMES if "_" in name), key=len, reverse=True))
# What a general rule would garble, first; the rules after it are of any argument that is an option too.
PHRASES: list[tuple[str, str]] = [
    (r"(?<![\w'/.-])compile=True\b", "--compile yes"),
    (r"(?<![\w'/.-])compile=False\b", "--compile no"),
    (r"give the size=\(height, width\) to resize to", "give --image-size HEIGHT WIDTH to resize them to"),
    (r"(?<![\w'-])each side of size\b", "each number of --image-size"),
    (r"(?:fomaml\.)?convert_batch_norm\([^)]*\)", "--norm-policy"),
    (r"small='leave out'", "--skip-small-groups"),
    (r"fewer_classes=True", "--fewer-classes"),
    (
        r"list it as categorical, or leave it out of the features",
        "give --categorical with its name, or --features without it",
    ),
    (r"leave_out_short=True", "--skip-short"),
    (r"give inputs\.to\(torch\.(\w+)\)(?:, or decode images .* does)?", r"save them as \1"),
    (r"separator='\\t'", "--separator tab"),
    (r"decimal=','", "--decimal ,"),
    (r"decimal must be", "--decimal must be"),
    (r"separator=('.')", r"--separator \1"),
    (r"give output=,", "give --output,"),
    (r"say by layer= or output= what to take", "say by --features-layer what to take"),
    (rf"(?<![\w'/.-])({_ANY})=True\b", r"--\1"),
    (rf"(?<![\w'/.-])({_ANY})=(['\"]?)([\w.-]+)\2(?: or (['\"])([\w.-]+)\4)?", r"--\1 \3 or \5"),
    (rf"(?<![\w'/.-])({_LONG})(?![\w'/=(-]|\.\w)", r"--\1"),
]


def option(name: str) -> str:
    """A setting as it is typed: --inner-lr for inner_lr."""
    return f"--{name.replace('_', '-')}"


def spoken(message: str) -> str:
    """A message of the library for the shell: `engine='loop'` becomes `--engine loop`, `inner_lr` becomes `--inner-lr`.

    Names within paths and quotes are left as they are.
    """
    for pattern, words in PHRASES:
        message = re.sub(pattern, partial(_typed, words), message)
    return message


def in_python(message: str) -> str:
    """A message about options for who calls a function: `--model own.py:Net` becomes `model='own.py:Net'`."""

    def argument(found: re.Match) -> str:
        name, value = found[1].replace("-", "_"), found[2]
        if name == "accept_changed_code":
            return f"{name}=True"
        return f"{name}={value.strip()!r}" if value else f"{name}="

    return re.sub(
        r"(?<![\w-])--([a-z][a-z-]*[a-z])( (?:[^\s,;:]+\.py|[\w.]+):\w+| (?:FILE|RUN)\b)?", argument, message
    )


def in_words_of_python(function: Callable[P, T]) -> Callable[P, T]:
    """The function, whose errors are told by `in_python`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            raise InputError(in_python(str(error))) from error

    return call


def with_shares(message: str, shares: tuple[float, ...] | None, phrases: Iterable[tuple[str, str]]) -> str:
    """What a split of the library says of its argument `shares`, of the option; phrases: further ones to replace."""
    if shares is not None:
        message = message.replace(str(shares), " ".join(f"{share:g}" for share in shares))
    common = ("each of shares", "each number of --shares"), ("shares must add", "--shares must add")
    for text, words in (*common, *phrases):
        message = message.replace(text, words)
    return message


def _typed(words: str, found: re.Match) -> str:
    if words.endswith(r" or \5") and found[5] is None:
        words = words.removesuffix(r" or \5")
    text = found.expand(words)
    return text.replace(f"--{found[1]}", option(found[1])) if found.re.groups else text
