"""Modules of which parts run again in the backward pass, or only there; `again=False` makes each the plain twin."""

import functools
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fomaml.models import BatchNorm


class Again(nn.Module):
    """Two segments that run again; subclasses say how they reach what they need. Inputs (examples, 6), four outputs."""

    def __init__(self, again: bool):
        super().__init__()
        self.again = again
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.set_up()

    def set_up(self):
        pass

    def run(self, function, *arguments):
        if self.again:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def first(self, inputs):
        return self.run(lambda x: self.a(x).tanh(), inputs)

    def second(self, hidden):
        return self.run(lambda h: self.b(h).tanh(), hidden)

    def forward(self, inputs):
        return self.c(self.second(self.first(inputs)))


class Nested(Again):
    def second(self, hidden):
        return self.run(lambda h: self.run(self.b, h).tanh(), hidden)


class Sequence(Again):
    def set_up(self):
        self.layers = nn.Sequential(self.b, nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

    def second(self, hidden):
        return (
            checkpoint_sequential(self.layers, 2, hidden, use_reentrant=False)
            if self.again
            else self.layers(hidden)
        )


class ByWeight(Again):
    def second(self, hidden):
        return self.run(
            lambda h: F.linear(h, self.b.weight * self.c.weight.sum(), self.b.bias).tanh(), hidden
        )


class Method(Again):
    """A bound method kept as an attribute."""

    def set_up(self):
        self.segment = self.of_b

    def of_b(self, hidden):
        return self.b(hidden).tanh()

    def second(self, hidden):
        return self.run(self.segment, hidden)


class Contained(Again):
    """A function with a default, in a partial, in a list, in a dict."""

    def set_up(self):
        def segment(hidden, scale, layer=self.b, *, other=self.c):
            return layer(hidden).tanh() * scale + other.weight.mean()

        self.segments = {"all": [functools.partial(segment, scale=0.5)]}

    def second(self, hidden):
        return self.run(self.segments["all"][0], hidden)


class CallsItself(Again):
    """A function that calls itself, and knows the layer."""

    def set_up(self):
        def segment(hidden, times=2):
            return segment(self.b(hidden).tanh(), times - 1) if times else hidden

        self.segment = segment

    def second(self, hidden):
        return self.run(self.segment, hidden)


class Named(Again):
    Parts = namedtuple("Parts", "layer weights")

    def set_up(self):
        self.parts = self.Parts(self.b, (self.c.weight,))

    def second(self, hidden):
        return self.run(lambda h: self.parts.layer(h).tanh() + self.parts.weights[0].mean(), hidden)


class Replaced(Again):
    """The forward of a layer is replaced, as tools do that move layers to a device when they run."""

    def set_up(self):
        forward = self.b.forward
        self.b.forward = lambda hidden: forward(hidden).tanh()

    def second(self, hidden):
        return self.run(self.b, hidden)


class Parent(Again):
    """A layer that knows the module it is a part of."""

    class Part(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).tanh() * self.parent[0].c.weight.sum()

    def set_up(self):
        self.b = self.Part(8, 8)
        self.b.parent = (self,)

    def second(self, hidden):
        return self.run(self.b, hidden)


class Hooked(Again):
    """Hooks of the forward and of the backward pass, which look at the layer."""

    def set_up(self):
        self.b.register_forward_hook(lambda layer, _, outputs: outputs.tanh() * layer.weight.sum())
        self.b.register_full_backward_hook(lambda layer, into, _: (into[0] * layer.weight.detach().sum(),))

    def second(self, hidden):
        return self.run(self.b, hidden)


class Saved(Again):
    """What the backward pass needs is packed, and unpacked by a function that looks at the module."""

    def second(self, hidden):
        def pack(tensor):
            return tensor if not self.again else (tensor / self.b.weight.detach().norm(),)

        def unpack(packed):
            return packed if not self.again else packed[0] * self.b.weight.detach().norm()

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return (hidden @ self.b.weight.T).tanh()


class WeightNorm(Again):
    def set_up(self):
        self.a = parametrizations.weight_norm(self.a)
        self.b = parametrizations.weight_norm(self.b)


class OldWeightNorm(Again):
    def set_up(self):
        self.a = nn.utils.weight_norm(self.a)


class Normed(Again):
    def set_up(self):
        self.norm = BatchNorm(8)

    def second(self, hidden):
        return self.run(lambda h: self.norm(self.b(h)).tanh(), hidden)


class Shared(Again):
    def set_up(self):
        self.d = self.b

    def second(self, hidden):
        return self.run(lambda h: self.d(self.b(h).tanh()).tanh(), hidden)


class Recurrent(Again):
    def set_up(self):
        self.cell = nn.LSTM(8, 8, batch_first=True)

    def second(self, hidden):
        return self.run(lambda h: self.cell(h[:, None])[0][:, 0], hidden)


class OwnFunction(Again):
    """A function of its own that reads the layer's weight in its backward pass, not when it runs."""

    def second(self, hidden):
        layer = self.b

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(context, hidden, weight):
                context.save_for_backward(hidden)
                return hidden @ weight.T

            @staticmethod
            def backward(context, slope):
                return slope @ layer.weight, slope.T @ context.saved_tensors[0]

        return (Product.apply(hidden, layer.weight) if self.again else hidden @ layer.weight.T).tanh()


MODULES = [
    Again, Nested, Sequence, ByWeight, Method, Contained, CallsItself, Named, Replaced, Parent, Hooked, Saved,
    WeightNorm, OldWeightNorm, Normed, Shared, Recurrent, OwnFunction,
]  # fmt: skip
