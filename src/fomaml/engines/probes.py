"""What is found out about a learner by trying it on a task or two: which engines take it, what a task costs, and
why it failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fomaml.devices import forked_random
from fomaml.engines import batched, factored, loop
from fomaml.engines.common import Engine, differentiate, first_line, out_of_memory, refuse_half
from fomaml.engines.watching import watched
from fomaml.errors import InputError
from fomaml.learning.adapt import ordinary_modes
from fomaml.learning.learner import MetaLearner
from fomaml.learning.mistakes import THIRD_ORDER, refuse_written
from fomaml.learning.problem import Problem
from fomaml.metrics import ignored_label
from fomaml.models import BatchNorm
from fomaml.tasks import Batch, Task, are_labels, chunks, count, device_of, first, one, singles, ways_each
from fomaml.trees import Tree, mapped

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
IMAGES = nn.Conv2d, nn.ConvTranspose2d


def is_convolutional(learner: MetaLearner) -> bool:
    return any(isinstance(module, CONVOLUTIONS) for module in learner.model.modules())


def has_images(learner: MetaLearner) -> bool:
    """Whether there are convolutions of images."""
    return any(isinstance(module, IMAGES) for module in learner.model.modules())


def suits_kernels(learner: MetaLearner) -> bool:
    """Whether the kernels for a CPU compute nearly all of a stack of tasks: images, convolutions and batch norms."""
    from fomaml.engines.cpu.kernels import takes_channels  # which only what is compiled needs

    convolutions = [module for module in learner.model.modules() if isinstance(module, CONVOLUTIONS)]
    norms = [module for module in learner.model.modules() if "Norm" in type(module).__name__]
    batch_norms = bool(norms) and all(isinstance(norm, BatchNorm | nn.BatchNorm2d) for norm in norms)
    return batch_norms and all(
        type(own) is nn.Conv2d
        and own.groups == 1
        and own.dilation == (1, 1)
        and takes_channels(own.weight.shape)
        for own in convolutions
    )


def takers(learner: MetaLearner, tasks: Task) -> tuple[bool, dict[str, int]]:
    """Whether vmap takes the learner, and, where the factored engine does, how many vectors of a support set go
    through each Linear weight. Tried on a stack of two tasks, of one where two take more memory than there is.
    """
    try:
        return _takers(learner, tasks, 2)
    except Exception as error:  # whatever a module raises
        if count(tasks) == 1 or not out_of_memory(error):
            raise
    return _takers(learner, tasks, 1)


def _takers(learner: MetaLearner, tasks: Task, number: int) -> tuple[bool, dict[str, int]]:
    with _as_for_a_gradient(tasks, number) as pair:
        vmaps = _taken(learner, batched.problem, pair) is not None
        if not vmaps or factored.refusal(learner) is not None:
            return vmaps, {}
        problem = _taken(learner, factored.problem, pair)
        return vmaps, factored.rows(problem) if isinstance(problem, factored.FactoredProblem) else {}


def vmaps(learner: MetaLearner, tasks: Task) -> bool:
    """Whether vmap takes the learner."""
    with _as_for_a_gradient(tasks, 2) as pair:
        return _taken(learner, batched.problem, pair) is not None


def try_once(learner: MetaLearner, tasks: Task) -> None:
    """The model and the criterion on one task as it is: raises `InputError` for what they return, as `Problem` does.

    Within vmap values are not known, and so not all of it can be seen. The tensors are those of a task, not the
    meta-parameters themselves, so that a module that reads these is seen.
    """
    with _as_for_a_gradient(tasks, 1) as single:
        given = one(single, 0)
        problem = Problem(learner, given.map(torch.clone))
        try:
            problem.check_parts()
            problem.query({name: value.detach().requires_grad_() for name, value in problem.start.items()})
            refuse_written(given, problem.task)
        except InputError:
            raise
        except Exception as error:  # whatever a module raises
            if out_of_memory(error):
                raise
            # here, as what a criterion does not take may pass under vmap, and mean something else
            explain(error, learner, single, "loop")


def tried(learner: MetaLearner, tasks: Task) -> None:
    """Raise `InputError` for what can be seen before a stack of tasks is computed: parameters in float16, labels beyond
    the outputs, and what `try_once` sees.
    """
    refuse_half(learner)
    check_labels_fit(learner, tasks)
    try_once(learner, tasks)


def check_labels_fit(learner: MetaLearner, tasks: Task) -> None:
    """Raise `InputError` where a cross-entropy would be given labels that the model has no outputs for, in any task.

    Before anything is computed of them: elsewhere than on a CPU such a label ends in an assertion of the device, after
    which the process can use it no more.
    """
    ignored = ignored_label(learner.criterion)
    if ignored is None or device_of(tasks).type == "cpu":
        return
    with _as_for_a_gradient(tasks, 1) as single, torch.no_grad():
        try:
            problem = loop.problem(learner, single, evaluating=True)
            outputs = problem.outputs(problem.start)
        except Exception as error:  # whatever a module raises is told where it is tried
            if out_of_memory(error):
                raise
            return
        reason = _refused(learner, problem.task, outputs)
        if reason is None and isinstance(outputs, Tensor) and are_labels(tasks.query.targets):
            reason = _refused_labels(learner, tasks, outputs.shape)
    if reason is not None:
        raise InputError(reason)


def flops(learner: MetaLearner, tasks: Task, of_support: bool = False) -> int:
    """The floating-point operations of the model on one task's query set, or on its support set."""
    return work(learner, tasks, of_support)[0]


FEW = 8


def work(learner: MetaLearner, tasks: Task, of_support: bool = False) -> tuple[int, int]:
    """The floating-point operations of the model on one task's query or support set, and the calls of torch that they
    take. Counted on `FEW` of the examples where the model takes them: each needs as many.
    """
    with _as_for_a_gradient(tasks, 1) as single, torch.no_grad():
        examples = single.support if of_support else single.query
        all_of_them = first(examples.inputs).shape[1]
        for number in dict.fromkeys((min(FEW, all_of_them), all_of_them)):
            seen, start = watched(), 0
            counter = FlopCounterMode(display=False) if seen.flops is None else nullcontext()
            with seen, counter:
                try:
                    some = mapped(lambda tensor, number=number: tensor[:, :number], examples)
                    problem = loop.problem(learner, single._replace(query=some))
                    start = seen.flops or 0
                    problem.query(problem.start)
                    break
                except Exception as error:
                    # whatever else fails, such as the loss of too few outputs, fails again where it is told in words
                    if out_of_memory(error):
                        raise
    found = counter.get_total_flops() if isinstance(counter, FlopCounterMode) else seen.flops or 0
    # where they cannot be counted: about one for each module
    calls = sum(1 for _ in learner.model.modules()) if seen.calls is None else seen.calls
    return start + (found - start) * all_of_them // number, calls


@contextmanager
def _as_for_a_gradient(tasks: Task, number: int) -> Iterator[Task]:
    """The first tasks, in the modes in which a meta-gradient is computed, whatever the caller's are; random numbers
    are drawn as if nothing had happened.
    """
    with forked_random(), ordinary_modes():
        few = next(chunks(tasks, number))
        yield few.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)


def _taken(learner: MetaLearner, engine: Engine, tasks: Task, always: bool = True) -> Problem | None:
    """A problem of this engine whose gradient could be computed, if it could; `always`: at every outer iteration.

    Raises: that there is too little memory, which says nothing of the engine.
    """
    try:
        problem = engine(learner, tasks)
        if always and callable(learner.first_order):
            problem.first_order = False  # the order that asks for more
        differentiate(learner, problem)
        return engine(learner, tasks)
    except Exception as error:  # whatever a module raises
        if out_of_memory(error):
            raise
        return None


def explain(error: Exception, learner: MetaLearner, tasks: Task, engine: str) -> None:
    """Raise `InputError` where an engine's error has a reason that can be told in words."""
    if isinstance(error, InputError) or out_of_memory(error):
        return
    if "batch_norm does not support 3rd" in str(error):
        raise InputError(THIRD_ORDER) from error
    if learner.loss is not None and "mutate a captured Tensor" in str(error):
        text = "torch.func does not take a module that writes into its buffers, as torch's batch norms do in training: "
        raise InputError(
            f"{text}fomaml.convert_batch_norm(model), or torch.autograd.grad in the loss"
        ) from error
    if isinstance(error, IndexError | RuntimeError):
        reason = None
        with suppress(Exception):  # where the model itself fails, targets are not why
            reason = _reason(learner, tasks, _refused, _dtype)
        if reason is not None:
            raise InputError(reason) from error
    if engine == "loop":
        return
    with forked_random():
        loop_does = all(_taken(learner, loop.problem, task, always=False) for task in chunks(tasks, 1))
    if loop_does:
        raise InputError(
            f"engine={engine!r} does not take this module, 'loop' does: {first_line(error)}"
        ) from error


def check_outputs(learner: MetaLearner, tasks: Batch) -> torch.Size | None:
    """Raise `InputError` where the criterion is a cross-entropy that cannot take these targets or the outputs for them,
    or where what the model or the criterion returns means nothing.

    Returns the shape of the outputs for the query set of the last task, where the criterion is one and they are one
    tensor.
    """
    shape: torch.Size | None = None

    def look(learner: MetaLearner, task: Task, outputs: Tree) -> str | None:
        nonlocal shape
        shape = outputs.shape if isinstance(outputs, Tensor) else None
        return _refused(learner, task, outputs)

    if ignored_label(learner.criterion) is not None:
        reason = _reason(learner, tasks, look)
        if reason is not None:
            raise InputError(reason)
    try_once(learner, next(singles(tasks)))
    return shape


def check_labels_again(learner: MetaLearner, tasks: Task, outputs: torch.Size) -> None:
    """Raise `InputError` where labels do not go with outputs of this shape; all else of tasks like these has passed
    `check_outputs` before.
    """
    if are_labels(tasks.query.targets) and are_labels(tasks.support.targets):
        reason = _refused_labels(learner, tasks, outputs)
        if reason is not None:
            raise InputError(reason)


def _reason(
    learner: MetaLearner, tasks: Batch, *looks: Callable[[MetaLearner, Task, Tree], str | None]
) -> str | None:
    """What is found first, in words. looks: (learner, task, outputs for its query set before any step) → the reason, if
    they see one.
    """
    for single in singles(tasks):
        with _as_for_a_gradient(single, 1) as own, torch.no_grad():
            problem = loop.problem(learner, own, evaluating=True)
            outputs = problem.outputs(problem.start)
            for look in looks:
                reason = look(learner, problem.task, outputs)
                if reason is not None:
                    return reason
    return None


def _refused(learner: MetaLearner, task: Task, outputs: Tree) -> str | None:
    """Why a cross-entropy raises an error: its labels have another shape or dtype, are below 0, or more than there are
    classes.
    """
    ignored = ignored_label(learner.criterion)
    targets = task.query.targets
    plain = all(isinstance(each, Tensor) for each in (outputs, targets, task.support.targets))
    if ignored is None or not plain:
        return None
    if outputs.dim() > 1 and outputs.shape[:1] == targets.shape[:1]:
        shape = outputs.shape[:1] + outputs.shape[2:]
        probabilities = targets.is_floating_point() and targets.shape == outputs.shape
        if not probabilities and (targets.is_floating_point() or targets.shape != shape):
            return (
                f"a cross-entropy of outputs {tuple(outputs.shape)} takes whole numbers {tuple(shape)} as labels, or "
                f"floating probabilities {tuple(outputs.shape)}; got {targets.dtype} targets {tuple(targets.shape)}"
            )
    if targets.is_floating_point() or task.support.targets.is_floating_point():
        return None
    shape = tuple(outputs.shape)
    if len(shape) == 1:
        return (
            f"the model's outputs have shape {shape}, without an axis of classes: a cross-entropy of labels takes "
            "outputs (examples, classes, ...)"
        )
    if shape[:1] + shape[2:] != task.query.targets.shape:
        return None
    return _refused_labels(learner, task.map(lambda tensor: tensor[None]), outputs.shape)


def _refused_labels(learner: MetaLearner, tasks: Task, outputs: torch.Size) -> str | None:
    """`_refused` of the labels of a stack of tasks. outputs: the shape of those of the first of them.

    With a start, which makes heads as wide as a task has classes, of those tasks that have as many as the first.
    """
    ignored = ignored_label(learner.criterion)
    shape = tuple(outputs)
    labels = [targets.long() for _, targets in tasks]
    for name, targets in zip(Task._fields, labels):
        negative = int(targets.where(targets != ignored, 0).min())
        if negative < 0:
            return (
                f"the {name} labels hold {negative}: labels are whole numbers from 0 on, or {ignored}, which is "
                "ignored"
            )
    of_support, of_query = (ways_each(targets, ignored) for targets in labels)
    alike = [n for n, own in enumerate(of_support) if learner.start is None or own == of_support[0]]
    support, ways = (max(each[n] for n in alike) for each in (of_support, of_query))
    if max(support, ways) <= shape[1]:
        return None
    if learner.start is not None and support == shape[1]:
        cure = f"the support set, which the start is made of, has the labels up to {support - 1} alone"
    else:
        cure = f"its last layer needs at least {max(support, ways)} outputs"
    return f"the model's outputs have shape {shape}, too narrow for {max(support, ways)} ways: {cure}"


def _dtype(learner: MetaLearner, task: Task, outputs: Tree) -> str | None:
    """Why a criterion raises an error of dtypes: it takes the same targets in another one."""
    targets, criterion = task.query.targets, learner.criterion
    if criterion is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    others = [targets.to(dtype) for dtype in (outputs.dtype, torch.int64) if dtype != targets.dtype]

    def takes(targets: Tensor) -> bool:
        try:
            criterion(outputs, targets)
        except Exception:  # whatever a criterion raises
            return False
        return True

    if takes(targets):
        return None
    # only what loses nothing
    found = next((o for o in others if torch.equal(o.to(targets.dtype), targets) and takes(o)), None)
    if found is None:
        return None
    return f"the criterion does not take targets of {targets.dtype}, but of {found.dtype}: targets.to({found.dtype})"
