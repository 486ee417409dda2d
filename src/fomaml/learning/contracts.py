"""What a learner is composed of, as contracts: what each part must declare and do, and the problem that it sees.

Attributes are declared, never guessed. What lacks one is refused when the learner is made, by `checked_objective` and
`checked_optimizer`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from fomaml.choices import Statistics
from fomaml.errors import InputError
from fomaml.learning.moments import SecondMoments
from fomaml.learning.rates import ConstantRates, LearnedRates
from fomaml.tasks import Examples, Task
from fomaml.trees import Tree

Criterion = Callable[[Any, Any], Tensor]  # (outputs, targets) → the mean loss, a scalar
# (the model at the weights of a task, examples) → the loss, a scalar
Loss = Callable[[Callable[..., Any], Examples], Tensor]
Output = (
    str | int | Callable[[Any], Any] | None
)  # which part of what the model returns is judged, None for all
# The parameters φ of one task, or of a stack of tasks: by name, but for the factored engine, which never builds them.
Adapted = Any


class InnerOptimizer(Protocol):
    """The direction of an inner step; it is subtracted, times the step size. Its state is fresh for each task.

    second_order: whether `direction` may be differentiated.
    carried: whether "square" and "weight" of its state outlive a task, see `SecondMoments`.
    elementwise: whether each element of the direction depends on the same elements of the gradient and the parameter
        alone. An engine then gives it the tensors of all tasks at once, with a leading axis; else those of one task.
    """

    @property
    def second_order(self) -> bool: ...

    @property
    def carried(self) -> bool: ...

    @property
    def elementwise(self) -> bool: ...

    def direction(self, gradient: Tensor, parameter: Tensor, state: dict[str, Any], step: int, /) -> Tensor:
        """state: this parameter's, updated in place. step: how many steps it has taken before, from 0."""
        ...


class Outcome(NamedTuple):
    """scalar: (), summed over the tasks. query_losses: () or (tasks,) and query_outputs at φ_K, detached.

    support_losses: one (steps,) or (steps, tasks) tensor, the loss at the start of each inner step.
    """

    scalar: Tensor
    query_losses: Tensor
    query_outputs: Tree
    support_losses: Tensor


class Objective(Protocol):
    """What a task contributes to the meta-loss: one scalar whose gradient by θ is the meta-gradient.

    proximal: λ of the term λ/2 ‖φ - θ‖² that the inner problem has; 0 for none.
    differentiates_twice: whether it differentiates the model twice by itself, whatever the order of the learner.
    """

    @property
    def proximal(self) -> float: ...

    @property
    def differentiates_twice(self) -> bool: ...

    def __call__(self, problem: InnerProblem, /) -> Outcome: ...


class Start(Protocol):
    """Where adaptation starts, if not at θ: φ₀ out of θ, both by name and differentiable."""

    def __call__(self, start: dict[str, Tensor], problem: InnerProblem, /) -> dict[str, Tensor]: ...


class Learner(Protocol):
    """What a problem asks of a learner, see `MetaLearner`."""

    model: nn.Module
    inner_lr: ConstantRates | LearnedRates
    inner_steps: int
    inner_batch_size: int | None
    inner_accumulate: int | None
    criterion: Criterion | None
    loss: Loss | None
    output: Output
    first_order: bool | Callable[[int], bool]
    optimizer: InnerOptimizer
    objective: Objective
    start: Start | None
    moments: SecondMoments
    adapted: list[str]
    meta_learned: list[str]
    trainable: frozenset[str]
    iteration: int

    def uses_support_statistics(self) -> bool: ...


class InnerProblem(Protocol):
    """What an objective and a start see: the inner problem of one task or of a stack of tasks, see `Problem`."""

    learner: Learner
    task: Task
    start: Adapted
    stacked: bool
    steps: int
    iteration: int

    @property
    def ways(self) -> int: ...

    def path(self) -> Iterator[tuple[Adapted, Tensor]]: ...

    def support_losses(
        self, adapted: Mapping[str, Tensor], constant: bool, step: int, proximal: bool = True
    ) -> Tensor: ...

    def query(
        self, adapted: Adapted, statistics: Statistics = "own", step: int | None = None
    ) -> tuple[Tensor, Tree]: ...

    def support_features(self, module: str) -> Tensor: ...


@dataclass(frozen=True)
class PlainObjective:
    """A function as an objective: no proximal term, and the model is differentiated as the learner's order says."""

    function: Callable[[InnerProblem], Outcome]
    proximal = 0.0
    differentiates_twice = False

    def __call__(self, problem: InnerProblem) -> Outcome:
        return self.function(problem)


def checked_objective(given: Objective | Callable[[InnerProblem], Outcome]) -> Objective:
    """The objective, or a function that declares nothing as a `PlainObjective`.

    Raises:
        InputError: something else that lacks an attribute; the message names it.
    """
    names = "proximal", "differentiates_twice"
    function = isinstance(
        given, types.FunctionType | types.MethodType | types.BuiltinFunctionType | functools.partial
    )
    if function and not any(hasattr(given, name) for name in names):
        return PlainObjective(given)
    return _declaring("objective", given, (*names, "__call__"))


def checked_criterion(given: Any) -> Criterion:
    """The criterion.

    Raises:
        InputError: a class, or what cannot be called.
    """
    return _called("criterion is a function of outputs and targets", given)


def checked_loss_function(given: Any) -> Loss:
    """The loss of the general form.

    Raises:
        InputError: a class, or what cannot be called.
    """
    return _called("loss is a function of the model at a task's weights and of examples", given)


def checked_output(given: Any) -> Output:
    """Which part of what the model returns is judged.

    Raises:
        InputError: no name, number or function.
    """
    is_number = isinstance(given, int) and not isinstance(given, bool)
    if (
        given is None
        or isinstance(given, str)
        or is_number
        or (callable(given) and not isinstance(given, type))
    ):
        return given
    raise InputError(
        f"output is the name or the number of a part of what the model returns, or a function of it; got {given!r}"
    )


def _called(what: str, given: Any) -> Any:
    if isinstance(given, type) or not callable(given):
        name = given.__name__ if isinstance(given, type) else type(given).__name__
        got = f"the class {name}, expected an instance: {name}()" if isinstance(given, type) else f"a {name}"
        raise InputError(f"the {what}, or a module; got {got}")
    return given


def unwrapped(criterion: Any) -> Any:
    """What a criterion is within `functools.partial`."""
    while isinstance(criterion, functools.partial):
        criterion = criterion.func
    return criterion


def module_of(criterion: Any) -> nn.Module | None:
    """The module that a criterion is, or is a method of, also within `functools.partial`; None if there is none."""
    criterion = unwrapped(criterion)
    if isinstance(criterion, types.MethodType):
        criterion = criterion.__self__
    return criterion if isinstance(criterion, nn.Module) else None


def buffers_of(criterion: Any) -> dict[str, Tensor]:
    """The buffers of a criterion that is a module, each task's own as the model's are."""
    module = module_of(criterion)
    if module is None:
        return {}
    return {f"criterion/{name}": buffer for name, buffer in module.named_buffers()}


def checked_optimizer(given: InnerOptimizer) -> InnerOptimizer:
    """The inner optimiser.

    Raises:
        InputError: it lacks an attribute; the message names it. One that is carried and not elementwise.
    """
    names = "second_order", "carried", "elementwise", "direction"
    optimizer = _declaring("inner optimiser", given, names)
    if optimizer.carried and not optimizer.elementwise:
        raise InputError(f"the inner optimiser {type(given).__name__} is carried and so must be elementwise")
    return optimizer


def _declaring(what: str, given: Any, names: tuple[str, ...]) -> Any:
    if isinstance(given, type):
        raise InputError(f"the {what} {given.__name__} is a class, expected an instance: {given.__name__}(…)")
    missing = [name for name in names if not hasattr(given, name)]
    if missing:
        label = given.__name__ if hasattr(given, "__name__") else type(given).__name__
        raise InputError(
            f"the {what} {label} has no {' and no '.join(missing)}; see fomaml.learning.contracts for what it needs"
        )
    return given
