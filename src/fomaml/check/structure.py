"""What can be said of a module without a meta-gradient: its parameters, its layers, what forward does with them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn

from fomaml.check.findings import Finding, listed, of_kinds
from fomaml.check.trial import (
    Trial,
    changed_buffers,
    differ,
    drops,
    is_regression,
    learned,
    plain_tensors,
    put,
    snapshot,
)
from fomaml.engines import _torch
from fomaml.metrics import ignored_label
from fomaml.models import NATIVE_BATCH_NORMS, NATIVE_NORMS, BatchNorm, unmoved_norms
from fomaml.tasks import first
from fomaml.trees import Tree, leaves, mapped


def width_for_ways(trial: Trial, outputs: Tree, ways: int) -> Finding:
    if trial.judged["loss"] is not None:
        return Finding("note", "judged by a loss of its own")
    if not isinstance(outputs, Tensor) or ignored_label(trial.judged["criterion"]) is None:
        parts = leaves(outputs)
        shapes = ", ".join(str(tuple(leaf.shape[1:])) for leaf in parts)
        return Finding("note", f"outputs {shapes} per example: tried as a regression")
    if is_regression(outputs):
        return Finding("note", f"outputs {tuple(outputs.shape[1:])} per example: tried as a regression")
    width = outputs.shape[1]
    if width < ways:
        cure = f"a last layer of at least {ways} outputs, or {width} ways, as tried here"
        return Finding("refused", f"{width} outputs are too few for {ways} ways", cure)
    return Finding("ok", f"{width} outputs for {ways} ways")


def kinds_of_layers(own: Trial) -> dict[str, list[str]]:
    """The names of parameters and layers by kind of finding."""
    model = own.model
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    layers = [(f"{type(m).__name__} {n}".strip(), m) for n, m in model.named_modules()]
    running = [(n, m) for n, m in layers if isinstance(m, NATIVE_NORMS) and m.running_mean is not None]
    batch = [n for n, m in layers if isinstance(m, NATIVE_BATCH_NORMS) and m.running_mean is None]
    unmoved = set(unmoved_norms(model).values())
    return {
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "tied": [" = ".join(names) for names in groups.values() if len(names) > 1],
        "leaking": [n for n, m in running if m.training],
        "eval": [n for n, m in running if not m.training and m not in unmoved],
        "unmoved": [n for n, m in running if m in unmoved],
        "batch": batch + [n for n, m in layers if isinstance(m, BatchNorm) and m.policy == "batch"],
        "recurrent": [n for n, m in layers if isinstance(m, nn.RNNBase)],
        "dropout": [n for n, m in layers if drops(m)] if own.is_random() else [],
    }


def state_of_forward(trial: Trial) -> Iterator[Finding]:
    """What one forward pass leaves behind."""
    model = trial.copy()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    before, versions = snapshot(parameters | buffers), {n: _torch.version(p) for n, p in parameters.items()}
    found = trial.outputs(model)
    moved = [n for n, p in parameters.items() if _torch.version(p) != versions[n] or differ(p, before[n])]
    yield from of_kinds({"moved": moved, "buffers": changed_buffers(trial)})
    if differ(found, trial.outputs(partial(put, model, before))):
        what = "forward keeps state on self that is no buffer: each step finds it as the meta-model's"
        yield Finding("wrong", what, "register_buffer for what changes; no counters or caches on self")


def randomness_of_forward(trial: Trial) -> Iterator[Finding]:
    if trial.random:
        yield Finding("note", "forward draws random numbers of its own: only the loop can be compared")
    elif not any(isinstance(m, (BatchNorm, *NATIVE_BATCH_NORMS)) for m in trial.model.modules()):
        number = len(first(trial.inputs))
        half = number // 2  # the last half: what a recurrent layer gives depends on what came before
        last = mapped(itemgetter(slice(half, None)), trial.inputs)
        whole = trial.outputs(trial.copy())
        if len(whole) == number and differ(whole[half:], trial.outputs(trial.copy(), last), 1e-3):
            what = "an example's outputs depend on the other examples, and there is no batch norm"
            yield Finding("note", what, "batch_first=True, if a layer takes the examples for time steps")


def unreached(trial: Trial, reached: set[str]) -> dict[str, list[str]]:
    """The names of parameters that do not learn, and the shapes of tensors that should be parameters."""
    model = trial.copy()
    outputs = trial.outputs(model)
    found: dict[str, list[str]] = {"bypassed": [], "cached": [], "unused": []}
    for name, own in learned(trial.model).items():
        if name not in reached:
            moved = differ(trial.outputs(trial.copy(name, own + torch.randn_like(own))), outputs)
            same = any(t.shape == own.shape and not differ(t, own) for _, t in plain_tensors(model))
            found["bypassed" if moved else "cached" if same else "unused"].append(name)
    own = {id(parameter) for parameter in model.parameters()}
    return found | {"strange": [f"{tuple(leaf.shape)}" for leaf in _leaves(outputs) if id(leaf) not in own]}


def unread(trial: Trial) -> str:
    """The parameters that forward reads elsewhere than from its modules, where adapted ones cannot be put."""
    names = []
    for name, own in learned(trial.model).items():
        value = own.detach() + torch.randn_like(own)
        given = trial.outputs(partial(put, trial.copy(), {name: value}))
        names += [name] if differ(trial.outputs(trial.copy(name, value)), given) else []
    return f"; forward does not read its current {listed(names)}" if names else ""


def _leaves(outputs: Tensor) -> list[Tensor]:
    """The tensors that a backward pass would give a gradient to."""
    todo, seen, leaves = [outputs.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [following for following, _ in node.next_functions]
    return leaves
