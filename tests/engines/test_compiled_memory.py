"""compile=True and memory: what is kept, and what is written over."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compiling import GRAPHS, graph
from family import LR
from fomaml.engines import meta_gradient
from fomaml.engines.compiled import cache
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.models import Conv4, Conv4Strided
from zoo import draw


def test_the_memory_of_a_stack_does_not_grow_with_the_inner_steps():
    def kept(steps):
        learner = FOMAML(Conv4(4, channels=16, image=(2, 16, 16)), 0.1, steps)
        tasks = draw((2, 16, 16), F.cross_entropy, tasks=6).to(dtype=torch.float32)
        for _ in range(2):
            meta_gradient(learner, tasks, engine="batched", compile=True)
        function = next(iter(cache._watched[learner].known.values())).function
        return function._memory.kept

    assert kept(5) <= 1.05 * kept(2) > 0


class TensorBytes(TorchDispatchMode):
    """The most bytes at a time of tensors made while it is on."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return found

    def count(self, storage):
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, address, size):
        self.storages.remove(address)
        self.now -= size


POOLED, STRIDED = partial(Conv4, image=(2, 16, 16)), partial(Conv4Strided, in_channels=2)


@pytest.mark.parametrize(
    ("build", "preset"),
    [
        (POOLED, FOMAML),
        (POOLED, MAML),
        pytest.param(STRIDED, FOMAML, marks=pytest.mark.long),
        pytest.param(STRIDED, MAML, marks=pytest.mark.long),  # POOLED shows that growth would be seen
    ],
)
def test_the_tensors_of_a_loop_do_not_grow_with_the_inner_steps(build, preset):
    """But in second order, which shows that the measure sees them."""

    def peak(steps):
        learner = preset(build(4, channels=16), 0.1, steps)
        tasks = draw((2, 16, 16), F.cross_entropy).to(dtype=torch.float32)
        for _ in range(2):  # compiled, then measured
            with TensorBytes() as tensors:
                meta_gradient(learner, tasks, engine="loop", compile=True)
        return tensors.peak

    if preset is FOMAML:
        assert peak(5) <= 1.05 * peak(1)
    else:
        assert peak(3) > 1.5 * peak(1)


def test_a_compiled_function_does_not_keep_its_graph():
    learner = FOMAML(Conv4(4, channels=4, image=(2, 16, 16)).double(), 0.1, 2)
    meta_gradient(learner, draw((2, 16, 16), F.cross_entropy), engine="loop", compile=True)
    kept = weakref.ref(graph(learner))
    GRAPHS.clear()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("at_once", [2, 5])
def test_a_result_of_a_stack_is_not_written_over_by_the_next(at_once):
    """Of a network whose outputs are what a kernel wrote."""

    class Body(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs).flatten(1)

    model = Body(nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 16, 3)).double()
    tasks = draw((2, 8, 8), F.cross_entropy, tasks=10)
    learner = FOMAML(model, LR, 1)
    first = meta_gradient(learner, tasks, engine="batched", tasks_at_once=at_once, compile=True)
    kept = [tensor.clone() for tensor in (*first.gradients.values(), *first[1:4])]
    for _ in range(3):
        meta_gradient(
            learner,
            tasks.map(lambda tensor: tensor.flip(0)),
            engine="batched",
            tasks_at_once=at_once,
            compile=True,
        )
    found = (*first.gradients.values(), *first[1:4])
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))
