"""What is refused, and what is warned of: one row for each situation, of which docs/refusals.md is written.

`python tests/refusals.py` writes the page anew.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fomaml import FOMAML, ClassSource, FastModel, evaluate, meta_gradient
from fomaml.baselines import nearest_centroid
from fomaml.errors import InputError
from fomaml.metrics import Metric
from fomaml.train import linear
from situations import (
    Carried,
    Delegating,
    Detached,
    Elsewhere,
    Few,
    Given,
    Late,
    PerTensor,
    Reentrant,
    Tuple,
    astray,
    batches_of_numbers,
    beyond,
    classifier,
    cosine_of_torch,
    dataset,
    emptied,
    evaluated,
    frozen_later,
    fused_over_gaps,
    gradient,
    halved,
    hooked,
    labelled,
    lbfgs,
    loader,
    not_iterated,
    numbers,
    one_task,
    others,
    partly,
    relabelled,
    replaced,
    spoiled,
    spoiled_model,
    sums,
    tasks,
    thawed,
    to_a_folder,
    trained,
    unlike,
    unmoved,
)

KINDS = {
    1: "Modules whose tensors cannot be replaced",
    2: "Results that would depend on the grouping of the work",
    3: "Scores",
    4: "What looks learned or evaluated, and is not",
    5: "Tasks, data and arguments",
}


class Row(NamedTuple):
    """kind: of `KINDS`. what: the situation, in words. run: brings it about. level: "error" or "warning"."""

    kind: int
    what: str
    run: Callable[[], object]
    level: str = "error"


ROWS = [
    Row(1, "an `nn.DataParallel` or `DistributedDataParallel`", lambda: gradient(nn.DataParallel(classifier()))),
    Row(1, "a `torch.compile`d module", lambda: gradient(torch.compile(classifier()))),
    Row(1, "a traced or scripted module", lambda: gradient(torch.jit.trace(classifier(), torch.ones(1, 6)))),
    Row(1, "a lazy module that was never run", lambda: gradient(nn.Sequential(nn.LazyLinear(4)))),
    Row(1, "a hook on the gradient of a parameter", lambda: gradient(hooked())),
    Row(1, "a layer that is called by an object of one's own", lambda: gradient(Elsewhere(), engine="loop")),
    Row(1, "a parameter that is read from an object of one's own", lambda: gradient(Elsewhere(True), engine="loop")),
    Row(1, "a hook of the backward pass, under vmap", lambda: gradient(hooked("layer"), engine="batched")),
    Row(1, "a layer that forward makes", lambda: gradient(Late())),
    Row(1, "parameters that are named, and in no submodule", lambda: gradient(Delegating())),
    Row(1, "`torch.utils.checkpoint` that is reentrant", lambda: gradient(Reentrant(), engine="loop")),
    Row(1, "the same with `FastModel`", lambda: FastModel(Elsewhere())(torch.ones(1, 6))),
    Row(2, "an inner optimiser that does not say whether it is elementwise", lambda: gradient(optimizer=PerTensor())),
    Row(2, "one whose state outlives a task, and that is not elementwise", lambda: gradient(optimizer=Carried())),
    Row(2, "a first layer that writes into its inputs", lambda: gradient(
        nn.Sequential(nn.Dropout(0.2, inplace=True), classifier())
    )),
    Row(3, "fewer outputs than classes", lambda: gradient(classifier(3))),
    Row(3, "labels below 0 that are not ignored", lambda: gradient(given=relabelled(-1))),
    Row(3, "outputs without an axis of classes", lambda: gradient(nn.Sequential(classifier(1), nn.Flatten(0)))),
    Row(3, "labels with an axis too many", lambda: gradient(given=labelled(lambda t: t[..., None]))),
    Row(3, "labels that are floating", lambda: gradient(given=labelled(torch.Tensor.float))),
    Row(3, "one-hot labels that are whole numbers", lambda: gradient(given=labelled(F.one_hot))),
    Row(3, "a task all of whose labels are ignored", lambda: evaluated(given=relabelled(-100, everywhere=True))),
    Row(3, "regression by cross-entropy: several outputs", lambda: gradient(given=numbers((8, 4)))),
    Row(3, "targets of a dtype that the criterion does not take", lambda: gradient(
        engine="loop", given=tasks().map(lambda t: t if t.is_floating_point() else t.bool())
    )),
    Row(3, "a metric of an unknown name", lambda: evaluated(metric="acc")),
    Row(3, "a metric that gives a number for each example", lambda: evaluated(metric=lambda o, t: o.argmax(1) == t)),
    Row(3, "a `Metric` of a function of one task", lambda: evaluated(metric=Metric("mae", F.l1_loss, -1, ""))),
    Row(3, "the accuracy of numbers", lambda: evaluated(
        classifier(1), numbers((8, 1)), criterion=F.mse_loss, metric="accuracy"
    )),
    Row(3, "`balanced`, and the query sets are not", lambda: evaluated(given=relabelled(0), balanced=True)),
    Row(3, "`balanced` with the loss", lambda: evaluated(balanced=True, metric="loss")),
    Row(3, "centroids of numbers", lambda: nearest_centroid(Given(numbers((8, 1))), tasks=2)),
    Row(4, "a parameter that was unfrozen after the learner was made", thawed),
    Row(4, "a parameter that was frozen after the learner was made", frozen_later),
    Row(4, "a layer that was replaced after the learner was made", replaced),
    Row(4, "an optimiser of another module's parameters", others),
    Row(4, "an optimiser of tensors that are none of the learner's", beyond, "warning"),
    Row(4, "outputs that depend on no parameter", lambda: gradient(Detached(), engine="loop")),
    Row(4, "a step of `FastModel` on a loss of the model itself", astray),
    Row(4, "an adaptation that diverges", lambda: FOMAML(classifier(), 1e39, 3).adapt(one_task().support)),
    Row(4, "outputs that are no numbers, in `evaluate`", lambda: evaluated(spoiled_model()), "warning"),
    Row(4, "the same, of data that are not finite", lambda: evaluate(FOMAML(classifier(), 0.1, 1), spoiled(), tasks=4)),
    Row(4, "an optimiser that does not hold all meta-parameters", partly, "warning"),
    Row(4, "in training, native batch norm in evaluation mode as it was made", lambda: trained(unmoved()), "warning"),
    Row(4, "the same in `evaluate`", lambda: evaluate(unmoved(), Given(), tasks=2, at_steps=[0]), "warning"),
    Row(4, "the same in `adapt`", lambda: unmoved().adapt(one_task().support), "warning"),
    Row(4, "meta-parameters that are not finite", lambda: trained(FOMAML(spoiled_model(), 0.1, 1))),
    Row(4, "`train` that is never iterated", not_iterated, "warning"),
    Row(4, "a criterion without a mean", lambda: gradient(criterion=nn.CrossEntropyLoss(reduction="none"))),
    Row(4, "a criterion that returns a number and no tensor", lambda: gradient(criterion=lambda o, t: 1.0)),
    Row(4, "regression by cross-entropy: one output", lambda: gradient(classifier(1), numbers((8, 1)))),
    Row(4, "targets (n,) against outputs (n, 1)", lambda: gradient(classifier(1), numbers((8,)), criterion=F.mse_loss)),
    Row(5, "a model that returns a tuple or a dict", lambda: gradient(Tuple())),
    Row(5, "a model that is no module", lambda: gradient(torch.tanh)),
    Row(5, "a criterion that is a class", lambda: gradient(criterion=nn.CrossEntropyLoss)),
    Row(5, "inputs of another dtype than the model's parameters", lambda: gradient(given=tasks(dtype=torch.float64))),
    Row(5, "parameters in float16", lambda: gradient(classifier().half(), tasks(dtype=torch.float16))),
    Row(5, "autocast to float16", lambda: meta_gradient(
        FOMAML(classifier(), 0.1, 1), tasks(), autocast=torch.float16
    )),
    Row(5, "images of bytes", lambda: gradient(given=tasks(dtype=torch.uint8))),
    Row(5, "a single task in place of a batch", lambda: gradient(given=one_task())),
    Row(5, "no tasks", lambda: gradient(given=tasks(0))),
    Row(5, "an empty support set", lambda: gradient(given=emptied("support"))),
    Row(5, "an empty query set", lambda: gradient(given=emptied("query"))),
    Row(5, "inputs and targets of unequal numbers", lambda: gradient(given=unlike())),
    Row(5, "inputs that are neither tensors nor arrays", lambda: gradient(given=(("a", "b"), ("c", "d")))),
    Row(5, "something that is no task", lambda: gradient(given=torch.ones(3))),
    Row(5, "a `DataLoader` in `evaluate`", lambda: evaluate(FOMAML(classifier(), 0.1, 1), loader(), tasks=2)),
    Row(5, "an iterable that training goes on with", lambda: trained(episodes=loader(), start=1)),
    Row(5, "an iterable of what may be batches", lambda: trained(sums(), [batches_of_numbers()] * 4), "warning"),
    Row(5, "an iterator that ends", lambda: trained(episodes=iter([one_task()]))),
    Row(5, "an iterable without tasks", lambda: trained(episodes=[])),
    Row(5, "no tasks at all", lambda: trained(episodes=3)),
    Row(5, "a `DataLoader` of examples", lambda: trained(episodes=DataLoader(TensorDataset(*one_task().query)))),
    Row(5, "episodes that give another number of tasks", lambda: trained(episodes=Few())),
    Row(5, "numbers in the data that are not finite", lambda: trained(episodes=spoiled())),
    Row(5, "the same in a data set, when it is read", lambda: dataset((torch.full((6,), float("nan")), 0))),
    Row(5, "a data set of unequal shapes", lambda: dataset((torch.zeros(5), 0))),
    Row(5, "a data set without labels", lambda: dataset(torch.zeros(6))),
    Row(5, "an empty data set", lambda: ClassSource.from_dataset([])),
    Row(5, "weights that are to be written to a folder", to_a_folder),
    Row(5, "an `augment` of episodes that gives fewer examples", halved),
    Row(5, "an optimiser by name", lambda: trained(optimizer="adam")),
    Row(5, "an optimiser that asks for a closure", lbfgs),
    Row(5, "a fused optimiser of a parameter with gaps", fused_over_gaps),
    Row(5, "a scheduler of torch", lambda: trained(schedule=cosine_of_torch())),
    Row(5, "`clip=0`", lambda: trained(clip=0)),
    Row(5, "a negative `clip`", lambda: trained(clip=-1.0)),
    Row(5, "`inner_lr=0`", lambda: FOMAML(classifier(), 0.0, 1)),
    Row(5, "a `start` below 0", lambda: trained(start=-1)),
    Row(5, "a `start` beyond the iterations", lambda: trained(start=3)),
    Row(5, "a schedule that falls below 0", lambda: trained(schedule=linear(1), iterations=4)),
    Row(5, "a negative number of steps", lambda: FOMAML(classifier(), 0.1, 1).adapt(one_task().support, steps=-1)),
]  # fmt: skip


def told(row: Row) -> str:
    """What the row's situation says; raises where it says nothing, or something else than its level."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".*torch.jit", FutureWarning)
        try:
            row.run()
            error = None
        except InputError as found:
            error = found
    if row.level == "error":
        if error is None:
            raise AssertionError(f"{row.what}: nothing was raised")
        return str(error)
    texts = [str(each.message) for each in heard if each.category is RuntimeWarning]
    if error is not None or len(texts) != 1:
        raise AssertionError(f"{row.what}: {error or texts}")
    return texts[0]


PAGE = Path(__file__).parent.parent / "docs" / "refusals.md"
HEADER = """# What it refuses, what it warns of

A wrong result without a word is the one thing that this library promises not to give. Where something cannot work, one
line says so, with the cure: an `InputError`, or a `RuntimeWarning` where the result may still be what you want. The
command line prints the same and ends with status 2. This page is written from the tests, which bring about each of
these situations.
"""


def page() -> str:
    lines = [HEADER]
    for kind, title in KINDS.items():
        rows = [row for row in ROWS if row.kind == kind]
        if rows:
            lines += [f"## {title}", "", "| | situation | what it says |", "|---|---|---|"]
            lines += [f"| {row.level} | {row.what} | {_cell(told(row))} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x…", text).replace("|", "\\|")


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page(), encoding="utf-8")
    sys.exit()
