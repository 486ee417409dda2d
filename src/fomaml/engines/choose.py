"""The door to the engines: by name, or the one that suits the module, the sizes and the device."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fomaml.engines import batched, factored, loop
from fomaml.engines.common import MetaGradient, accumulate, curves
from fomaml.errors import InputError, positive
from fomaml.learner import MetaLearner
from fomaml.tasks import Task, count, one

ENGINES = {"loop": loop.problems, "batched": batched.problems, "factored": factored.problems}


def meta_gradient(
    learner: MetaLearner, tasks: Task, *, engine: str = "auto", tasks_at_once: int | None = None
) -> MetaGradient:
    """The gradient of the meta-loss by meta-parameter name, averaged over a batch of tasks.

    tasks: tensors (tasks, examples, ...). engine: "loop", "batched", "factored" or "auto".
    tasks_at_once: at most so many tasks in memory at a time ("loop" takes one in any case).

    Raises:
        InputError: an unknown engine, one that does not take this learner, or outputs narrower than
            the number of classes.
    """
    name, problems = _engine(learner, tasks, engine, tasks_at_once)
    try:
        return accumulate(learner, problems, count(tasks), name)
    except (IndexError, RuntimeError):
        check_outputs(learner, tasks)  # the likeliest reason, told in words
        raise


def curve(
    learner: MetaLearner,
    tasks: Task,
    at_steps: Sequence[int],
    *,
    inductive: bool = False,
    engine: str = "auto",
    tasks_at_once: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Query losses (tasks,) and outputs (tasks, examples, ...) after each of `at_steps` inner steps, ascending."""
    _, problems = _engine(learner, tasks, engine, tasks_at_once, evaluating=True)
    return curves(problems, at_steps, inductive)


def check_outputs(learner: MetaLearner, tasks: Task, ways: int | None = None) -> None:
    """Raise `InputError` where the model's output is narrower than the number of ways.

    ways: by default the largest label of the tasks and one; with floating targets nothing is checked.
    """
    targets = tasks.query.targets
    if targets.is_floating_point():
        return
    ways = int(targets.max()) + 1 if ways is None else ways
    task = one(tasks, 0)
    with torch.no_grad():
        outputs = learner.adapt(task.support, steps=0)(task.query.inputs)
    if outputs.dim() < 2 or outputs.shape[-1] < ways:
        raise InputError(
            f"the model's outputs have shape {tuple(outputs.shape)}, too narrow for {ways} ways: "
            f"its last layer needs at least {ways} outputs"
        )


def choose(learner: MetaLearner, tasks: Task) -> tuple[str, str]:
    """The name of the engine for this learner and these tasks, and the reason in one line.

    Factored where Linear layers hold most of the adapted parameters and the support set is well below
    their width; the loop for convolutions on a CPU, where vmap makes grouped convolutions of them
    (measured 2.5-3.3 times slower on Conv4), and for other wide layers there (1.3-1.8 times slower on a
    784-256-10 MLP, second order and Reptile); batched otherwise.
    """
    device = tasks.support.inputs.device.type
    if _is_convolutional(learner.model) and device == "cpu":
        return "loop", "convolutions on a CPU"
    vmaps, factors = _tried(learner, tasks)
    if not vmaps:
        return "loop", "something in the model that vmap does not take"
    own = dict(learner.model.named_parameters())
    if factored.refusal(learner) is None:
        linear = [own[n] for n in factored.linear_weights(learner)]
        shots = tasks.support.targets.shape[1]
        wide = sum(w.numel() for w in linear if min(w.shape) > 2 * shots or w.shape[1] > 8 * shots)
        if 2 * wide > sum(own[n].numel() for n in learner.adapted) and factors:
            return "factored", f"linear layers much wider than the {shots} support examples"
    if device != "cpu":
        return "batched", f"one kernel for all tasks on {device}"
    if max(own[n].numel() for n in learner.adapted) > 100_000:
        return "loop", "wide layers on a CPU, which the factored engine does not take here"
    return "batched", "small dense layers"


def _engine(learner, tasks, engine, tasks_at_once, evaluating=False):
    if engine == "auto":
        engine, _ = choose(learner, tasks)
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; there are: auto, {', '.join(ENGINES)}")
    if tasks_at_once is not None:
        positive("tasks_at_once", tasks_at_once, integer=True)
    return engine, ENGINES[engine](learner, tasks, tasks_at_once, evaluating)


def _tried(learner: MetaLearner, tasks: Task) -> tuple[bool, bool]:
    """Whether vmap takes the model, and whether its Linear weights are used in linear layers only; found out by a
    forward pass, once per learner.
    """
    if learner not in _known:
        vmaps = _runs(batched.problems(learner, tasks, 2))
        factors = vmaps and factored.refusal(learner) is None and _runs(factored.problems(learner, tasks, 2))
        _known[learner] = vmaps, factors
    return _known[learner]


_known: WeakKeyDictionary[MetaLearner, tuple[bool, bool]] = WeakKeyDictionary()


def _runs(problems) -> bool:
    try:
        problem = next(iter(problems))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            problem.query(problem.start)
    except (InputError, RuntimeError):
        return False
    return True


def _is_convolutional(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
