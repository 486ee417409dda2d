"""Which modules find all that they compute with by `self`, as their code says."""

import functools
import math
from abc import ABC
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.learning.closed import is_closed
from fomaml.models import BatchNorm

SCALE, SIZES = 2.0, (3, (4,))
SHARED = nn.Linear(3, 3)
HELD = {"layer": SHARED}


def helper(inputs):
    return SHARED(inputs)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.sizes = [3, (4, None)]

    def forward(self, inputs):
        return F.relu(self.layer(inputs)) * SCALE + math.pi + len(SIZES)


class OfAnother(Plain):
    """Its methods, a property, functions within a method and those of torch's class above it."""

    def forward(self, inputs):
        def twice(value):
            return self.scaled(value) + sum(each for each in range(2))

        return twice(super().forward(inputs)) + self.size

    def scaled(self, inputs, by=(1.0, None)):
        return inputs * self.layer.weight.sum()

    @property
    def size(self):
        return torch.tensor(1.0)

    @staticmethod
    def nothing():
        return None


class Wider(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs)


class CallsGlobal(Plain):
    def forward(self, inputs):
        return SHARED(inputs)


class ReadsContainer(Plain):
    def forward(self, inputs):
        return HELD["layer"](inputs)


class CallsFunction(Plain):
    def forward(self, inputs):
        return helper(inputs)


class CallsFunctionWithin(Plain):
    def forward(self, inputs):
        return sum(helper(each) for each in inputs)


class Imports(Plain):
    def forward(self, inputs):
        from torch import relu

        return relu(self.layer(inputs))


class Evaluates(Plain):
    def forward(self, inputs):
        return eval("SHARED")(inputs)


class ReadsWhatIsNotThere(Plain):
    def forward(self, inputs):
        return LATER(inputs)  # noqa: F821


class HasDefault(Plain):
    def forward(self, inputs, layer=SHARED):
        return layer(inputs)


class OfClass(Plain):
    shared: ClassVar = [SHARED]

    def forward(self, inputs):
        return self.shared[0](inputs)


class Abstract(Plain, ABC):
    pass


def enclosed():
    layer = nn.Linear(3, 3)

    class Enclosed(Plain):
        def forward(self, inputs):
            return layer(inputs)

    return Enclosed()


def wrapped():
    class Wrapped(Plain):
        @functools.wraps(Plain.forward)
        def forward(self, *given):
            return Plain.forward(self, *given)

    return Wrapped()


def with_attribute(value):
    module = Plain()
    module.other = value
    return module


def with_hook(module, kind):
    getattr(module, f"register_{kind}_hook")(lambda *given: None)
    return module


class Own:
    pass


class Box(list):
    """A container that may hold more than it contains."""


class Pair(tuple):
    """The same, where plain values are expected."""


PAIR = Pair((1, 2))


class ReadsPair(Plain):
    def forward(self, inputs):
        return PAIR.layer(inputs)


CLOSED = {
    "torch's": nn.Linear(3, 3),
    "ours": BatchNorm(3),
    "plain": Plain(),
    "methods": OfAnother(),
    "a subclass": Wider(3, 3),
    "a tensor": with_attribute(torch.zeros(3)),
    "a list of modules": with_attribute([nn.Linear(3, 3)]),
}
OPEN = {
    "a global module": CallsGlobal(),
    "a global container": ReadsContainer(),
    "a function": CallsFunction(),
    "a function in a generator": CallsFunctionWithin(),
    "an import": Imports(),
    "eval": Evaluates(),
    "a name that is not there": ReadsWhatIsNotThere(),
    "a default": HasDefault(),
    "an attribute of the class": OfClass(),
    "a class of another kind": Abstract(),
    "a variable from outside": enclosed(),
    "a wrapped method": wrapped(),
    "an object": with_attribute(Own()),
    "an object in a list": with_attribute([Own()]),
    "a list of another kind": with_attribute(Box()),
    "a global tuple of another kind": ReadsPair(),
    "a function as attribute": with_attribute(helper),
    "a hook": with_hook(Plain(), "forward"),
    "a hook before": with_hook(nn.Linear(3, 3), "forward_pre"),
    "a hook of the backward pass": with_hook(Plain(), "full_backward"),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed(name):
    assert is_closed(CLOSED[name])


@pytest.mark.parametrize("name", OPEN)
def test_open(name):
    assert not is_closed(OPEN[name])


def test_a_global_variable_is_looked_at_whenever_it_is_asked(monkeypatch):
    assert is_closed(Plain())
    monkeypatch.setitem(globals(), "SCALE", SHARED)
    assert not is_closed(Plain())
