"""A command line out of dataclasses: a field is an option, and a field that is a dataclass a group with a heading."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from fomaml.errors import InputError

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
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: _parser(kinds.add_parser, kind, name, help=_paragraphs(kind)[0])
        for name, kind in commands.items()
    }
    name = parser.parse_known_args(arguments)[0].command
    return _read(parser, parsers[name], commands[name], arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


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


def _read(parser, own, kind: type[Options], arguments) -> Options:
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [text for action in own._actions for text in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        hint = f", did you mean {near[0]}?" if near else ";"
        raise InputError(f"unknown argument {unknown[0]!r}{hint} see {own.prog} --help")
    return _made(kind, vars(values))


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
        default = {} if required else {"default": field.default}
        place.add_argument(field.name, type=kind, help=text, metavar=facts["metavar"], **counts, **default)
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
        type=str if choices else kind,
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
