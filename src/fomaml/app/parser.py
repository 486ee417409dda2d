"""A command line out of dataclasses: a field is an option, and a field that is a dataclass a group with a heading."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from fomaml.errors import InputError, shown

Options = TypeVar("Options")
METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


def option(
    text: str, default: Any = None, *, choices: Sequence[str] = (), metavar: str = "", name: str = ""
) -> Any:
    """The field of an option. text: its help. choices: the words it takes, where its type does not list them.

    name: as it is typed, by default that of the field.
    """
    facts = {"help": text, "choices": tuple(choices), "metavar": metavar, "name": name}
    return dataclasses.field(default=default, metadata=facts)


def positional(text: str, default: Any = dataclasses.MISSING, *, metavar: str) -> Any:
    """The field of an argument that has no name before it, which may be left out where it has a default."""
    return dataclasses.field(default=default, metadata={"help": text, "positional": True, "metavar": metavar})


def group(kind: type) -> Any:
    """The field of a group of options; the first line of its docstring is the heading."""
    return dataclasses.field(default_factory=kind)


def parse(kind: type[Options], arguments: Sequence[str] | None = None, prog: str | None = None) -> Options:
    """The options of a program without commands.

    Raises:
        InputError: an option that is not known, or a value that is not of its type.
    """
    parser = _parser(_Parser, kind, prog=prog)
    return _read(parser, parser, kind, arguments)


def parse_command(
    commands: Mapping[str, type], arguments: Sequence[str] | None, prog: str, description: str
) -> Any:
    """The options of the command that was given; raises as `parse`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _check_command(list(commands), arguments, prog)
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: _parser(kinds.add_parser, kind, name, help=_paragraphs(kind)[0])
        for name, kind in commands.items()
    }
    name = parser.parse_known_args(arguments)[0].command
    return _read(parser, parsers[name], commands[name], arguments, parsers.values())


def _check_command(commands: Sequence[str], arguments: Sequence[str], prog: str) -> None:
    """Raise `InputError` unless the arguments begin with a command, or ask for help."""
    first = arguments[0] if arguments else ""
    if first in (*commands, "-h", "--help"):
        return
    there = f"{', '.join(commands)}; see {prog} --help"
    if not first:
        raise InputError(f"name a command: {there}")
    if first.startswith("-"):
        raise InputError(f"a command comes first, before {shown(first)}: {there}")
    near = difflib.get_close_matches(first, commands, 1)
    hint = f", did you mean {near[0]}? There" if near else "; there"
    raise InputError(f"unknown command {shown(first)}{hint} are: {there}")


class _Parser(argparse.ArgumentParser):
    """Says in the words of this project what argparse finds."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        message = re.sub(r"^(\S+): takes ", r"\1 takes ", message)  # of `_number`
        message = re.sub(
            r"^(\S+): expected (.+?) arguments?$", lambda found: self._lacking(found[1], found[2]), message
        )
        message = re.sub(
            r"^(\S+?)/\S+: ignored explicit argument (.*)$", r"\1 takes no value, got \2", message
        )
        message = re.sub(r"^the following arguments are required: ", "these are missing: ", message)
        raise InputError(f"{message}; see {self.prog} --help")

    def _lacking(self, name: str, number: str) -> str:
        action = next((each for each in self._actions if name in each.option_strings), None)
        kind = "" if action is None or not isinstance(action.metavar, str) else f" {action.metavar}"
        several = "values" if number.isdigit() else "value"
        return f"{name} needs {number} {several},{kind}".rstrip(",")


def _number(kind: type, words: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"takes {words}, got {shown(text)}") from None

    return read


READERS: dict[Any, Callable[[str], Any]] = {
    int: _number(int, "a whole number"),
    float: _number(float, "a number"),
}


def _parser(make, kind: type, *arguments, **options) -> argparse.ArgumentParser:
    paragraphs = _paragraphs(kind)
    examples = [line for text in paragraphs for line in text.splitlines() if line.startswith("Example: ")]
    prose = [text for text in paragraphs if not text.startswith("Example: ")]
    parser = make(
        *arguments,
        **options,
        description="\n\n".join(prose),
        epilog="\n".join(examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    named = [
        field.metadata["metavar"] for field in dataclasses.fields(kind) if field.metadata.get("positional")
    ]
    parser.usage = " ".join([parser.prog, *named, "[options]"])
    _add_fields(parser, parser, kind)
    return parser


def _read(
    parser, own, kind: type[Options], arguments, others: Iterable[argparse.ArgumentParser] = ()
) -> Options:
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise InputError(f"{_unknown(own, unknown[0], others)} see {own.prog} --help")
    return _made(kind, vars(values))


def _unknown(own: argparse.ArgumentParser, word: str, others: Iterable[argparse.ArgumentParser]) -> str:
    """What is wrong with an argument that a command does not know."""
    name, known = word.partition("=")[0], _options(own)
    if not name.startswith("-") or name in known:
        places = [str(action.metavar) for action in own._actions if not action.option_strings]
        takes = f"only {' and '.join(places)}" if places else "nothing"
        return f"{own.prog} takes {takes} without the name of an option, got {shown(word)} too;"
    elsewhere = [parser.prog for parser in others if name in _options(parser)]
    near = [text for text in known if len(name) > 3 and text.startswith(name)]
    near = near or difflib.get_close_matches(name, known, 1, 0.7 if elsewhere else 0.6)
    hint = f", did you mean {near[0]}?" if near else ";"
    if elsewhere:
        return f"{name} is an option of {', '.join(elsewhere)}, not of {own.prog}{hint}"
    return f"unknown argument {shown(word)}{hint}"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [text for action in parser._actions for text in action.option_strings]


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    made = {}
    for field in dataclasses.fields(kind):
        nested = _group_of(field)
        value = _made(nested, values) if nested else values[field.name]
        made[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def _add_fields(parser, place, kind: type) -> None:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        nested = _group_of(field)
        if nested:
            _add_fields(parser, parser.add_argument_group(_paragraphs(nested)[0].rstrip(".")), nested)
        else:
            _add(place, field, hints[field.name])


def _add(place, field: dataclasses.Field, hint) -> None:
    facts = field.metadata
    kind, many = _kind(hint)
    required = field.default is dataclasses.MISSING
    text = facts["help"].replace("%", "%%")
    if facts.get("positional"):
        counts = {"nargs": "+"} if many else {} if required else {"nargs": "?"}
        default: dict[str, Any] = {} if required else {"default": field.default}
        default |= {"type": READERS.get(kind, kind), "help": text, "metavar": facts["metavar"]}
        place.add_argument(field.name, **counts, **default)
        return
    name = f"--{(facts['name'] or field.name).replace('_', '-')}"
    if kind is bool:
        place.add_argument(
            name, dest=field.name, default=field.default, action=argparse.BooleanOptionalAction, help=text
        )
        return
    choices = facts["choices"] or (get_args(kind) if get_origin(kind) is Literal else ())
    metavar = facts["metavar"] or (f"{{{','.join(choices)}}}" if choices else METAVARS[kind])
    place.add_argument(
        name,
        dest=field.name,
        default=field.default,
        required=required,
        type=str if choices else READERS.get(kind, kind),
        nargs=many,
        metavar=metavar,
        help=text,
    )


def _kind(hint) -> tuple[Any, int | str | None]:
    """The type of one value, and how many there are: None for one, "+" for any number."""
    if get_origin(hint) in (Union, types.UnionType):
        [hint] = [each for each in get_args(hint) if each is not type(None)]
    if get_origin(hint) is not tuple:
        return hint, None
    kinds = get_args(hint)
    return kinds[0], "+" if Ellipsis in kinds else len(kinds)


def _group_of(field: dataclasses.Field) -> type | None:
    factory = field.default_factory
    return factory if dataclasses.is_dataclass(factory) else None  # type: ignore[return-value]


def _paragraphs(kind: type) -> list[str]:
    return inspect.cleandoc(kind.__doc__ or "").split("\n\n")
