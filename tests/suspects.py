"""Modules that the check must tell apart: a plain one, and one for each thing there is to find."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fomaml.models import BatchNorm

LOOP = "engine='loop'"


class Plain(nn.Module):
    """Nothing to find."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, inputs):
        return self.head(self.into(inputs).tanh())


# --- modules with something to find -----------------------------------------------------------------


class Tied(Plain):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return super().forward(self.second(self.first(inputs)))


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.into.bias.requires_grad_(False)


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Detached(Plain):
    def forward(self, inputs):
        return self.head(F.linear(inputs, self.into.weight.detach(), self.into.bias).tanh())


class Data(Plain):
    def forward(self, inputs):
        return self.head(F.linear(inputs, self.into.weight.data, self.into.bias).tanh())


class NoGrad(Plain):
    def forward(self, inputs):
        with torch.no_grad():
            hidden = self.into(inputs)
        return self.head(hidden.tanh())


class AllNoGrad(Plain):
    @torch.no_grad()
    def forward(self, inputs):
        return super().forward(inputs)


class Copied(Plain):
    def __init__(self):
        super().__init__()
        self.copied = self.into.weight.detach().clone()

    def forward(self, inputs):
        return self.head(F.linear(inputs, self.copied, self.into.bias).tanh())


class Computed(Plain):
    def __init__(self):
        super().__init__()
        self.computed = 2 * self.into.weight

    def forward(self, inputs):
        return self.head(F.linear(inputs, self.computed, self.into.bias).tanh())


class Box:
    """An object that nothing looks into."""

    def __init__(self, content):
        self.content = content


class Alias(Plain):
    """Reads its weight from an object of its own."""

    def __init__(self):
        super().__init__()
        self.alias = Box(self.into.weight)

    def forward(self, inputs):
        return self.head(F.linear(inputs, self.alias.content, self.into.bias).tanh())


class Detour(Alias):
    """Reads it from there as a constant, beside the layer itself."""

    def forward(self, inputs):
        constant = F.linear(inputs, self.alias.content.detach())
        return self.head((self.into(inputs) + constant).tanh())


class Hidden(Plain):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 6)]

    def forward(self, inputs):
        return super().forward(self.layers[0](inputs))


class InPlace(Plain):
    def forward(self, inputs):
        self.into.weight.data.mul_(0.9)
        return super().forward(inputs)


class Counter(Plain):
    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) * self.calls


class Buffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls.add_(1)
        return super().forward(inputs) * self.calls.clone()


class Assigned(Buffer):
    def forward(self, inputs):
        self.calls = self.calls + 1
        return Plain.forward(self, inputs) * self.calls


class Dropout(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5))


class Noise(Plain):
    def forward(self, inputs):
        return super().forward(inputs + torch.randn_like(inputs))


class Branch(Plain):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return 2 * outputs if outputs.sum() > 0 else outputs


class Item(Plain):
    def forward(self, inputs):
        return super().forward(inputs) * inputs.abs().max().item()


class Written(Plain):
    def forward(self, inputs):
        outputs = torch.zeros(len(inputs), 5, dtype=inputs.dtype)
        outputs[:] = super().forward(inputs)
        return outputs


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return 2 * inputs

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OwnFunction(Plain):
    def forward(self, inputs):
        return Double.apply(super().forward(inputs))


class WrongDouble(torch.autograd.Function):
    """sin with the right derivative, whose own derivative is taken to be 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs):
        return inputs.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].detach().cos()


class WrongSecond(Plain):
    def forward(self, inputs):
        return self.head(WrongDouble.apply(self.into(inputs)))


class VmapOnly(Plain):
    """Wrong where it runs under vmap, with no error."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs * outputs if torch._C._functorch.is_batchedtensor(outputs) else outputs


class Rounded(Plain):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs + (outputs.round() - outputs).detach()


class Float32(Plain):
    def forward(self, inputs):
        return super().forward(inputs.float())


class NotFinite(Plain):
    def forward(self, inputs):
        return super().forward(inputs) / 0


class Recurrent(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 5)

    def forward(self, inputs):
        return self.head(self.cell(inputs.unflatten(-1, (2, 3)))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, inputs):
        return self.head(self.layer(inputs.unflatten(-1, (3, 2)).repeat(1, 1, 2)).mean(1))


class Attention(Encoder):
    """Insists on a kernel."""

    kernel = SDPBackend.FLASH_ATTENTION

    def forward(self, inputs):
        with sdpa_kernel(self.kernel):
            return super().forward(inputs)


def native(**choices):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **choices), nn.Linear(8, 5))


def moved():
    model = native()
    for _ in range(3):
        model(torch.randn(9, 6))
    return model


def old_norm(norm):
    return nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 5))


def hooked():
    model = Plain()
    model.into.weight.register_hook(lambda slope: slope / 2)
    return model


class Boxed(Plain):
    """Calls its layer by an object of its own."""

    def __init__(self):
        super().__init__()
        self.box = Box(self.into)

    def forward(self, inputs):
        return self.head(self.box.content(inputs).tanh())


def ours(statistics):
    return nn.Sequential(nn.Linear(6, 8), BatchNorm(8, policy=statistics), nn.Linear(8, 5))


# module: level, part of the finding, part of the cure
TRIGGERS = {
    Tied: ("note", "learned as one tensor: first.weight = second.weight", ""),
    Frozen: ("note", "frozen, neither adapted nor meta-learned: into.bias", "requires_grad_"),
    Unused: ("note", "no output depends on: spare.weight, spare.bias", "delete"),
    Detached: ("wrong", "no gradient reaches, so never learned: into.weight", ".detach()"),
    Data: ("wrong", "no gradient reaches, so never learned: into.weight", ".data"),
    NoGrad: ("wrong", "no gradient reaches, so never learned: into.weight, into.bias", "torch.no_grad"),
    AllNoGrad: ("wrong", "no gradient reaches any parameter", "torch.no_grad"),
    Copied: ("wrong", "holds a copy, which never learns: into.weight", "self.weight"),
    Computed: (
        "wrong",
        "computed from parameters before forward, so adapted ones do not reach it: computed",
        "in",
    ),
    Alias: (
        "refused",
        "not tried any further: the module reads its parameter 'into.weight' by a reference",
        "",
    ),
    Detour: ("wrong", "first order, loop: differs from the plain reference", "self.weight, not from"),
    Hidden: ("wrong", "so never learned, of shape: (6, 6), (6,)", "nn.ModuleList"),
    InPlace: (
        "wrong",
        "forward changes parameters in place, and so the meta-model in every task: into.weight",
        "new",
    ),
    Counter: ("wrong", "forward keeps state on self that is no buffer", "register_buffer"),
    Buffer: (
        "note",
        "buffers that forward changes; each task starts from the meta-model's, which stay: calls",
        "",
    ),
    Assigned: ("note", "buffers that forward changes; each task starts from the meta-model's", ""),
    Dropout: ("note", "dropout is active", "model.eval()"),
    Noise: ("note", "forward draws random numbers of its own", ""),
    Branch: ("refused", "first order, batched: its forward branches on the values of a tensor", LOOP),
    Item: ("refused", "first order, batched: its forward takes a number out of a tensor", LOOP),
    Written: ("refused", "first order, batched: its forward writes in place into what all tasks share", LOOP),
    OwnFunction: (
        "refused",
        "first order, batched: vmap does not take its autograd.Function",
        "setup_context",
    ),
    Recurrent: ("refused", "first order, batched: vmap has no rule for one of its operations", LOOP),
    Attention: (
        "refused",
        "second order, loop: the fused attention kernel has no double backward",
        "sdpa_kernel",
    ),
    WrongSecond: ("wrong", "second order, loop: what it adds to first order is off by", "gradgradcheck"),
    VmapOnly: ("wrong", "first order, batched: differs from the plain reference", LOOP),
    Rounded: ("note", "second order, loop: runs, not compared (autograd's gradient is not the slope", ""),
    Float32: ("note", "does not run in float64, so compared in float32, more loosely", ""),
    NotFinite: ("wrong", "the outputs are not finite", ""),
    native: ("wrong", "running statistics that meta-training never updates", "convert_batch_norm"),
    lambda: native().eval(): (
        "wrong",
        "in eval mode, normalise by running statistics as they were made",
        "convert",
    ),
    lambda: moved().eval(): ("note", "in eval mode, running statistics are used as they are", ""),
    lambda: old_norm(nn.utils.spectral_norm): ("note", "buffers that forward changes", ""),
    lambda: nn.DataParallel(Plain()): (
        "refused",
        "DataParallel, keeps its parameters from being replaced",
        "",
    ),
    lambda: nn.Sequential(Plain(), nn.DataParallel(nn.Linear(5, 5))): (
        "refused",
        "the module '1', DataParallel",
        "",
    ),
    lambda: hooked(): ("refused", "a hook on the gradient of the parameter 'into.weight'", ""),
    Boxed: ("refused", "not tried any further: the module calls its Linear by a reference", ""),
    lambda: native(track_running_stats=False): ("note", "statistics of the batch", "statistics='support'"),
    lambda: ours("batch"): ("note", "statistics of the batch", "statistics='support'"),
    lambda: Recurrent(batch_first=False): (
        "note",
        "outputs depend on the other examples",
        "batch_first=True",
    ),
    lambda: nn.Linear(6, 3): ("refused", "3 outputs are too few for 5 ways", "at least 5 outputs"),
    lambda: nn.Linear(6, 1): ("note", "outputs (1,) per example: tried as a regression", ""),
}
