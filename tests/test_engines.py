"""One table: algorithm x module x execution, in float64 against the slow loops of reference.py.

A new algorithm is one row of ALGORITHMS, and its slow loop in reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import reference
from fomaml.engines import curve, meta_gradient
from fomaml.engines.factored import linear_weights
from fomaml.engines.factored import problem as factored_problem
from fomaml.engines.plan import choose
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD, Adam, Sign
from fomaml.learning.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    FOMAML,
    MAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoMAML,
    Reptile,
    SignMAML,
    ZeroHeadMAML,
    iMAML,
)
from fomaml.learning.objectives import MultiStepLoss
from fomaml.learning.problem import Problem
from fomaml.models import MLP, Conv4, Conv4Strided, WithContext
from fomaml.tasks import Examples, Task, one

# --- modules --------------------------------------------------------------------------------------


class User(nn.Module):
    """Tied weights, an unused and a frozen parameter, and a buffer that counts and matters."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.head = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        hidden = F.relu(self.into(inputs)) * (1 + self.calls / 10)
        return self.head(self.second(self.first(hidden).tanh() * self.frozen).tanh())


class Twins(nn.Module):
    """Two parameters added together: autograd may hand both the same gradient tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.into, self.head = nn.Linear(6, 8, bias=False), nn.Linear(8, 4)

    def forward(self, inputs):
        return self.head((self.into(inputs) + (self.a + self.b)).tanh())


class Drift(nn.Module):
    """A buffer that changes what goes into the first layer."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs):
        self.mean.mul_(0.5).add_(inputs.detach().mean(0), alpha=0.5)
        return self.head(self.into(inputs - self.mean).tanh())


class Autoencoder(nn.Module):
    """A Linear whose weight is used a second time, transposed, outside of the layer."""

    def __init__(self):
        super().__init__()
        self.encode, self.head = nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, inputs):
        return self.head(self.encode(inputs).tanh() @ self.encode.weight)


class Twice(nn.Module):
    """The same Linear on the inputs and again on its own outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, inputs):
        return self.head(self.body(self.body(inputs).tanh()).tanh())


class Gated(nn.Module):
    """A Linear that takes one vector, the mean of all examples, and no batch."""

    def __init__(self):
        super().__init__()
        self.gate, self.into, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, inputs):
        return self.head(self.into(inputs).tanh() * self.gate(inputs.mean(0)).sigmoid())


class Attention(nn.Module):
    """One head of attention over three tokens of width four, written from Linear layers."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 4)

    def forward(self, inputs):
        tokens = inputs.unflatten(-1, (3, 4))  # (examples, tokens, width)
        weights = (self.query(tokens) @ self.key(tokens).mT / 2).softmax(-1)
        return self.head((tokens + weights @ self.value(tokens)).mean(-2))


class Padded(nn.Module):
    """An embedding whose padding never learns: torch's vmap knows that of the first task alone."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(3, 5, padding_idx=1), nn.Linear(5, 4)

    def forward(self, inputs):
        return self.head(self.table((inputs * 2).clamp(-1, 1).round().long() + 1).mean(-2).tanh())


def conv_group_norm():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )


def conv_batch_norm():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)
    )


def mlp_layer_norm():
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    )


def no_bias():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))


def regression():
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


# name → (builder, shape of one input, criterion)
MODULES = {
    "mlp": (partial(MLP, 36, 12, 4), (1, 6, 6), F.cross_entropy),
    "conv4": (partial(Conv4, 4, channels=8, image=(1, 16, 16)), (1, 16, 16), F.cross_entropy),
    "conv4-strided": (partial(Conv4Strided, 4, channels=6), (1, 12, 12), F.cross_entropy),
    "group-norm": (conv_group_norm, (1, 8, 8), F.cross_entropy),
    "layer-norm": (mlp_layer_norm, (6,), F.cross_entropy),
    "batch-norm": (conv_batch_norm, (1, 8, 8), F.cross_entropy),
    "user": (User, (6,), F.cross_entropy),
    "twins": (Twins, (6,), F.cross_entropy),
    "drift": (Drift, (6,), F.cross_entropy),
    "autoencoder": (Autoencoder, (6,), F.cross_entropy),
    "gated": (Gated, (6,), F.cross_entropy),
    "attention": (Attention, (12,), F.cross_entropy),
    "padded": (Padded, (6,), F.cross_entropy),
    "no-bias": (no_bias, (6,), F.cross_entropy),
    "twice": (Twice, (6,), F.cross_entropy),
    "regression": (regression, (1,), F.mse_loss),
    "context": (lambda: WithContext(MLP(6 + 3, 12, 4), 3), (6,), F.cross_entropy),
}


def draw(shape, criterion, tasks=3, ways=4, shots=2, query_shots=3):
    """Random float64 tasks of this input shape; random targets, so that no loss gets near 0."""

    def examples(number):
        inputs = torch.randn(tasks, number, *shape, dtype=torch.float64)
        if criterion is F.mse_loss:
            return Examples(inputs, torch.randn(tasks, number, 1, dtype=torch.float64))
        order = torch.rand(tasks, number).argsort(1)  # every class is there, in an order that means nothing
        return Examples(inputs, order % ways)

    return Task(examples(ways * shots), examples(ways * query_shots))


def example(name, **sizes):
    """The module, some tasks for it and its criterion."""
    build, shape, criterion = MODULES[name]
    torch.manual_seed(1)
    return build().double(), draw(shape, criterion, **sizes), criterion


# --- algorithms -----------------------------------------------------------------------------------

LR, STEPS = 0.2, 3
BY_NAME = {"*bias": 0.4, "*": 0.1}
MOMENTUM, NESTEROV = {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True}
DECAY = {"momentum": 0.5, "weight_decay": 0.1}


def head(model) -> list[str]:
    """The names of the last Linear's parameters."""
    name = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    return [f"{name}.weight", f"{name}.bias"]


def body(model) -> list[str]:
    return [name for name in reference.learned(model) if name not in head(model)]


def rates(names, lr=LR):
    return dict.fromkeys(names, lr)


def rates_by_name(model):
    return {n: 0.4 if n.endswith("bias") else 0.1 for n in reference.learned(model)}


@dataclass(frozen=True)
class Algorithm:
    """learner: (model, criterion) → MetaLearner. slow: (model, task, criterion) → Answer of reference.py.

    factored: part of the message with which the factored engine refuses it. modules: which it goes with.
    """

    learner: Callable
    slow: Callable
    factored: str | None = None
    modules: Callable = lambda module: True


def with_everything(preset, slow, choices=None, slow_choices=None, factored=None):
    """The row of an algorithm that adapts all parameters with one step size."""
    return Algorithm(
        lambda m, c: preset(m, LR, STEPS, c, **(choices or {})),
        lambda m, t, c: slow(m, t, c, rates(reference.learned(m)), STEPS, **(slow_choices or {})),
        factored,
    )


def optimised(preset, slow, ours, theirs, factored="plain SGD"):
    return with_everything(preset, slow, {"optimizer": ours}, {"optimizer": theirs}, factored)


def signed(module) -> bool:
    """Not where gradients are zero but for rounding, as those of a bias before a norm: their sign is chance."""
    return module not in {"conv4", "conv4-strided", "batch-norm", "group-norm"}


def partly(preset, slow, names, factored=None):
    return Algorithm(
        lambda m, c: preset(m, LR, STEPS, c, adapted=names(m)),
        lambda m, t, c: slow(m, t, c, rates(names(m)), STEPS),
        factored,
    )


def by_name(preset, slow, factored=None):
    return Algorithm(
        lambda m, c: preset(m, BY_NAME, STEPS, c),
        lambda m, t, c: slow(m, t, c, rates_by_name(m), STEPS),
        factored,
    )


ADAM = {"betas": (0.7, 0.9), "eps": 1e-3}
# eps as large: without a gradient, as a bias before a batch norm, Adam magnifies its rounding errors
REPTILE_ADAM = {"betas": (0.0, 0.999), "eps": 1e-3}
FIRST, QUERY = "first order only", "query loss as objective"
MINI = ({"inner_batch_size": 3}, {"batch": 3})
ALGORITHMS = {
    "fomaml": with_everything(FOMAML, reference.fomaml),
    "maml": with_everything(MAML, reference.maml, factored=FIRST),
    "reptile": with_everything(Reptile, reference.reptile, factored=QUERY),
    "anil": partly(FOMAML, reference.fomaml, head),
    "anil-second": partly(MAML, reference.maml, head, FIRST),
    "boil": partly(FOMAML, reference.fomaml, body),
    "boil-second": partly(MAML, reference.maml, body, FIRST),
    "boil-reptile": partly(Reptile, reference.reptile, body, QUERY),
    "by-name": by_name(FOMAML, reference.fomaml),
    "by-name-second": by_name(MAML, reference.maml, FIRST),
    "fomaml-momentum": optimised(
        FOMAML, reference.fomaml, SGD(**MOMENTUM), partial(torch.optim.SGD, **MOMENTUM)
    ),
    "fomaml-nesterov": optimised(
        FOMAML, reference.fomaml, SGD(**NESTEROV), partial(torch.optim.SGD, **NESTEROV)
    ),
    "maml-momentum": with_everything(MAML, reference.maml, {"optimizer": SGD(**MOMENTUM)}, MOMENTUM, FIRST),
    "maml-nesterov": with_everything(MAML, reference.maml, {"optimizer": SGD(**NESTEROV)}, NESTEROV, FIRST),
    "maml-decay": with_everything(MAML, reference.maml, {"optimizer": SGD(**DECAY)}, DECAY, FIRST),
    "fomaml-adam": optimised(FOMAML, reference.fomaml, Adam(**ADAM), partial(torch.optim.Adam, **ADAM)),
    "fomaml-adamw": optimised(
        FOMAML,
        reference.fomaml,
        Adam(**ADAM, weight_decay=0.1, decoupled=True),
        partial(torch.optim.AdamW, **ADAM, weight_decay=0.1),
    ),
    "reptile-adam": optimised(
        Reptile, reference.reptile, Adam(**REPTILE_ADAM), partial(torch.optim.Adam, **REPTILE_ADAM)
    ),
    "sign-maml": replace(optimised(FOMAML, reference.fomaml, Sign(), reference.SignSGD), modules=signed),
    "fomaml-minibatch": with_everything(FOMAML, reference.fomaml, *MINI, "whole support set"),
    "maml-minibatch": with_everything(MAML, reference.maml, *MINI, FIRST),
    "reptile-minibatch": with_everything(Reptile, reference.reptile, *MINI, QUERY),
}


def head_row(preset, prototypes, **choices):
    """The row of an algorithm that starts from a head made for the task."""
    return Algorithm(
        lambda m, c: preset(m, LR, STEPS, c, head=head(m)[0].removesuffix(".weight"), **choices),
        lambda m, t, c: reference.from_head(
            m,
            t,
            c,
            LR,
            STEPS,
            head(m)[0].removesuffix(".weight"),
            int(t.support.targets.max()) + 1,
            prototypes,
            **choices,
        ),
        FIRST if choices else "starts at the meta-parameters",
        {"mlp", "conv4", "conv4-strided", "group-norm", "layer-norm", "batch-norm"}.__contains__,
    )


WEIGHTS = [(1 - 0.25) / STEPS] * (STEPS - 1) + [1 - (STEPS - 1) * (1 - 0.25) / STEPS]


def quarter_way(preset, *arguments, **choices):
    """A learner at the outer iteration 5 of 20."""

    def build(model, criterion):
        learner = preset(model, LR, STEPS, criterion, *arguments, **choices)
        learner.iteration = 5
        return learner

    return build


ALGORITHMS |= {
    "meta-sgd": Algorithm(
        lambda m, c: MetaSGD(m, LR, STEPS, c),
        lambda m, t, c: reference.learned_rates(m, t, c, LR, STEPS, elementwise=True, first_order=False),
        FIRST,
    ),
    "meta-sgd-first": Algorithm(
        lambda m, c: MetaSGD(m, LR, STEPS, c, first_order=True),
        lambda m, t, c: reference.learned_rates(m, t, c, LR, STEPS, elementwise=True, first_order=True),
        "learned ones",
    ),
    "lslr": Algorithm(
        lambda m, c: FOMAML(m, LR, STEPS, c, learn_rates="per-step"),
        lambda m, t, c: reference.learned_rates(m, t, c, LR, STEPS, elementwise=False, first_order=True),
        "learned ones",
    ),
    "multi-step": Algorithm(
        quarter_way(FOMAML, objective=MultiStepLoss(20)),
        lambda m, t, c: reference.multi_step(m, t, c, LR, STEPS, WEIGHTS),
        "query loss as objective",
    ),
    "maml++": Algorithm(
        quarter_way(MAMLPlusPlus, multi_step_iterations=20, first_order_iterations=5),
        lambda m, t, c: reference.learned_rates(
            m, t, c, LR, STEPS, elementwise=False, first_order=False, weights=WEIGHTS
        ),
        FIRST,
    ),
    "maml++-annealing": Algorithm(
        quarter_way(MAMLPlusPlus, multi_step_iterations=20, first_order_iterations=6),
        lambda m, t, c: reference.learned_rates(
            m, t, c, LR, STEPS, elementwise=False, first_order=True, weights=WEIGHTS
        ),
        FIRST,
    ),
    "zero-head": head_row(ZeroHeadMAML, False),
    "zero-head-second": head_row(ZeroHeadMAML, False, first_order=False),
    "proto-maml": head_row(ProtoMAML, True),
    "proto-maml-second": head_row(ProtoMAML, True, first_order=False),
    "sign-maml-preset": replace(
        with_everything(SignMAML, reference.fomaml, None, {"optimizer": reference.SignSGD}, "plain SGD"),
        modules=signed,
    ),
    "anil-preset": Algorithm(
        lambda m, c: ANIL(m, LR, STEPS, c, head=head(m)),
        lambda m, t, c: reference.fomaml(m, t, c, rates(head(m)), STEPS),
    ),
    "boil-preset": Algorithm(
        lambda m, c: BOIL(m, LR, STEPS, c, head=head(m)),
        lambda m, t, c: reference.fomaml(m, t, c, rates(body(m)), STEPS),
        modules=lambda module: module != "twins",
    ),
    "imaml": Algorithm(
        lambda m, c: iMAML(m, LR, STEPS, c, strength=5.0, cg_steps=60),
        lambda m, t, c: reference.imaml(m, t, c, LR, STEPS, 5.0),
        "query loss as objective",
        {"layer-norm", "regression"}.__contains__,
    ),
    "imaml-damped": Algorithm(
        lambda m, c: iMAML(m, LR, STEPS, c, strength=2.0, cg_steps=60, damping=4.0),
        lambda m, t, c: reference.imaml(m, t, c, LR, STEPS, 2.0, damping=4.0),
        "query loss as objective",
        {"layer-norm", "regression"}.__contains__,
    ),
    "cavia": Algorithm(
        lambda m, c: CAVIA(m, LR, STEPS, c),
        lambda m, t, c: reference.cavia(m, t, c, LR, STEPS, "context"),
        "starts at the meta-parameters",
        {"context"}.__contains__,
    ),
    "cavia-second": Algorithm(
        lambda m, c: CAVIA(m, LR, STEPS, c, first_order=False),
        lambda m, t, c: reference.cavia(m, t, c, LR, STEPS, "context", first_order=False),
        FIRST,
        {"context"}.__contains__,
    ),
}

EXECUTIONS = {
    "loop": {"engine": "loop"},
    "batched": {"engine": "batched"},
    "batched-2": {"engine": "batched", "tasks_at_once": 2},
    "factored": {"engine": "factored"},
    "factored-2": {"engine": "factored", "tasks_at_once": 2},
}
# in chunks of tasks: every algorithm on a few modules, a few algorithms on every module
CHUNKED = ({"mlp", "conv4-strided", "user", "twins"}, {"fomaml", "maml", "reptile"})
CASES = [
    (algorithm, module, execution)
    for algorithm in ALGORITHMS
    for module in filter(ALGORITHMS[algorithm].modules, MODULES)
    for execution, options in EXECUTIONS.items()
    if "tasks_at_once" not in options or module in CHUNKED[0] or algorithm in CHUNKED[1]
]
EXACT = {("fomaml", "mlp"), ("fomaml", "conv4"), ("fomaml", "user")}


# --- the table ------------------------------------------------------------------------------------


@cache
def answer(algorithm, module, **sizes):
    model, tasks, criterion = example(module, **sizes)
    return reference.over_tasks(lambda m, t: ALGORITHMS[algorithm].slow(m, t, criterion), model, tasks)


def error(found: dict, expected: dict) -> float:
    """The largest difference of any entry, relative to the largest entry of all."""
    assert found.keys() == expected.keys()
    scale = max(e.abs().max().item() for e in expected.values())
    assert scale > 1e-6
    return max((found[n] - e).abs().max().item() for n, e in expected.items()) / scale


def assert_agrees(result, expected, tolerance=1e-10):
    assert error(result.gradients, expected.gradients) <= tolerance
    for name in ("query_losses", "support_losses", "query_outputs"):
        assert error({name: getattr(result, name)}, {name: getattr(expected, name)}) <= tolerance


@pytest.mark.parametrize(("algorithm", "module", "execution"), CASES)
def test_agrees_with_the_reference(algorithm, module, execution):
    row, options = ALGORITHMS[algorithm], EXECUTIONS[execution]
    model, tasks, criterion = example(module)
    learner = row.learner(model, criterion)
    refusal = row.factored or (linear_weights(learner) == [] and "no adapted nn.Linear weight")
    if module == "autoencoder" and not refusal and "encode.weight" in linear_weights(learner):
        refusal = "'encode.weight' is used outside of a linear layer"
    if options["engine"] == "factored" and refusal:
        with pytest.raises(InputError, match=refusal):
            meta_gradient(learner, tasks, **options)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = meta_gradient(learner, tasks, **options)
    assert_agrees(result, answer(algorithm, module), 1e-12 if (algorithm, module) in EXACT else 1e-10)
    assert result.engine == options["engine"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("algorithm", "module"), dict.fromkeys(case[:2] for case in CASES))
def test_backward_of_the_learner_gives_the_same(algorithm, module):
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    learner(tasks).backward()
    own = learner.meta_parameters()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in own.items()}
    assert error(found, answer(algorithm, module).gradients) <= 1e-10


def test_apply_to_sets_the_gradients_of_the_model():
    model, tasks, criterion = example("user")
    learner = FOMAML(model, LR, STEPS, criterion)
    result = meta_gradient(learner, tasks)
    result.apply_to(learner)
    expected = answer("fomaml", "user").gradients
    for name, parameter in model.named_parameters():
        if name == "frozen":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shots", [1, 2, 9])  # support rows × 2 layers' width below and above width²
@pytest.mark.parametrize("module", ["mlp", "twice", "attention", "deep"])
def test_factored_turns_changes_dense_where_they_are_large(module, shots, steps, monkeypatch):
    monkeypatch.setitem(MODULES, "deep", (partial(MLP, 16, 12, 12, 12, 4), (16,), F.cross_entropy))
    model, tasks, criterion = example(module, shots=shots)
    learner = FOMAML(model, LR, steps, criterion)
    expected = reference.over_tasks(
        lambda m, t: reference.fomaml(m, t, criterion, rates(reference.learned(m)), steps),
        model,
        tasks,
    )
    assert_agrees(meta_gradient(learner, tasks, engine="factored"), expected, 1e-12)


def test_the_change_of_a_layer_is_kept_as_factors_and_then_dense():
    """The case above does reach both: factors for few rows, dense when they would cost more."""
    torch.manual_seed(1)
    model = MLP(16, 12, 12, 4).double()
    kinds = {}
    for shots in (1, 9):
        tasks = draw((16,), F.cross_entropy, shots=shots)
        problem = factored_problem(FOMAML(model, LR, STEPS), tasks)
        path = problem.path()
        kinds[shots] = [len(next(path)[0].changes["3.weight"]) for _ in range(STEPS)]
    assert kinds == {1: [2, 1, 1], 9: [1, 1, 1]}


# --- the choice -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape", "shots", "expected", "compiled"),
    [
        (partial(Conv4, 4), (1, 28, 28), 1, "loop", "loop"),
        (partial(Conv4, 4, channels=8, image=(1, 16, 16)), (1, 16, 16), 1, "batched", "batched"),
        (partial(MLP, 784, 256, 4), (784,), 1, "factored", "factored"),
        (partial(MLP, 784, 256, 4), (784,), 100, "loop", "batched"),
        (partial(MLP, 1, 40, 40, 4), (1,), 20, "batched", "batched"),
        (
            partial(nn.TransformerEncoderLayer, 32, 2, 64, 0.0, batch_first=True),
            (40, 32),
            1,
            "batched",
            "batched",
        ),
        (partial(nn.LSTMCell, 6, 4), (6,), 1, "loop", "loop"),
        (partial(nn.Embedding, 6, 4, sparse=True), (), 1, "loop", "loop"),
    ],
)
def test_choose_names_the_engine_and_the_reason(build, shape, shots, expected, compiled):
    def criterion(outputs, targets):
        return (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean()

    learner = FOMAML(build().double(), LR, STEPS, criterion)
    tasks = draw(shape, F.cross_entropy, shots=shots)
    if isinstance(learner.model, nn.Embedding):
        tasks = tasks._replace(
            **{part: Examples(e.targets, e.targets) for part, e in tasks._asdict().items()}
        )
    assert choose(learner, tasks, compile=True)[0] == compiled
    name, reason = choose(learner, tasks)
    assert name == expected
    assert reason and "\n" not in reason


def test_auto_is_the_engine_of_choose():
    model, tasks, criterion = example("conv4")
    result = meta_gradient(FOMAML(model, LR, STEPS, criterion), tasks)
    assert result.engine == choose(FOMAML(model, LR, STEPS, criterion), tasks)[0] == "batched"
    assert_agrees(result, answer("fomaml", "conv4"), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "fast"}, "unknown engine 'fast'; there are: auto, loop, batched, factored"),
        ({"tasks_at_once": 0}, "tasks_at_once must be a whole number of 1 or more, got 0"),
    ],
)
def test_errors_of_meta_gradient_and_curve(options, message):
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, STEPS, criterion)
    for call in (meta_gradient, partial(curve, at_steps=[1])):
        with pytest.raises(InputError) as raised:
            call(learner, tasks, **options)
        assert str(raised.value) == message


def test_outputs_narrower_than_the_classes_are_an_input_error():
    _, tasks, _ = example("mlp")
    with pytest.raises(InputError, match="3"):
        meta_gradient(FOMAML(MLP(36, 12, 3).double(), LR, STEPS), tasks)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("engine", ["auto", "batched"])
@pytest.mark.parametrize("shape", [(36,), (1, 6, 6)], ids=["dense", "convolutions"])
def test_too_few_outputs_are_told_in_words(shape, engine, compile, recwarn):
    """Also where what a task costs is counted before it is computed."""
    convolutions = [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 3, 1), nn.Flatten()] if len(shape) > 1 else []
    model = nn.Sequential(nn.Flatten(), *convolutions, nn.Linear(108 if convolutions else 36, 3)).double()
    with pytest.raises(InputError, match="too narrow for 4 ways"):
        meta_gradient(
            FOMAML(model, LR, 1), draw(shape, F.cross_entropy, tasks=9), engine=engine, compile=compile
        )


def test_factored_refuses_a_model_without_adapted_linear_weights():
    model, tasks, criterion = example("conv4")
    with pytest.raises(InputError, match=r"no adapted nn\.Linear weight"):
        meta_gradient(FOMAML(model, LR, 1, criterion, adapted="body.*"), tasks, engine="factored")


# --- the curve ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
@pytest.mark.parametrize("module", MODULES)
def test_curve_equals_manual_adaptation(module, engine):
    model, tasks, criterion = example(module)
    if (module, engine) == ("autoencoder", "factored"):
        engine = "auto"  # which falls back
    learner = FOMAML(model, LR, 1, criterion)
    found = curve(learner, tasks, [0, 1, 3], engine=engine)
    for steps, (losses, outputs) in zip([0, 1, 3], found):
        assert not losses.requires_grad and not outputs.requires_grad
        for i in range(3):
            task = one(tasks, i)
            names = rates(reference.learned(model))
            adapted, _ = reference.adapt(model, task.support, criterion, names, steps)
            with torch.no_grad():
                expected = adapted(task.query.inputs)
                loss = criterion(expected, task.query.targets)
            torch.testing.assert_close(outputs[i], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(losses[i], loss, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_inductive_curve_gives_each_query_example_the_output_it_has_alone(engine):
    model, tasks, criterion = example("conv4")
    learner = FOMAML(model, LR, 1, criterion)
    alone = tasks._replace(query=Examples(*(t[:, 4:5] for t in tasks.query)))
    options = {"at_steps": [0, 2], "engine": engine}
    for steps in (0, 1):
        [all_of_them, one_of_them] = (
            curve(learner, t, statistics="support", **options)[steps][1] for t in (tasks, alone)
        )
        torch.testing.assert_close(all_of_them[:, 4:5], one_of_them, rtol=1e-10, atol=1e-10)
        transductive = curve(learner, tasks, **options)[steps][1]
        assert (transductive[:, 4:5] - one_of_them).abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
@pytest.mark.parametrize("module", ["conv4", "batch-norm"])
def test_curve_with_the_query_example_in_the_statistics(module, engine):
    model, tasks, criterion = example(module)
    learner = FOMAML(model, LR, 1, criterion)
    [_, (_, found)] = curve(learner, tasks, [0, 2], statistics="with-query", engine=engine)
    for i in range(len(found)):
        task = one(tasks, i)
        adapted, _ = reference.adapt(model, task.support, criterion, rates(reference.learned(model)), 2)
        with torch.no_grad():
            expected = [adapted(torch.cat([task.support.inputs, own[None]]))[-1] for own in task.query.inputs]
        torch.testing.assert_close(found[i], torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_unknown_statistics_are_refused():
    model, tasks, criterion = example("conv4")
    with pytest.raises(InputError, match=r"unknown statistics 'alone'; there are: own, support, with-query"):
        curve(FOMAML(model, LR, 1, criterion), tasks, [1], statistics="alone")


class Recurrent(nn.Module):
    """What vmap does not take."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.RNN(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, inputs):
        return self.head(self.cell(inputs.unflatten(-1, (2, 3)))[0][:, -1])


@pytest.mark.parametrize("statistics", ["own", "support"])
def test_curve_of_a_recurrent_model_takes_the_loop(statistics):
    torch.manual_seed(1)
    learner = FOMAML(Recurrent().double(), LR, 1)
    tasks = draw((6,), F.cross_entropy)
    [(_, expected)] = curve(learner, tasks, [1], engine="loop")
    [(_, found)] = curve(learner, tasks, [1], statistics=statistics)  # no BatchNorm: the same
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class Particular(nn.Module):
    """Raises what is no RuntimeError, under vmap only."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, inputs):
        if torch._C._functorch.is_batchedtensor(inputs):
            raise ValueError("not these")
        return self.head(inputs)


@pytest.mark.parametrize("engine", ["batched", "factored"])
@pytest.mark.parametrize(
    ("build", "reason"), [(Recurrent, "Batching rule not implemented"), (Particular, "not these")]
)
def test_an_engine_that_does_not_take_the_module_says_which_one_does(build, reason, engine):
    learner, tasks = FOMAML(build().double(), LR, 1), draw((6,), F.cross_entropy)
    message = rf"engine='{engine}' does not take this module, 'loop' does: {reason}"
    with pytest.raises(InputError, match=message) as raised:
        meta_gradient(learner, tasks, engine=engine)
    assert reason in str(raised.value.__cause__)
    with pytest.raises(InputError, match=message):
        curve(learner, tasks, [1], engine=engine)
    assert meta_gradient(learner, tasks).engine == "loop"


def test_an_error_of_the_module_itself_stays_as_it_is():
    class Wrong(Particular):
        def forward(self, inputs):
            raise KeyError("lost")

    for engine in ("loop", "batched", "factored", "auto"):
        with pytest.raises(KeyError, match="lost"):
            meta_gradient(FOMAML(Wrong().double(), LR, 1), draw((6,), F.cross_entropy), engine=engine)


def test_inductive_curve_refuses_a_native_batch_norm_that_would_see_the_query_set():
    model, tasks, criterion = example("batch-norm")
    with pytest.raises(InputError, match=r"'1'.*convert_batch_norm"):
        curve(FOMAML(model, LR, 1, criterion), tasks, [1], statistics="support")


# --- exactness against something that is no autograd ------------------------------------------------


@pytest.mark.parametrize("execution", ["loop", "batched", "batched-2"])
@pytest.mark.parametrize("inner", [{}, MOMENTUM, NESTEROV, DECAY], ids=str)
def test_second_order_equals_central_differences(inner, execution):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()).double()
    tasks = draw((3,), F.cross_entropy, tasks=3, ways=3)
    learner = MAML(model, 0.3, 3, optimizer=SGD(**inner))
    result = meta_gradient(learner, tasks, **EXECUTIONS[execution])
    names = rates(reference.learned(model), 0.3)
    optimizer = partial(torch.optim.SGD, **inner)

    def meta_loss():
        total = 0.0
        for i in range(3):
            task = one(tasks, i)
            adapted, _ = reference.adapt(model, task.support, F.cross_entropy, names, 3, optimizer=optimizer)
            total += F.cross_entropy(adapted(task.query.inputs), task.query.targets).item()
        return total / 3

    width = 1e-5
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1)
        for i in range(0, len(flat), 3):
            centre = flat[i].item()
            sides = []
            for value in (centre + width, centre - width):
                flat[i] = value
                sides.append(meta_loss())
            flat[i] = centre
            difference = (sides[0] - sides[1]) / (2 * width)
            found = result.gradients[name].view(-1)[i].item()
            assert found == pytest.approx(difference, rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("execution", ["loop", "batched"])
@pytest.mark.parametrize("elementwise", [True, False])
def test_learned_rates_equal_central_differences(elementwise, execution):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    tasks = draw((3,), F.cross_entropy, ways=3)
    kind = "elementwise" if elementwise else "per-step"
    learner = MAML(model, 0.3, 2, learn_rates=kind)
    result = meta_gradient(learner, tasks, **EXECUTIONS[execution])
    width = 1e-5
    for name, rate in learner.inner_lr.learned().items():
        flat = rate.detach().view(-1)
        for i in range(len(flat)):
            sides = []
            for shift in (width, -2 * width):
                flat[i] += shift
                sides.append(
                    meta_gradient(learner, tasks, **EXECUTIONS[execution]).query_losses.mean().item()
                )
            flat[i] += width
            found = result.gradients[f"inner_lr.{name}"].view(-1)[i].item()
            assert found == pytest.approx((sides[0] - sides[1]) / (2 * width), rel=1e-7, abs=1e-9), (name, i)


@pytest.mark.parametrize("preset", [FOMAML, MAML, ANIL, BOIL, MetaSGD, SignMAML])
def test_without_a_step_the_meta_gradient_is_the_plain_query_gradient(preset):
    model, tasks, criterion = example("conv4-strided")
    learner = preset(model, 0.0, 2, criterion)
    total = (
        sum(criterion(model(one(tasks, i).query.inputs), one(tasks, i).query.targets) for i in range(3)) / 3
    )
    expected = reference.gradients(total, reference.learned(model))
    for engine in ("loop", "batched"):
        found = meta_gradient(learner, tasks, engine=engine).gradients
        assert error({n: found[n] for n in expected}, expected) <= 1e-12


def test_the_meta_gradient_of_reptile_is_the_mean_displacement():
    model, tasks, criterion = example("mlp")
    learner = Reptile(model, LR, STEPS, criterion)
    found = meta_gradient(learner, tasks).gradients
    for name, parameter in model.named_parameters():
        ends = [learner.adapt(one(tasks, i).support).get_parameter(name) for i in range(3)]
        torch.testing.assert_close(found[name], parameter - sum(ends) / 3, rtol=0, atol=1e-14)


def test_first_order_is_not_second_order():
    """What tells the two apart in the table is far above its tolerance."""
    first, second = (answer(name, "mlp").gradients for name in ("fomaml", "maml"))
    assert error(first, second) > 1e-2


# --- memory ---------------------------------------------------------------------------------------


def live_bytes(compute) -> int:
    """How many bytes the graph of the result of `compute` keeps for its backward pass."""
    live = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live
            self.tensor = tensor
            live += tensor.nbytes

        def __del__(self):
            nonlocal live
            live -= self.tensor.nbytes

    with saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        result = compute()
    assert result.requires_grad  # and with it its graph, until here
    return live


def saved(preset, engine, steps, module="mlp", **choices):
    model, tasks, criterion = example(module)
    learner = preset(model, 0.01, steps, criterion, **choices)
    stacked = engine == "batched"
    return live_bytes(
        lambda: (
            learner.objective(Problem(learner, tasks if stacked else one(tasks, 0), stacked=stacked)).scalar
        )
    )


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("preset", [FOMAML, Reptile])
@pytest.mark.parametrize("module", ["mlp", "conv4", "user"])
@pytest.mark.parametrize("inner", [SGD(), SGD(momentum=0.9), Adam()], ids=["sgd", "momentum", "adam"])
def test_first_order_keeps_no_inner_graph(engine, preset, module, inner):
    sizes = {s: saved(preset, engine, s, module, optimizer=inner) for s in (1, 10)}
    assert 0 < sizes[10] <= 1.05 * sizes[1]


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_second_order_does_and_the_measure_sees_it(engine):
    assert saved(MAML, engine, 10) > 5 * saved(MAML, engine, 1)
    assert saved(MAML, engine, 1) > 1.5 * saved(FOMAML, engine, 1)


def test_factored_keeps_one_forward_pass_and_the_factors():
    """The saved bytes grow by less than the query's own part: the factors, never whole weights."""
    torch.manual_seed(1)
    model = MLP(256, 256, 4)
    tasks = draw((256,), F.cross_entropy, shots=1).to(dtype=torch.float32)

    def kept(steps):
        learner = FOMAML(model, 0.01, steps)
        problem = factored_problem(learner, tasks)
        return live_bytes(lambda: learner.objective(problem).scalar)

    one_weight = 256 * 256 * 4
    assert kept(5) - kept(1) < 3 * one_weight  # below one built weight per task
