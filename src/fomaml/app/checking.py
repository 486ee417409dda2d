"""`fomaml check`: a module, with a loss and metrics of the user's own, tried on random tasks."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch

from fomaml.app.checks import check_seed
from fomaml.app.commands import CheckOptions
from fomaml.app.modules import load_module, offered
from fomaml.app.named import LIBRARIES, is_own_metric, parsed, read_loss, read_metric
from fomaml.app.networks import of_library
from fomaml.app.own import told
from fomaml.app.scores import as_metric
from fomaml.app.settle import judged_output
from fomaml.app.wording import option as typed
from fomaml.check import Finding, Report, check
from fomaml.check.trial import draw_inputs, draw_tasks, first_outputs
from fomaml.choices import check_choice
from fomaml.devices import forked_random
from fomaml.episodes import TaskSequence
from fomaml.errors import InputError, positive
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML
from fomaml.metrics import metric_for
from fomaml.tasks import Task
from fomaml.trees import leaves


def check_module(options: CheckOptions) -> Report:
    """What `check` finds about the module that was named.

    Raises:
        InputError: no such module, loss or metric; options that do not go together.
    """
    check_choice("input dtype", options.input_dtype, ("float32", "int64"))
    if (options.input_dtype == "int64") != (options.vocabulary is not None):
        raise InputError("--input-dtype int64 and --vocabulary N go together: the numbers are drawn below N")
    for name in ("ways", "shots", "query_shots", "inner_steps", "vocabulary"):
        if getattr(options, name) is not None:
            positive(typed(name), getattr(options, name), integer=True)
    positive("--inner-lr", options.inner_lr)
    for size in options.input:
        positive("each number of --input", size, integer=True)
    check_seed(options.seed)
    arguments, shape = parsed(options.model_options or ()), tuple(options.input)
    facts = offered(options.ways, options.ways, shape)
    judged: dict[str, Any] = {"output": judged_output(options.output)}
    own_loss = None if options.loss is None else read_loss(options.loss)
    if own_loss is not None:
        judged["loss"] = own_loss.value
    with contextlib.redirect_stdout(sys.stderr):  # what the module itself prints
        if options.module.partition(":")[0] in LIBRARIES:
            weights = options.model_weights or "random"
            model = of_library(options.module, weights, arguments, options.ways, shape, options.seed)
        else:
            model = load_module(options.module, options.seed, arguments, facts, options.model_weights)
        report = check(
            model,
            shape,
            **judged,
            vocabulary=options.vocabulary,
            ways=options.ways,
            shots=options.shots,
            query_shots=options.query_shots,
            inner_steps=options.inner_steps,
            inner_lr=options.inner_lr,
            seed=options.seed,
            name=options.module,
        )
        metrics = [_metric(model, options, name, judged) for name in options.metric or ()]
    return Report(report.subject, [*report.findings, *metrics])


class _Same(TaskSequence):
    """Episodes that are always these tasks."""

    def __init__(self, tasks: Task):
        self.tasks = tasks

    def batch(self, start: int, tasks: int) -> Task:
        return self.tasks


def _metric(model: torch.nn.Module, options: CheckOptions, name: str, judged: dict[str, Any]) -> Finding:
    """What a metric gives of one random task, before any adaptation."""
    own = read_metric(name, options.metric_direction) if is_own_metric(name) else None
    found = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    with forked_random():
        torch.manual_seed(options.seed)
        sizes = (1, options.ways * options.query_shots, *options.input)
        inputs = draw_inputs(found, sizes, options.vocabulary)
        outputs = first_outputs(model, inputs[0], judged["output"], "loss" in judged)
        if "loss" in judged:
            outputs = leaves(outputs)[0]
        if not isinstance(outputs, torch.Tensor):
            return Finding("note", f"the metric {name} was not tried: the outputs are several, see --output")
        tasks, criterion = draw_tasks([inputs, inputs], outputs, options.ways)
    if own is not None:
        metric: Any = as_metric(own, options.metric_direction, "loss" in judged)
    else:
        metric = metric_for(criterion, name)
    learner = FOMAML(model, options.inner_lr, 1, None if "loss" in judged else criterion, **judged)
    try:
        with told(f"the metric {name} fails", None if own is None else own.path):
            scores = evaluate(learner, _Same(tasks), tasks=1, at_steps=0, metric=metric, engine="loop")
    except InputError as error:
        return Finding("refused", str(error))
    return Finding("ok", f"the metric {name} gives {scores[0].item():.4g} on a random task")
