"""The check itself: tries a module on every engine in both orders, against the slow twin."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.check.findings import (
    DOUBLE,
    FIRST,
    INPLACE,
    LOOP,
    READ,
    REASONS,
    Finding,
    Report,
    listed,
    of_kinds,
    plural,
)
from fomaml.check.slow import reference, relative_error, second_order
from fomaml.check.structure import (
    kinds_of_layers,
    randomness_of_forward,
    state_of_forward,
    unreached,
    unread,
    width_for_ways,
)
from fomaml.check.trial import (
    Trial,
    check_learns,
    computed_before,
    draw_inputs,
    draw_tasks,
    drops,
    first_outputs,
    widened,
    without_dropout,
)
from fomaml.devices import forked_random
from fomaml.engines import ENGINES
from fomaml.engines.plan import choose
from fomaml.errors import InputError, in_one_line, positive
from fomaml.learning.admission import check_module
from fomaml.learning.contracts import Criterion, Loss, Output
from fomaml.tasks import (
    Batch,
    Task,
    are_labels,
    as_batch,
    chunks,
    count,
    first,
    one,
    shape_of,
    stack,
    ways_each,
)
from fomaml.trees import Tree, leaves

TASKS = 2
# The largest relative error of a gradient that counts as rounding; a float64 module may compute parts in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}


def check(
    model: nn.Module,
    shape: int | Sequence[int] | None = None,
    *,
    tasks: Batch | None = None,
    criterion: Criterion | None = None,
    loss: Loss | None = None,
    output: Output = None,
    vocabulary: int | None = None,
    ways: int = 5,
    shots: int = 2,
    query_shots: int = 3,
    inner_steps: int = 3,
    inner_lr: float = 0.01,
    seed: int = 0,
    name: str | None = None,
) -> Report:
    """Try a module, in the mode it is in, on two tasks, random or yours. It is copied, never changed.

    FOMAML's gradient is compared with a plain loop in float64, dropout off; second order with central
    differences of that loop's query loss in random directions, by their median, as a direction may cross
    a kink of a ReLU or of a max-pool.

    shape: of one input. Inputs are normal random numbers (examples, *shape) of the module's dtype or,
        with a vocabulary, int64 below it. Outputs that are not (examples, at least 2) make it a regression.
    tasks: in place of a shape, your own, of nested inputs too: a stacked batch or a list; the first two of one shape
        are taken.
    criterion, loss, output: as of a learner; by default a cross-entropy, or the squared error of a regression.
    name: of the module, for the heading.

    Raises:
        InputError: numbers that are not positive, or a module that does not run on this shape.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model is an nn.Module, got {'the class ' if isinstance(model, type) else 'a '}"
            f"{getattr(model, '__name__', type(model).__name__)}"
        )
    if (shape is None) == (tasks is None):
        raise InputError("give the shape of one input, or tasks=, and not both")
    counts = {"ways": ways, "shots": shots, "query_shots": query_shots, "inner_steps": inner_steps}
    sizes = [] if shape is None else [shape] if isinstance(shape, int) else list(shape)
    for what, number in [*counts.items(), *(("a size of the input", size) for size in sizes)]:
        positive(what, number, integer=True)
    mode = "train" if model.training else "eval"
    own = None if tasks is None else _two(tasks, model)
    if own is None:
        facts = f"inputs {tuple(sizes)}, {ways}-way {shots}-shot"
    else:
        ways = max(ways_each(own.support.targets)) if are_labels(own.support.targets) else ways
        facts = f"{plural(count(own), 'task')} of yours, {plural(len(first(one(own, 0).support.inputs)), 'example')}"
    heading = f"{name or type(model).__name__} in {mode} mode, {facts}"
    heading += f", {plural(inner_steps, 'inner step')} of {positive('inner_lr', inner_lr):g}"
    with forked_random(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        like = check_learns(model)
        inputs = [draw_inputs(like, (TASKS, ways * n, *sizes), vocabulary) for n in (shots, query_shots)]
        try:
            check_module(model)
        except InputError as error:
            return Report(heading, [Finding("refused", str(error))])
        first_inputs = inputs[0][0] if own is None else one(own, 0).support.inputs
        outputs = first_outputs(model, first_inputs, output, loss is not None)
        stale = computed_before(model, first_inputs)
        if stale:
            return Report(heading, list(of_kinds({"stale": stale})))
        if own is None:
            judged_part = outputs if loss is None else leaves(outputs)[0]
            if not isinstance(judged_part, Tensor):
                what = type(outputs).__name__
                raise InputError(
                    f"the module must return one floating tensor, not a {what}: give output=, the part that is judged"
                )
            own, suited = draw_tasks(inputs, judged_part, ways)
        else:
            suited = F.cross_entropy if are_labels(own.support.targets) else F.mse_loss
        judge = None if loss is not None else suited if criterion is None else criterion
        judged = {"criterion": judge, "loss": loss, "output": output}
        if loss is not None and criterion is not None:
            raise InputError("loss= takes the place of the criterion: give one of the two")
        learning = own, judged, inner_lr, inner_steps, seed
        trial = Trial(without_dropout(model), *learning)
        trial = trial._replace(random=trial.is_random())
        found: list[Finding] = []
        try:
            found.extend(_findings(Trial(model, *learning), trial, outputs, ways))
        except Exception as error:  # whatever a module raises; what was found before it stays
            found.append(Finding("refused", f"not tried any further: {in_one_line(error)}"))
        return Report(heading, found)


def _two(tasks: Batch, model: nn.Module) -> Task:
    """Two tasks of one shape, or the first alone where there are none."""
    batch = as_batch(tasks, model)
    if not isinstance(batch, Task):
        batch = stack([task for task in batch if shape_of(task) == shape_of(batch[0])])
    return next(chunks(batch, TASKS))


def _findings(own: Trial, trial: Trial, outputs: Tree, ways: int) -> Iterator[Finding]:
    """own: the module as it is. trial: with dropout off."""
    parameters = list(own.model.parameters())
    count = f"{sum(p.numel() for p in parameters):,} parameters"
    yield Finding("ok", f"{count} in {plural(len(parameters), 'tensor')}")
    yield width_for_ways(own, outputs, ways)
    yield from of_kinds(kinds_of_layers(own))
    if not all(leaf.isfinite().all() for leaf in leaves(outputs)):
        yield Finding("wrong", "the outputs are not finite; nothing else was tried", "look at the forward")
    elif not any(leaf.requires_grad for leaf in leaves(outputs)):
        yield Finding(
            "wrong", "no gradient reaches any parameter", "no torch.no_grad or .detach() in forward"
        )
    else:
        yield from state_of_forward(trial)
        yield from randomness_of_forward(trial)
        exact, note = widened(trial)
        yield from note
        expected, reached = reference(exact)
        yield from of_kinds(unreached(exact, reached))
        yield from _engines(own, trial, exact, expected)


def _engines(own: Trial, trial: Trial, exact: Trial, expected: dict[str, Tensor]) -> Iterator[Finding]:
    """Each engine in both orders, and which of them `engine="auto"` takes."""

    def first(gradients: dict[str, Tensor]) -> tuple[str, str]:
        error = relative_error(gradients, expected)
        if error <= TOLERANCE.get(exact.dtype, 0.1):
            size = f"to {error:.0e}" if error else "bit for bit"
            return "ok", f"equals the plain reference {size} in {str(exact.dtype)[6:]}"
        return "wrong", f"differs from the plain reference by {error:.1g}{unread(exact)}"

    # finite differences are slow, and two steps of one task hold all there is to get wrong
    brief = exact._replace(tasks=next(chunks(exact.tasks, 1)), inner_steps=min(2, exact.inner_steps))
    levels: dict[tuple[str, bool], str] = {}
    for first_order, wide, judge in ((True, exact, first), (False, brief, second_order(brief))):
        cure = READ if first_order or levels["loop", True] == "wrong" else DOUBLE
        for engine in ENGINES if first_order else ("loop", "batched"):
            finding = _engine(own, trial, wide, engine, first_order, judge)
            levels[engine, first_order] = finding.level
            if finding.cure == LOOP and levels["loop", first_order] == "refused":
                finding = finding._replace(cure="" if first_order else FIRST)
            wrong = finding.level == "wrong"
            yield finding._replace(cure=finding.cure or cure) if wrong else finding
            cure = cure if wrong or engine != "loop" else LOOP
    name, why = choose(trial.learner(), trial.tasks)
    level = levels[name, True]
    if level in ("ok", "note"):
        yield Finding("ok", f"engine='auto' takes {name!r}: {why}")
    elif levels["loop", True] in ("ok", "note"):
        yield Finding(level, f"engine='auto' takes {name!r}, see above", LOOP)


def _engine(own: Trial, trial: Trial, exact: Trial, engine: str, first_order: bool, judge) -> Finding:
    """Run it in the module's own dtype, with dropout and without; judge the gradient in the wider one."""
    what, when = f"{'first' if first_order else 'second'} order, {engine}", ""
    try:
        own._replace(inner_steps=1).gradient(engine, first_order)
        if any(map(drops, own.model.modules())):
            when = " with dropout off"
            trial._replace(inner_steps=1).gradient(engine, first_order)
        gradients, moved = exact.gradient(engine, first_order)
    except Exception as found:
        error = found.__cause__ or found  # what an engine explains, here has cures by its own words
        cure = LOOP if engine != "loop" else "" if first_order else FIRST
        plain = in_one_line(error), "" if isinstance(error, InputError) else cure
        text, cure = next((known for part, known in REASONS.items() if part in str(error)), plain)
        return Finding("refused", f"{what}{when}: {text}", cure)
    if moved:
        return Finding("wrong", f"{what}: a task's steps change the meta-model's {listed(moved)}", INPLACE)
    if exact.random and engine != "loop":
        return Finding("note", f"{what}: runs, not compared (random)")
    level, text = judge(gradients)
    return Finding(level, f"{what}: {text}")
