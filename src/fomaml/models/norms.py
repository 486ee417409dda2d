"""A batch norm that is right under vmap and never changes while a task adapts, and what takes its place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.choices import Policy, check_choice
from fomaml.errors import InputError, positive

# A batch that a layer has normalised by: the layer, the inner step, mean and variance, (channels,) each.
Seen = tuple["BatchNorm", int, Tensor, Tensor]


class _Norm(NamedTuple):
    """What the layers are told from outside: see `normalising`."""

    first: int | None = None
    step: int = -1
    running: bool | None = None
    record: list[Seen] | None = None
    open: bool = False


_norm: ContextVar[_Norm] = ContextVar("norm", default=_Norm())  # noqa: B039 - a tuple


@contextmanager
def normalising(**told) -> Iterator[None]:
    """Within this block every `BatchNorm` is told:

    first: take batch statistics from the first so many examples only. A forward pass over support and
        query examples joined, with the number of support examples here, is the evaluation by the statistics
        of the support set: query examples do not inform each other.
    step: the inner step, 0 … K, for per-step statistics; the last one where it is not told.
    running: whether the policies "running" and "per-step" use their running statistics; by default
        they do in `eval()` mode.
    record: a list that receives (layer, step, mean, variance) of every batch seen, constants.
    open: written out, to be differentiated more than twice, which torch's kernel cannot be.
    """
    token = _norm.set(_norm.get()._replace(**told))
    try:
        yield
    finally:
        _norm.reset(token)


MOVING = ("running", "per-step")  # the policies whose statistics the outer loop moves
RUNNING, FROZEN = ("mean", "variance"), ("frozen_mean", "frozen_variance")  # buffers of a `BatchNorm`


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) that says by name where its statistics come from.

    Written from `torch.var_mean`. No forward pass changes its buffers, in any mode; the outer loop
    alone does, by `MetaLearner.update_statistics`.

    policy:
        "batch": of the batch at hand, always (the original MAML code; transductive on a query set);
        "support": of the support set, for the query examples too (inductive);
        "running": of the batch while training, running ones in `eval()` mode and at evaluation;
        "per-step": the same with a set of its own per inner step (Antoniou et al. 2019, section 4.4);
        "frozen": the running ones it was made with, always.
    steps: for "per-step", the number K of inner steps; there are K + 1 sets, one for φ_K.
    scale: False leaves out γ, as the original MAML code does.

    Shapes: (examples, channels, ...) in and out, any floating dtype; statistics are float32 at least. Buffers `mean`
    and `variance` (sets, channels), where there are any. Those of a layer that `freeze` has frozen, as
    `MetaLearner.adapt` does, are `frozen_mean` and `frozen_variance` (1, channels): a layer of any policy that loads
    them is frozen too.

    Raises:
        InputError: an unknown policy, or "per-step" without steps.
    """

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        scale: bool = True,
        policy: Policy = "batch",
        steps: int | None = None,
    ):
        super().__init__()
        check_choice("policy", policy, Policy)
        sets = 1
        if policy == "per-step":
            if steps is None:
                raise InputError("the policy per-step needs steps, the number of inner steps")
            sets = positive("steps", steps, integer=True) + 1
        self.eps = eps
        self.policy = policy
        self.weight = nn.Parameter(torch.ones(channels)) if scale else None
        self.bias = nn.Parameter(torch.zeros(channels))
        if policy in (*MOVING, "frozen"):
            self.register_buffer("mean", torch.zeros(sets, channels))
            self.register_buffer("variance", torch.ones(sets, channels))

    def forward(self, inputs: Tensor) -> Tensor:
        told = _norm.get()
        running = not self.training if told.running is None else told.running
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        if self.policy == "frozen" or (running and self.policy in MOVING):
            means, variances = (getattr(self, name) for name in self._kept())
            step = min(told.step, len(means) - 1)
            mean, variance = means[step].view(shape), variances[step].view(shape)
        else:
            if told.first is None and not told.open and inputs.numel() > inputs.shape[1]:
                return self._by_kernel(inputs, told)
            sample = inputs if told.first is None else inputs[: told.first]
            variance, mean = _statistics(sample)
            if told.record is not None:
                told.record.append((self, told.step, mean.detach().flatten(), variance.detach().flatten()))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.view(shape)
        # of a single example exactly β in every engine: rounding would fall on either side of a ReLU's kink
        return torch.addcmul(self.bias.view(shape), inputs - mean, scale).to(inputs.dtype)

    def _by_kernel(self, inputs: Tensor, told: _Norm) -> Tensor:
        """By torch's kernel. On a CPU it has the statistics at hand, where they are float32 at least."""
        ones = torch.ones_like(self.bias) if self.weight is None else self.weight
        wide = ones.dtype in (torch.float32, torch.float64)
        if told.record is not None and wide and inputs.device.type == "cpu":
            given = inputs, ones, self.bias, None, None, True, 0.0, self.eps
            outputs, mean, inverse = torch.native_batch_norm(*given)
            told.record.append(
                (self, told.step, mean.detach(), (inverse.detach().pow(-2) - self.eps).clamp(min=0))
            )
            return outputs
        if told.record is not None:
            variance, mean = _statistics(inputs.detach())
            told.record.append((self, told.step, mean.flatten(), variance.flatten()))
        return F.batch_norm(inputs, None, None, ones, self.bias, training=True, eps=self.eps)

    def freeze(self, mean: Tensor, variance: Tensor) -> None:
        """Take these (channels,) statistics for good: the policy becomes "frozen"."""
        self.policy = "frozen"
        for name in RUNNING:
            self._buffers.pop(name, None)
        for name, value in zip(FROZEN, (mean, variance)):
            self.register_buffer(name, value[None].clone())

    def _kept(self) -> tuple[str, str]:
        """The names of the buffers that it normalises by, where it does not take those of a batch."""
        return FROZEN if FROZEN[0] in self._buffers else RUNNING

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """As torch does, but that a layer which finds frozen statistics is frozen first, and so has a place for them.

        They have names of their own, so that running statistics never freeze a layer, nor are taken for frozen ones.
        """
        if any(prefix + name in state_dict for name in FROZEN):
            self.freeze(torch.zeros_like(self.bias), torch.ones_like(self.bias))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def update(self, step: int, mean: Tensor, variance: Tensor, momentum: float) -> None:
        """Move the running statistics of inner step `step` towards these (channels,) ones."""
        if is_moving(self):
            step = min(step, len(self.mean) - 1)
            self.mean[step].lerp_(mean.to(self.mean.dtype), momentum)
            self.variance[step].lerp_(variance.to(self.variance.dtype), momentum)

    def extra_repr(self) -> str:
        return f"{len(self.bias)}, eps={self.eps}, scale={self.weight is not None}, policy={self.policy!r}"


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean of each channel, float32 at least, with axes of one in the place of all others."""
    wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    return torch.var_mean(wide, [0, *range(2, inputs.dim())], correction=0, keepdim=True)


NATIVE_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NATIVE_NORMS = (*NATIVE_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def takes_statistics(norm: Any) -> bool:
    """Whether one of torch's own norms normalises by what it is given, and not by running statistics."""
    return norm.training or not norm.track_running_stats


def is_moving(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a module has running statistics that the outer loop moves."""
    return isinstance(module, BatchNorm) and module.policy in MOVING


@cache
def third_order_is_refused() -> bool:
    """Whether torch says by itself that it does not differentiate batch norms three times. Up to 2.13 it does so, and
    the result is wrong without an error.
    """
    x = torch.linspace(0, 1, 4, dtype=torch.float64).square()[:, None].requires_grad_()
    value = F.batch_norm(x, None, None, training=True).pow(3).sum()
    try:
        for _ in range(3):
            [x_grad] = torch.autograd.grad(value, x, create_graph=True)
            value = x_grad.square().sum()
    except RuntimeError:
        return True
    return False


def native_batch_norms(model: nn.Module) -> list[str]:
    """The names of the model's `nn.BatchNorm1d/2d/3d` layers."""
    return [n for n, m in model.named_modules() if isinstance(m, NATIVE_BATCH_NORMS)]


def unmoved_norms(model: nn.Module) -> dict[str, nn.Module]:
    """By name, torch's own layers in evaluation mode whose running statistics are as they were made."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, NATIVE_NORMS)
        and not module.training
        and module.running_mean is not None
        and module.running_var is not None
        and not module.running_mean.any()
        and bool((module.running_var == 1).all())
    }


def warn_of_unmoved(model: nn.Module) -> None:
    """Warn of a layer in evaluation mode that normalises by running statistics as they were made: meta-training never
    moves those of torch's own layers. The warning names the line of whoever called the caller.
    """
    unmoved = unmoved_norms(model)
    if unmoved:
        what = (
            f"the layer {next(iter(unmoved))!r} is in evaluation mode, with statistics that nothing has moved"
        )
        cure = "fomaml.convert_batch_norm(model), or model.train()"
        warnings.warn(f"{what}: {cure}", RuntimeWarning, stacklevel=3)


def refuse_native(model: nn.Module) -> None:
    """Raise `InputError` where a native batch norm would take its statistics from the whole batch."""
    native = native_batch_norms(model)
    if native and model.get_submodule(native[0]).training:
        raise InputError(
            f"the layer {native[0]!r} takes its statistics from the whole batch; for the "
            "statistics of the support set convert it first: fomaml.convert_batch_norm(model)"
        )


def convert_batch_norm(model: nn.Module, policy: Policy = "batch", steps: int | None = None) -> nn.Module:
    """Replace, in place, every `nn.BatchNorm1d/2d/3d` by this module's `BatchNorm`, weights and running
    statistics kept where the policy has any; see `BatchNorm` for policy and steps.

    timm's layers of a batch norm and an activation become a `BatchNormAct`, under the same names.

    Returns the model (or the replacement, when the model itself is a batch norm).

    Raises:
        InputError: a subclass of torch's layers with a forward pass of its own, which is not known here.
    """
    return _convert(model, policy, steps, {})


class BatchNormAct(BatchNorm):
    """A `BatchNorm` followed by timm's `drop` and `act`, as its `BatchNormAct2d` has them."""

    drop: nn.Module
    act: nn.Module

    def forward(self, inputs: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(inputs)))


def _twin(layer: nn.Module) -> type[BatchNorm]:
    """The class that computes what this layer does, beside its statistics."""
    if any(type(layer).forward is kind.forward for kind in NATIVE_BATCH_NORMS):
        return BatchNorm
    if type(layer).__name__ == "BatchNormAct2d" and type(layer).__module__.startswith("timm."):
        return BatchNormAct
    raise InputError(
        f"{type(layer).__name__} is a batch norm with a forward pass of its own, which convert_batch_norm would drop: "
        "replace it by fomaml.BatchNorm yourself"
    )


def _convert(model: nn.Module, policy: Policy, steps: int | None, done: dict[int, nn.Module]) -> nn.Module:
    if id(model) in done:
        return done[id(model)]
    done[id(model)] = new = model
    if isinstance(model, NATIVE_BATCH_NORMS):
        done[id(model)] = new = _twin(model)(model.num_features, model.eps, model.affine, policy, steps)
        if isinstance(new, BatchNormAct):
            new.drop, new.act = model.get_submodule("drop"), model.get_submodule("act")
        if model.running_mean is not None:
            new.to(model.running_mean)
        if model.affine:
            new.weight, new.bias = model.weight, model.bias
        else:
            new.bias.requires_grad_(False)
        if hasattr(new, "mean") and model.running_mean is not None and model.running_var is not None:
            new.mean = model.running_mean.expand(new.mean.shape).clone()
            new.variance = model.running_var.expand(new.mean.shape).clone()
        return new.train(model.training)
    for name, child in list(model._modules.items()):
        if child is not None:
            setattr(model, name, _convert(child, policy, steps, done))
    return new
