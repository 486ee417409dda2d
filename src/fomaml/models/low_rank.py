"""Low-rank changes of linear layers: few weights to adapt, in a network of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fomaml.errors import InputError, positive


class LoRALinear(nn.Linear):
    """A linear layer with a low-rank change: W x + b + (α / rank) B A x (Hu et al. 2021, eq. 3).

    A is `lora_a`, drawn as torch draws a linear layer, B is `lora_b`, zero at first: nothing is changed then.
    layer: whose weight and bias it takes, the very tensors.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        self.scale = alpha / rank
        self.lora_a = nn.Linear(layer.in_features, rank, bias=False, **like)
        self.lora_b = nn.Linear(rank, layer.out_features, bias=False, **like)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)
        self.train(layer.training)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + self.scale * self.lora_b(self.lora_a(inputs))


def lora(
    model: nn.Module,
    layers: str | Sequence[str] = "*",
    *,
    rank: int = 4,
    alpha: float | None = None,
) -> nn.Module:
    """Give linear layers of a model, in place, a low-rank change of their own, see `LoRALinear`.

    Parameters keep their names, and the new ones are LAYER.lora_a.weight and LAYER.lora_b.weight. What adapts and what
    is meta-learned is the learner's to say. With base = [n for n, _ in model.named_parameters() if "lora_" not in n]:
        FOMAML(model, …, adapted="*lora_*"): the change adapts; it and the base are meta-learned;
        FOMAML(model, …, adapted="*lora_*", frozen=base): the change alone is meta-learned;
        CAVIA(model, …, context="*lora_b*", frozen="*lora_a*"): B adapts, from zero in every task, and the base alone is
            meta-learned.

    Arguments:
        layers: globs over the names of `nn.Linear` layers, one or several.
        rank: of the change. alpha: α, by default the rank.

    Returns the model (or the replacement, when the model itself is a linear layer).

    Raises:
        InputError: no layer matches; one that has a change already, whose forward pass is not `nn.Linear`'s, or whose
            weight another module reads past it, as `nn.MultiheadAttention` does.
    """
    rank = positive("rank", rank, integer=True)
    alpha = positive("alpha", rank if alpha is None else alpha)
    globs = [layers] if isinstance(layers, str) else list(layers)
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    }
    chosen = {name: m for name, m in linear.items() if any(fnmatchcase(name, glob) for glob in globs)}
    if not chosen:
        raise InputError(
            f"no nn.Linear layer matches {', '.join(globs)}; there are: {', '.join(linear) or 'none'}"
        )
    for name, module in chosen.items():
        _check(model, name, module)
    made: dict[int, LoRALinear] = {}  # a layer that has two names has one change
    for name, module in chosen.items():
        made.setdefault(id(module), LoRALinear(module, rank, alpha))
        if not name:
            return made[id(module)]
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, made[id(module)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(each, LoRALinear) for each in module.modules()
        ):
            # its fast path, in evaluation without gradients, reads the weights of its layers past their forward passes
            module.activation_relu_or_gelu = 0
    return model


def _check(model: nn.Module, name: str, layer: nn.Linear) -> None:
    if isinstance(layer, LoRALinear) or ".lora_" in f".{name}":
        raise InputError(f"the layer {name!r} has a low-rank change already; name others")
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention):
        raise InputError(
            f"the layer {name!r} is never called: its nn.MultiheadAttention reads the weight itself; leave it out of "
            "the globs, as in ['*linear1', '*linear2']"
        )
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        raise InputError(f"the layer {name!r} has no shape yet: run the module once on a batch before")
    if type(layer).forward is not nn.Linear.forward or nn.utils.parametrize.is_parametrized(layer):
        raise InputError(
            f"the layer {name!r}, a {type(layer).__name__}, is more than an nn.Linear; leave it out of the globs"
        )
