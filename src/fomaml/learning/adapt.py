"""The inner loop: from the meta-parameters θ to the adapted parameters φ of one task.

Everything here works on mappings from parameter names to tensors, elementwise, so the same code
adapts one task or, with one more leading axis on every tensor, a stack of tasks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fomaml.errors import InputError, positive
from fomaml.learning.contracts import InnerOptimizer
from fomaml.learning.replica import Replicas

Parameters = Mapping[str, Tensor]


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """The modes in which a gradient can be taken, whatever the caller's are."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def not_autocast(device: str) -> AbstractContextManager:
    """Within it nothing is cast to a lower precision on devices of this type: of what autocast is for, forward passes,
    starts and inner steps are none.
    """
    known = torch.amp.is_autocast_available(device)
    return (
        torch.autocast(device, enabled=False)
        if known and torch.is_autocast_enabled(device)
        else nullcontext()
    )


@contextmanager
def open_attention() -> Iterator[None]:
    """No fused layers and no fused attention, on any device.

    Fused kernels have no second derivative. Under vmap a CPU's flash attention takes one task after the other, and a
    GPU's memory-efficient one is chosen without what its backward pass needs, as vmap does not tell it that there will
    be one. In evaluation mode torch's transformer layers do not see under vmap that their parameters are to be
    differentiated.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@dataclass(frozen=True)
class SGD:
    """Inner gradient descent with the semantics of `torch.optim.SGD`, its state fresh for each task."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    second_order = True
    carried = False
    elementwise = True

    def __post_init__(self):
        if self.nesterov and not self.momentum:
            raise InputError("nesterov needs a momentum above 0, got 0")

    def direction(self, gradient: Tensor, parameter: Tensor, state: dict, step: int) -> Tensor:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * parameter
        if not self.momentum:
            return gradient
        velocity = gradient if step == 0 else self.momentum * state["velocity"] + gradient
        state["velocity"] = velocity
        return gradient + self.momentum * velocity if self.nesterov else velocity


@dataclass(frozen=True)
class Adam:
    """Inner Adam with the semantics of `torch.optim.Adam`, or of `AdamW` with `decoupled=True`.

    First order only: its division by the root of the squared gradient has no useful derivative.

    carried: the second moments outlive a task. A task starts from those that the outer loop has kept, see
    `MetaLearner.carry_moments`; otherwise its state is fresh. Fresh, the first steps have the size of the step
    size however small the gradient is, and what is learned already is stepped away from. Reptile's Omniglot
    setting is `Adam((0, 0.999), carried=True)` (Nichol et al. 2018, and their published code).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    carried: bool = False
    second_order = False
    elementwise = True

    def direction(self, gradient: Tensor, parameter: Tensor, state: dict, step: int) -> Tensor:
        if gradient.is_complex():  # its parts apart, as in torch.optim
            slope, point = (torch.view_as_real(each.resolve_conj()) for each in (gradient, parameter))
            return torch.view_as_complex(self.direction(slope, point, state, step))
        if self.weight_decay and not self.decoupled:
            gradient = gradient + self.weight_decay * parameter
        first, second = self.betas
        mean = state.get("mean", 0.0) * first + (1 - first) * gradient
        square = state.get("square", 0.0) * second + (1 - second) * gradient.square()
        # 1 - β₂ᵗ after t steps, also of earlier tasks
        weight = state.get("weight", 0.0) * second + (1 - second)
        state["mean"], state["square"], state["weight"] = mean, square, weight
        root = (square / weight).sqrt() + self.eps
        direction = mean / (1 - first ** (step + 1)) / root
        if self.weight_decay and self.decoupled:
            direction = direction + self.weight_decay * parameter
        return direction


@dataclass(frozen=True)
class Sign:
    """Steps along the sign of the gradient (Sign-MAML, Fan et al. 2021, eq. 5); first order only."""

    second_order = False
    carried = False
    elementwise = True

    def direction(self, gradient: Tensor, parameter: Tensor, state: dict, step: int) -> Tensor:
        return gradient.sign()


def inner_loop(
    losses: Callable[[dict[str, Tensor], bool, int], Tensor | Iterable[Tensor]],
    start: Parameters,
    rates: Callable[[int], Mapping[str, float | Tensor]],
    *,
    optimizer: InnerOptimizer = SGD(),
    first_order: bool = True,
    state: Mapping[str, dict] | None = None,
    stacked: bool = False,
    guard: Callable[[], AbstractContextManager] = nullcontext,
    overwrite: bool = False,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Adapt without end: yields (φₖ₊₁, losses at φₖ) for k = 0, 1, … (Finn et al. 2017, algorithm 1, line 6).

    losses: (φ, constant, step) → the support loss, () for one task or (tasks,) for a stack; or the terms that it is the
        sum of, each differentiated before the next is asked for. With `constant` nothing but φ is to be differentiated.
    start: φ₀, differentiable functions of θ.
    rates: step → the step size α of each adapted parameter, a number or a tensor that broadcasts.
    first_order: hold the inner gradient constant. The *point* is detached, not the gradient, so no
        inner graph outlives its step: φ depends on θ through φₖ₊₁ = φₖ - α g alone.
    state: the optimiser's by parameter, updated in place; by default a fresh one.
    stacked: φ is of a stack of tasks. guard: within what gradients are taken.
    overwrite: each φ takes the place of the one before, in first order and without a graph back to θ: a fourth of the
        time of a step of wide layers. φ₀ stays as it is.
    """
    current = dict(start)
    state = {name: {} for name in current} if state is None else state
    taken = dict.fromkeys(current, 0)
    overwrite = overwrite and type(optimizer) in (SGD, Adam, Sign)  # others may keep what they were given
    place: dict[str, Tensor] = {}
    for step in itertools.count():
        with torch.enable_grad():
            # Nodes of their own also in second order: φ₀ may hold tensors that depend on one another, such as a
            # head made of the features of the body, and a partial derivative must not run through them.
            point = place or {
                n: p.detach().requires_grad_() if first_order or not p.requires_grad else p.view_as(p)
                for n, p in current.items()
            }
            if overwrite and all(taken.values()):  # from here on φ stays in its place
                place = point
            loss: Tensor | None = None
            gradients: list[Tensor | None] = [None] * len(point)
            terms = losses(point, first_order, step)
            for term in [terms] if isinstance(terms, Tensor) else terms:
                with guard():
                    found = _gradients(term.sum() if stacked else term, list(point.values()), not first_order)
                gradients = [g if f is None else f if g is None else g + f for g, f in zip(gradients, found)]
                loss = term.detach() if loss is None else loss + term.detach()
        assert loss is not None
        with not_autocast(loss.device.type):
            alpha = rates(step)
            if overwrite:
                current = _overwritten(current, alpha, point, gradients, optimizer, state, taken)
            else:
                following = {}
                for (name, parameter), gradient in zip(current.items(), gradients):
                    if gradient is None:  # the loss does not depend on it
                        following[name] = parameter
                        continue
                    with torch.no_grad() if first_order else torch.enable_grad():
                        arguments = gradient, point[name], state[name], taken[name]
                        if stacked and not optimizer.elementwise:
                            direction = _task_by_task(optimizer, *arguments)
                        else:
                            direction = optimizer.direction(*arguments)
                    taken[name] += 1
                    following[name] = parameter - alpha[name] * direction
                current = following
        del point, gradients, found  # the next forward pass finds their memory, which is still near
        yield current, loss


@torch.no_grad()
def _overwritten(
    current: dict[str, Tensor],
    rates: Mapping[str, float | Tensor],
    point: dict[str, Tensor],
    gradients: list[Tensor | None],
    optimizer: InnerOptimizer,
    state: Mapping[str, dict],
    taken: dict[str, int],
) -> dict[str, Tensor]:
    """φₖ₊₁, each tensor in the memory of φₖ from its second step on; rounded as in `torch.optim.SGD` where α is a
    number: once.
    """
    following = {}
    for (name, parameter), gradient in zip(current.items(), gradients):
        if gradient is None:  # the loss does not depend on it
            following[name] = parameter
            continue
        times, alpha = taken[name], rates[name]
        direction = optimizer.direction(gradient, point[name], state[name], times)
        if isinstance(alpha, Tensor) or direction.is_sparse or alpha > LARGEST:
            direction, alpha = alpha * direction, 1  # such a number is none that `alpha=` takes
        following[name] = (parameter.sub_ if times else parameter.sub)(direction, alpha=alpha)
        taken[name] = times + 1
    return following


LARGEST = torch.finfo(torch.float16).max  # that every dtype holds


def _gradients(loss: Tensor, values: list[Tensor], create_graph: bool) -> tuple[Tensor | None, ...]:
    try:
        found: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, values, create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise InputError(
            "torch.utils.checkpoint(…, use_reentrant=True) gives no gradient of chosen tensors: use_reentrant=False"
        ) from error
    if all(gradient is None for gradient in found):
        raise InputError(
            "the loss depends on no parameter that adapts: nothing detached, rounded, under torch.no_grad or in "
            "torch.utils.checkpoint(…, use_reentrant=True) on the way to it; in FastModel, computed with that object"
        )
    return found


def _task_by_task(
    optimizer: InnerOptimizer, gradients: Tensor, parameters: Tensor, state: dict, step: int
) -> Tensor:
    """The directions of a stack of tasks, each from its own tensors and state."""
    states = state.setdefault("of each task", [{} for _ in gradients])
    return torch.stack(
        [optimizer.direction(*own, step) for own in zip(gradients, parameters, states, strict=True)]
    )


class FastModel(nn.Module):
    """A module's fast weights, for hand-written inner loops with any module and any loss.

        fast = FastModel(model)
        for _ in range(5):
            fast.step(loss_fn(fast(x_support), y_support), lr=0.1)
        loss_fn(fast(x_query), y_query).backward()  # the meta-gradient, in model.parameters()

    The model's tensors never change: its parameters receive gradients, its buffers are copied. What else forward sets
    on the module, such as a term of the loss, stays there. With `first_order=False` the steps are differentiated
    through (MAML).
    """

    def __init__(self, model: nn.Module, first_order: bool = True):
        super().__init__()
        self._replicas = Replicas(model, open=not first_order)
        self.first_order = first_order
        self.weights: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._buffers_copy = {n: b.clone() for n, b in model.named_buffers()}

    def forward(self, *args, **kwargs):
        """The model's forward with the fast weights in place of its own."""
        holding = self._replicas.holding(self.weights, self._buffers_copy, keep=True)
        with nullcontext() if self.first_order else open_attention(), holding as (model, _):
            return model(*args, **kwargs)

    def step(self, loss: Tensor, lr: float | Mapping[str, float | Tensor]) -> None:
        """One step of gradient descent on `loss`, a scalar computed with this object.

        lr: one step size, or one by parameter name; parameters that are not named stay as they are.
        """
        rates = lr if isinstance(lr, Mapping) else dict.fromkeys(self.weights, lr)
        for rate in rates.values():
            if not isinstance(rate, Tensor):
                positive("lr", rate)
        unknown = sorted(set(rates) - set(self.weights))
        if unknown:
            raise InputError(f"no parameter {unknown[0]!r} to adapt; there are: {', '.join(self.weights)}")
        gradients = _gradients(loss, [self.weights[name] for name in rates], not self.first_order)
        for (name, rate), gradient in zip(rates.items(), gradients):
            if gradient is not None:
                self.weights[name] = self.weights[name] - rate * gradient

    def train(self, mode: bool = True) -> FastModel:
        """All modules of the model in this mode, in the forward passes of this object; by default in their own."""
        super().train(mode)
        self._replicas.training = mode
        return self

    def module(self) -> nn.Module:
        """An ordinary, independent copy of the model with the fast weights, and the buffers as the forward passes have
        left them, to save or serve.
        """
        return load(self._replicas.duplicate(), self.weights, self._buffers_copy)


@torch.no_grad()
def load(module: nn.Module, parameters: Parameters, buffers: Parameters) -> nn.Module:
    """Copy named values into a module's own parameters and buffers, in place; returns the module.

    A value of another shape, a head of another number of ways, takes the parameter's place.
    """
    for name, value in parameters.items():
        own = module.get_parameter(name)
        if own.shape == value.shape:
            own.copy_(value)
            continue
        owner, _, last = name.rpartition(".")
        owner = module.get_submodule(owner)
        setattr(owner, last, nn.Parameter(value.detach().clone(), own.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    for name, value in buffers.items():
        owner, _, last = name.rpartition(".")
        buffers_of_owner = module.get_submodule(owner)._buffers
        own = buffers_of_owner[last]
        if own is not None and (own.shape, own.dtype) == (value.shape, value.dtype):
            own.copy_(value)
        else:
            buffers_of_owner[last] = value.detach().clone()
    return module
