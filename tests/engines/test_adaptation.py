"""Adaptation compiled: curves and adapted modules against the slow loops of reference.py and the eager engines."""

import pytest
import torch
import torch.nn.functional as F

import family
from compiling import two_blocks
from family import ALGORITHMS, answer, error
from fomaml.engines import adapter, curve
from fomaml.engines.compiled.cache import too_old
from zoo import MODULES, example

pytestmark = pytest.mark.skipif(bool(too_old()), reason=too_old())


def same(found, expected, tolerance=1e-12):
    """Whether tensors by name agree, relative to the largest entry of each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1e-30) if tensor.is_floating_point() else 1
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(MODULES, "conv4-strided", (two_blocks, (1, 7, 7), F.cross_entropy))
    monkeypatch.setattr(family, "STEPS", 2)


# the others differ in what networks have nothing to do with; of convolutions a trace takes a second or two
SHORT = {
    "mlp": {
        "fomaml",
        "meta-sgd",
        "maml++",
        "proto-maml",
        "fomaml-adam",
        "fomaml-minibatch",
        "maml-nesterov",
        "anil",
    },
    "conv4-strided": {"fomaml", "lslr", "proto-maml"},
}


@pytest.mark.parametrize(
    ("algorithm", "module"),
    [
        pytest.param(algorithm, module, marks=[] if algorithm in short else [pytest.mark.long])
        for module, short in SHORT.items()
        for algorithm in ALGORITHMS
        if ALGORITHMS[algorithm].modules(module)
    ],
)
def test_every_algorithm_reaches_what_the_reference_does(algorithm, module, small):
    row = ALGORITHMS[algorithm]
    model, tasks, criterion = example(module)
    learner = row.learner(model, criterion)
    expected = answer.__wrapped__(algorithm, module)
    for engine in ("loop", "batched") if module != "mlp" else ("loop", "batched", "factored"):
        if engine == "factored" and row.factored:
            continue
        [(_, start), (losses, outputs)] = curve(learner, tasks, [0, 2], engine=engine, compile=True)
        assert error({"": losses}, {"": expected.query_losses}) <= 1e-10
        assert error({"": outputs}, {"": expected.query_outputs}) <= 1e-10
        assert not torch.allclose(start, outputs)
    support = tasks.map(lambda tensor: tensor[0]).support
    again = adapter(learner, support)
    same(again(support).state_dict(), learner.adapt(support).state_dict())
