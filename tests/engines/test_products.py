"""compile=True on dense layers: products of all tasks that become one, against the slow loops of reference.py."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import family
import reference
from compiling import assert_current, graph, unchanged, untouched
from family import ALGORITHMS, EXECUTIONS, LR, answer, assert_agrees
from fomaml.engines import meta_gradient
from fomaml.engines.compiled import products
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML, iMAML
from fomaml.learning.objectives import MultiStepLoss
from zoo import example


def test_operations_of_a_traced_function():
    def function(a, b):
        hidden = (a @ b).relu()  # (2, 3, 4) times (2, 4, 5)
        last = torch.baddbmm(hidden, a, b)
        return torch.addmm(last[0], a[0], b[0])

    traced = make_fx(function)(torch.zeros(2, 3, 4), torch.zeros(2, 4, 5))
    views = sum(
        node.meta["val"].numel()
        for node in traced.graph.nodes
        if node.target in (torch.ops.aten.select.int, torch.ops.aten.expand.default)
        or "view" in str(node.target)
    )
    product = 2 * 3 * 4 * 5
    assert products.operations(traced.graph) == 5 * product + 2 * 3 * 5 + views


DENSE = [
    "mlp",
    "layer-norm",
    "user",
    "twins",
    "drift",
    "gated",
    "attention",
    "no-bias",
    "twice",
    "regression",
    "padded",
]
STACKED = [
    *(
        ("fomaml", module, execution)
        for module in DENSE
        for execution in ("batched", "factored", "factored-2")
    ),
    *(
        ("maml", module, "batched")
        for module in ("user", "twins", "gated", "attention", "regression", "twice")
    ),
    *(("reptile", module, "batched") for module in ("user", "drift", "layer-norm")),
    *((name, "mlp", "batched") for name, row in ALGORITHMS.items() if row.modules("mlp")),
    *((algorithm, "context", "batched") for algorithm in ("cavia", "cavia-second")),
    *((algorithm, "mlp", "factored") for algorithm in ("anil", "boil", "by-name")),
    ("maml", "mlp", "batched-2"),
]


# Chunks of two tasks, which four modules stand for, and algorithms that differ from another row by a constant, by
# Nesterov's form of the momentum, or by the names of what is adapted.
LONG = {
    *(
        ("fomaml", module, "factored-2")
        for module in DENSE
        if module not in ("mlp", "user", "twins", "drift")
    ),
    *((f"{name}-preset", "mlp", "batched") for name in ("sign-maml", "anil", "boil")),
    *((name, "mlp", "batched") for name in ("fomaml-nesterov", "by-name-second", "boil-second")),
}
ROWS = [pytest.param(*row, marks=[pytest.mark.long] * (row in LONG)) for row in dict.fromkeys(STACKED)]


@pytest.mark.parametrize(("algorithm", "module", "execution"), ROWS)
def test_rewritten_products_agree_with_the_reference(algorithm, module, execution, monkeypatch):
    untouched(monkeypatch)
    options = EXECUTIONS[execution] | {"compile": True}
    monkeypatch.setattr(family, "STEPS", 2)
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    if isinstance(learner.objective, MultiStepLoss):
        with pytest.raises(InputError, match=r"compile=True does not take the multi-step loss"):
            meta_gradient(learner, tasks, **options)
        return
    expected = answer.__wrapped__(algorithm, module)
    check = unchanged(model)
    for _ in range(2):
        assert_agrees(meta_gradient(learner, tasks, **options), expected, 1e-10)
    check()


def test_products_of_all_tasks_become_one(monkeypatch):
    """A shared weight in the first forward pass, and the sum over tasks of the last weight gradient."""
    untouched(monkeypatch)
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 1, criterion)
    meta_gradient(learner, tasks, engine="batched", compile=True)
    targets = Counter(node.target for node in graph(learner).nodes)
    # the support: two layers forward, one back; the query: two weight gradients
    assert targets[torch.ops.aten.mm.default] == 5


def rewritten(function, *arguments):
    traced = make_fx(function)(*arguments)
    products.rewrite(traced)
    found, expected = traced(*arguments), function(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.stride() == expected.stride() or found.is_contiguous() == expected.is_contiguous()
    return Counter(node.target for node in traced.graph.nodes)[torch.ops.aten.bmm.default] == 0


A, B, W = torch.randn(3, 4, 5), torch.randn(3, 5, 6), torch.randn(5, 6)
C, D = torch.randn(3, 4, 6), torch.randn(1, 4, 5)
bmm = torch.bmm


@pytest.mark.parametrize(
    ("function", "arguments", "one"),
    [
        (lambda a, w: bmm(a, w.expand(3, 5, 6)), (A, W), True),
        (lambda a, w: bmm(a, w.mT.expand(3, 5, 6)), (A, W.mT.contiguous()), True),
        (lambda a, w: bmm(a, w.expand(3, 5, 6)), (A.mT.contiguous().mT, W), False),  # rows that are no view
        (lambda a, w: bmm(a, w[:1].expand(3, 5, 6)), (A, B), True),
        (lambda a, w: bmm(a, w), (A, B), False),
        (lambda a, w: bmm(a, w), (D, B[:1]), False),
        (lambda a, c: bmm(a.mT, c).sum(0), (A, C), True),
        (lambda a, c: bmm(a.mT, c).mT.sum(0), (A, C), True),
        (lambda a, c: bmm(a.mT, c).transpose(1, 2).transpose(1, 2).sum(0), (A, C), True),
        (lambda a, c: bmm(a.mT, c).transpose(1, 2).sum(0, keepdim=True), (A, C), True),
        (lambda a, c: bmm(a.mT, c).sum(1), (A, C), False),
        (lambda a, c: bmm(a.mT, c).sum((0, 1)), (A, C), False),
        (lambda a, c: bmm(a.mT, c).transpose(0, 1).sum(0), (A, C), False),
        (lambda a, c: bmm(a.mT, c).view(5, 3, 6).sum(0), (A, C), False),
        (lambda a, b: bmm(a, b).sum(0), (A, B), False),  # the left is not contiguous when turned
        (lambda a, c: bmm(a.mT, c).sum(0) * bmm(a.mT, c)[0], (A, C), False),
    ],
)
def test_only_products_that_are_one_are_rewritten(function, arguments, one):
    assert rewritten(function, *(a.double() for a in arguments)) == one


def test_a_sum_in_another_dtype_stays():
    function, a, c = (lambda a, c: bmm(a.mT, c).sum(0, dtype=torch.float64)), A.float(), C.float()
    assert not rewritten(function, a, c)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_conjugate_gradients(engine, monkeypatch):
    untouched(monkeypatch)
    model, tasks, criterion = example("regression")
    assert_current(iMAML(model, LR, 1, criterion, strength=5.0, cg_steps=3), tasks, engine=engine)


@pytest.mark.parametrize(
    ("algorithm", "module", "engine"),
    [
        pytest.param("fomaml", "regression", "batched", marks=pytest.mark.long),  # each takes several seconds
        ("fomaml", "mlp", "factored"),
        pytest.param("maml", "no-bias", "batched", marks=pytest.mark.long),
    ],
)
def test_through_the_inductor(algorithm, module, engine, monkeypatch):
    monkeypatch.setattr(family, "STEPS", 1)
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    check = unchanged(model)
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        check = unchanged(model)
        result = meta_gradient(learner, tasks, engine=engine, compile=True)
        slow = ALGORITHMS[algorithm].slow
        expected = reference.over_tasks(partial(slow_task, slow, criterion), model, tasks)
        assert_agrees(result, expected, 1e-10)
        check()
    assert result.engine == engine


def slow_task(slow, criterion, model, task):
    return slow(model, task, criterion)
