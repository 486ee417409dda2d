"""Nestings of tensors, dicts and tuples of any depth: what inputs, targets and outputs may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Tree = Any  # a tensor, or a dict or tuple of trees


def as_tree(given: Any, leaf: Callable[[Any, str], Tensor], name: str = "") -> Tree:
    """The nesting with `leaf` of each value that is no mapping, list or tuple; lists become tuples.

    leaf: (value, name) → tensor. name: of the whole; parts of it are named after it, as "inputs['mask'][0]".
    """
    if isinstance(given, Mapping):
        return {key: as_tree(value, leaf, f"{name}[{key!r}]") for key, value in given.items()}
    if isinstance(given, list | tuple):
        parts = [as_tree(value, leaf, f"{name}[{number}]") for number, value in enumerate(given)]
        return _like(given, parts)
    return leaf(given, name)


def named(tree: Tree, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Its tensors, each with its name, as in `as_tree`."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from named(value, f"{name}[{key!r}]")
    else:
        for number, value in enumerate(tree):
            yield from named(value, f"{name}[{number}]")


def leaves(tree: Tree) -> list[Tensor]:
    """Its tensors, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [leaf for part in parts for leaf in leaves(part)]


def mapped(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """A nesting of what `function` gives of its tensors, each with those of the others in the same place."""
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, dict):
        return {
            key: mapped(function, value, *(other[key] for other in others)) for key, value in tree.items()
        }
    return _like(tree, [mapped(function, *parts) for parts in zip(tree, *others, strict=True)])


def rebuilt(tree: Tree, tensors: Iterator[Tensor]) -> Tree:
    """The nesting with these in the places of its tensors, in order."""
    return mapped(lambda _: next(tensors), tree)


def joined(trees: list[Tree], join: Callable[[list[Tensor]], Tensor] = torch.cat) -> Tree:
    """One nesting out of several of the same structure, by default their tensors one after the other."""
    if len(trees) == 1 and join is torch.cat:
        return trees[0]
    return mapped(lambda *tensors: join(list(tensors)), *trees)


def structure(tree: Tree) -> Any:
    """What it is without its tensors, hashable: equal for nestings whose tensors have the same places."""
    if isinstance(tree, Tensor):
        return None
    if isinstance(tree, dict):
        return tuple((key, structure(value)) for key, value in tree.items())
    return type(tree), *map(structure, tree)


def call(function: Callable, inputs: Tree) -> Any:
    """Call with the inputs of a task: a dict as keywords, a tuple as positional arguments."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return function(**inputs)
    return function(*inputs)


def _like(given: Any, parts: list) -> tuple:
    return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
