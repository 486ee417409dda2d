"""Modules of the user's own: what is built by which arguments, and what would be silently wrong in them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fomaml.app.own import Own, find, seeded, told, where
from fomaml.backbones import fit_weights
from fomaml.errors import InputError, in_one_line, shown
from fomaml.tasks import Examples
from fomaml.trees import call, mapped
from fomaml.trees import named as leaves_by_name

# What a class or function is told by keyword, if its signature has the name and nothing else was given for it.
OFFERED = (
    "outputs, num_classes and n_classes (how many outputs), ways, input_shape and image (the shape of one input), "
    "in_channels (its first number) and in_features (that of a vector)"
)


def offered(outputs: int, ways: int | None, shape: tuple[int, ...] | None) -> dict[str, Any]:
    """The arguments that a module may ask for by name.

    shape: of one input; None where inputs are several tensors.
    """
    facts: dict[str, Any] = dict.fromkeys(("outputs", "num_classes", "n_classes"), outputs)
    if ways is not None:
        facts["ways"] = ways
    if shape:
        facts |= {"input_shape": shape, "image": shape, "in_channels": shape[0]}
        if len(shape) == 1:
            facts["in_features"] = shape[0]
    return facts


def find_model(name: str) -> Own:
    """What makes the model of this name; see `find`. Without NAME it is the only thing there that needs no arguments: a
    class, or else a function or a module.
    """
    return find(name, _modules)


def load_module(
    name: str,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> nn.Module:
    """Build the module that `package.module:factory`, `file.py:factory`, or either without a factory, names.

    The factory is a class, a function or a module. options, facts: see `build`.

    Raises:
        InputError: no such thing, or it raises an error.
    """
    own = find_model(name)
    if isinstance(own.value, nn.Module):
        if options or weights:
            raise InputError(f"{name} is a module already: no --model-options and no --model-weights")
        return own.value
    return build(own, options, facts, seed, weights)


def build(
    own: Own,
    options: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    seed: int = 0,
    weights: str | None = None,
) -> nn.Module:
    """Call the class or function that the user has named; all weights follow from the seed.

    weights: a .safetensors file of all its tensors.
    options: its arguments. facts: further ones, see `offered`, of which it is told those that its signature names.

    Raises:
        InputError: it does not take the options, needs others, raises an error, or makes no module that can learn.
    """
    factory, name = own.value, own.name
    if isinstance(factory, nn.Module):
        raise InputError(
            f"{name} is a module already, whose weights no seed has drawn: name its class, or a function that makes it"
        )
    if not callable(factory):
        raise InputError(
            f"{name} must be a class or a function that makes an nn.Module, not {_article(factory)}"
        )
    if inspect.isclass(factory) and not issubclass(factory, nn.Module):
        raise InputError(f"{name} is a class, but no nn.Module")
    arguments = _arguments(own, dict(options or {}), dict(facts or {}))
    with told(f"{name} could not be built", own.path, seed):
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must give an nn.Module, not {_article(model)}")
    for parameter, tensor in model.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise InputError(
                f"{name} has the lazy parameter {parameter!r} without a shape: give its layer the size"
            )
    for attribute, kept in _unregistered(model):
        raise InputError(
            f"{name} keeps parameters where torch does not see them, in the {kept} {attribute!r}, so that they would "
            "never learn: make it an nn.ModuleList, nn.ModuleDict or nn.ParameterList"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{name} has no parameters that require gradients, so there is nothing to learn")
    if weights is not None:
        fit_weights(model, Path(weights).expanduser(), name)
    return model


def check_seeded(own: Own, model: nn.Module, again: nn.Module) -> None:
    """Raise `InputError` where two builds with one seed are not equal, or are one: a run could not be repeated."""
    mine, others = model.state_dict(keep_vars=True), again.state_dict(keep_vars=True)
    if model is again or {id(each) for each in mine.values()} & {id(each) for each in others.values()}:
        raise InputError(f"{own.name} gives the same weights each time it is called: make new ones in it")
    for name, tensor in mine.items():
        other = others.get(name)
        if isinstance(tensor, Tensor) and not (isinstance(other, Tensor) and _equal(tensor, other)):
            raise InputError(
                f"{own.name} draws {name!r} anew each time, whatever the seed, so that no run could be repeated: draw "
                "from the global random numbers of torch, numpy or Python, which --seed sets"
            )


def check_forward(name: str, path: Path | None, model: nn.Module, examples: Examples, steps: int = 4) -> None:
    """Raise `InputError` where the model fails on inputs of the data's shape. The model is run, so give a spare one.

    examples: of one task. steps: how many of them are tried.
    """
    inputs = mapped(lambda tensor: tensor[:steps], examples.inputs)
    told_of = ", ".join(f"{tuple(each.shape)} {name}".rstrip() for name, each in leaves_by_name(inputs))
    try:
        with seeded(0), torch.no_grad():
            outputs = call(model, inputs)
    except Exception as error:
        text = f"{in_one_line(error)}{where(error, path)}"
        raise InputError(f"{name} fails on inputs of the data's shape, {told_of}: {text}") from None
    if isinstance(outputs, Tensor) and isinstance(inputs, Tensor) and outputs.shape[:1] != inputs.shape[:1]:
        raise InputError(
            f"{name} gives outputs {tuple(outputs.shape)} of inputs {told_of}: the first axis must be the examples"
        )


def _arguments(own: Own, options: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(own.value).parameters.values()
    except (TypeError, ValueError):  # of a class or function written in C
        return options
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = [name for name in options if name not in named]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        near = difflib.get_close_matches(unknown[0], named, len(named), 0) if named else ["no options"]
        raise InputError(f"{own.name} takes no {unknown[0]!r}; it takes {', '.join(near)}")
    arguments = {name: value for name, value in facts.items() if name in named} | options
    plain = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    missing = [
        p.name for p in parameters if p.kind in plain and p.default is p.empty and p.name not in arguments
    ]
    if missing:
        values = " ".join(f"{name}=VALUE" for name in missing)
        raise InputError(
            f"{own.name} needs {', '.join(missing)}: give --model-options {values}; by itself it is told {OFFERED}, "
            "where it names them"
        )
    return arguments


def _modules(namespace: ModuleType) -> list[str]:
    """The names of what gives a module without arguments."""
    classes, others = [], []
    for name, value in vars(namespace).items():
        if isinstance(value, nn.Module):
            others.append(name)
        elif getattr(value, "__module__", None) == namespace.__name__ and not name.startswith("_"):
            if inspect.isclass(value) and issubclass(value, nn.Module) and _needs_nothing(value):
                classes.append(name)
            elif inspect.isfunction(value) and name != "main" and _needs_nothing(value):
                others.append(name)
    return classes if len(classes) == 1 else classes + others


def _needs_nothing(function) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _unregistered(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names and types of plain lists and dicts that hold modules or parameters which the model lacks."""
    known = {id(each) for each in (*model.modules(), *model.parameters())}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and name in ("_modules", "_parameters", "_buffers"):
                continue
            held = value.values() if isinstance(value, dict) else value
            if not isinstance(value, (list, tuple, dict, set)):
                continue
            for each in held:
                learns = isinstance(each, nn.Parameter) or (
                    isinstance(each, nn.Module) and any(p.requires_grad for p in each.parameters())
                )
                if learns and id(each) not in known:
                    yield f"{prefix}.{name}".lstrip("."), type(value).__name__
                    break


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _article(value: Any) -> str:
    return f"{shown(value)}, of type {type(value).__name__}"
