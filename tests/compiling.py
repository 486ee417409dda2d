"""What the tests of compiled meta-gradients share: comparisons, and a look at what was compiled."""

from collections import Counter
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

import reference
from family import error, rates
from fomaml.engines import meta_gradient
from fomaml.engines.compiled import cache, programs
from fomaml.engines.compiled.values import Unknown
from fomaml.engines.cpu.kernels import norm_relu_pool, norm_relu_pool_backward
from fomaml.models import Conv4, Conv4Strided


def untouched(monkeypatch):
    """The graph runs as it was rewritten; the inductor takes 10 to 20 s."""
    inductor(monkeypatch, lambda graph, *arguments: graph)


def inductor(monkeypatch, compile):
    """What `torch.compile`'s backend is replaced by, for graphs of which loops of our own could be written too."""
    without_loops(monkeypatch)
    monkeypatch.setattr(torch._inductor, "compile", compile)


def without_loops(monkeypatch):
    """No loops of our own are written."""

    def unknown(graph, threads):
        raise Unknown("asked for")

    monkeypatch.setattr(programs, "program", unknown)


GRAPHS = WeakKeyDictionary()  # by what runs


def graph(learner):
    """The one compiled graph of a learner."""
    [made] = cache._watched[learner].known.values()
    return GRAPHS[made.function._run].graph


def targets(learner):
    """How often each function stands in the compiled graph."""
    return Counter(node.target for node in graph(learner).nodes)


def fused(learner):
    found = targets(learner)
    return found[norm_relu_pool], found[norm_relu_pool_backward]


def unchanged(model):
    """A function that checks that neither parameters nor buffers changed since."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def check():
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    return check


def two_blocks():
    model = Conv4Strided(4, channels=6)
    del model.body[2:]
    return model


def slow_answer(slow, model, tasks, steps=2):
    return reference.over_tasks(
        lambda m, t: slow(m, t, F.cross_entropy, rates(reference.learned(m)), steps), model, tasks
    )


def assert_close(found, expected, tolerance):
    """The gradients, in their norm over all parameters."""
    names = expected.gradients
    apart = sum((found.gradients[n].double() - expected.gradients[n].double()).square().sum() for n in names)
    size = sum(expected.gradients[n].double().square().sum() for n in names)
    assert (apart / size).sqrt() <= tolerance


def assert_current(learner, tasks, **options):
    """The compiled result is that of an uncompiled run now."""
    found = meta_gradient(learner, tasks, compile=True, **options)
    expected = meta_gradient(learner, tasks, **options)
    assert error(found.gradients, expected.gradients) <= 1e-10
    return found


def made(learner):
    return len(cache._watched[learner].known)


def dropped(convolutions):
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)] if convolutions else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 4)).double()


SMALL_CONV4 = partial(Conv4, 4, channels=4, image=(2, 16, 16)), (2, 16, 16)
SMALL_MLP = lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), (6,)
