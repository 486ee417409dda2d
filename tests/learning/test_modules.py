"""Every kind of module adapts as a copy of it does under `torch.optim`: the plain loop that a user would write."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning.adapt import SGD, Adam
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.tasks import Examples, Task, one

TASKS, EXAMPLES, STEPS = 3, 8, 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(6, 8, dtype=torch.complex128) / 3)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs):
        return self.head((inputs.to(self.turn.dtype) @ self.turn).abs().tanh())


class Recurrent(nn.Module):
    def __init__(self, cell, **choices):
        super().__init__()
        self.cell = cell(3, 5, batch_first=True, **choices)
        self.head = nn.Linear(10 if choices.get("bidirectional") else 5, 4)

    def forward(self, inputs):
        return self.head(self.cell(inputs.unflatten(-1, (2, 3)))[0][:, -1])


class Masked(nn.Module):
    """A parametrisation of one's own, with a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, 1))
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1]))

    def forward(self, weight):
        return weight * self.mask * self.scale


def parametrised():
    model = dense()
    parametrize.register_parametrization(model[0], "weight", Masked())
    return model


class LowRank(nn.Module):
    """A frozen layer with a change of low rank beside it (LoRA, Hu et al. 2022)."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / 3)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, inputs):
        return self.layer(inputs) + inputs @ self.down.T @ self.up.T


class Words(nn.Module):
    def __init__(self, **choices):
        super().__init__()
        self.table = nn.Embedding(9, 5, **choices)
        self.head = nn.Linear(5, 4)

    def forward(self, inputs):
        return self.head(self.table((inputs.abs() * 4).long().clamp(max=8)).mean(1))


class Bag(Words):
    def __init__(self, **choices):
        super().__init__()
        self.table = nn.EmbeddingBag(9, 5, **choices)

    def forward(self, inputs):
        return self.head(self.table((inputs.abs() * 4).long().clamp(max=8)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(6, 6)
        self.again = self.into
        self.layers = nn.ModuleList([self.into, nn.Tanh(), self.into])
        self.head = nn.Linear(6, 4)

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return self.head(self.again(inputs).tanh())


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 8) / 3, torch.randn(8, 4) / 3])
        self.biases = nn.ParameterDict({"first": torch.zeros(8), "second": torch.zeros(4)})

    def forward(self, inputs):
        hidden = (inputs @ self.weights[0] + self.biases["first"]).tanh()
        return hidden @ self.weights[1] + self.biases["second"]


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.temperature = dense(), nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs):
        return self.body(inputs) * self.temperature


class Half(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8, dtype=torch.float64), nn.Linear(8, 4, dtype=torch.float32)

    def forward(self, inputs):
        return self.head(self.into(inputs).tanh().float()).double()


def dense(into=None):
    return nn.Sequential(into or nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


MODULES = {
    "dense": dense,
    "complex": Complex,
    "lstm": lambda: Recurrent(nn.LSTM),
    "lstm of two layers and ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru": lambda: Recurrent(nn.GRU, num_layers=2),
    "rnn": lambda: Recurrent(nn.RNN),
    "weight norm": lambda: dense(parametrizations.weight_norm(nn.Linear(6, 8))),
    "old weight norm": lambda: dense(nn.utils.weight_norm(nn.Linear(6, 8))),
    "spectral norm": lambda: dense(parametrizations.spectral_norm(nn.Linear(6, 8))),
    "old spectral norm": lambda: dense(nn.utils.spectral_norm(nn.Linear(6, 8))),
    "orthogonal": lambda: dense(parametrizations.orthogonal(nn.Linear(6, 8))),
    "own parametrisation": parametrised,
    "low rank": lambda: dense(LowRank(nn.Linear(6, 8))),
    "embedding": Words,
    "padded embedding": lambda: Words(padding_idx=3),
    "sparse embedding": lambda: Words(sparse=True),
    "bag": lambda: Bag(mode="mean"),
    "shared": Shared,
    "lists": Lists,
    "scalar": Scalar,
    "two dtypes": Half,
    "group norm": lambda: dense(nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(4, 8))),
    "native batch norm": lambda: dense(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))),
    "prelu": lambda: dense(nn.Sequential(nn.Linear(6, 8), nn.PReLU(8))),
}
OPTIMIZERS = {
    "sgd": (SGD(), lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (SGD(momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (SGD(0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "decay": (SGD(weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)),
    "adam": (Adam(), lambda p: torch.optim.Adam(p, 0.1)),
    "adam, decay": (Adam(weight_decay=0.1), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1)),
    "adamw": (
        Adam(weight_decay=0.1, decoupled=True),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    ),
}
# torch's sparse gradients go with SGD alone
EXEMPT = {("sparse embedding", name) for name in OPTIMIZERS if name != "sgd"}
LOOP_ALONE = {
    "lstm",
    "lstm of two layers and ways",
    "gru",
    "rnn",
    "spectral norm",
    "old spectral norm",
    "sparse embedding",
}


def drawn():
    labels = (torch.arange(EXAMPLES) % 4).expand(TASKS, -1)
    return Task(*(Examples(torch.randn(TASKS, EXAMPLES, 6).double(), labels) for _ in range(2)))


def made(module):
    return MODULES[module]() if module == "two dtypes" else MODULES[module]().double()


def plain(module, state, tasks, optimizer, evaluating=False):
    """FOMAML as its textbook writes it: a copy, an optimiser, the gradient of the query loss where it ends.

    evaluating: all but batch norms in evaluation mode.
    """
    total: dict = {}
    outputs, copies = [], []
    for index in range(TASKS):
        task, own = one(tasks, index), made(module)  # not a copy, which old weight norm cannot have
        own.load_state_dict(state)
        for part in own.modules() if evaluating else ():
            part.training = isinstance(part, nn.BatchNorm1d)
        learned = {name: p for name, p in own.named_parameters() if p.requires_grad}
        inner = optimizer(list(learned.values()))
        for _ in range(STEPS):
            inner.zero_grad()
            F.cross_entropy(own(task.support.inputs), task.support.targets).backward()
            inner.step()
        copies.append(copy.deepcopy(own.state_dict()))
        inner.zero_grad()
        outputs.append(own(task.query.inputs))
        F.cross_entropy(outputs[-1], task.query.targets).backward()
        for name, p in learned.items():
            total[name] = total.get(name, 0) + p.grad.to_dense() / TASKS
    return total, torch.stack(outputs).detach(), copies


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("module", MODULES)
def test_it_adapts_as_a_copy_does(module, optimizer):
    if (module, optimizer) in EXEMPT:
        pytest.skip("torch's optimiser means something else")
    model, tasks = made(module), drawn()
    ours, theirs = OPTIMIZERS[optimizer]
    expected, outputs, _ = plain(module, model.state_dict(), tasks, theirs)
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if module != "two dtypes" else {"rtol": 1e-3, "atol": 1e-5}
    learner = FOMAML(model, 0.1, STEPS, optimizer=ours)
    for engine in ("loop", "batched"):
        if engine == "batched" and module in LOOP_ALONE:
            with pytest.raises(InputError, match="'loop' does"):
                meta_gradient(learner, tasks, engine=engine)
            continue
        found = meta_gradient(learner, tasks, engine=engine)
        for name, gradient in expected.items():
            torch.testing.assert_close(found.gradients[name].to_dense(), gradient, **tolerance)
        torch.testing.assert_close(found.query_outputs, outputs, **tolerance)
    _, _, copies = plain(module, model.state_dict(), tasks, theirs, evaluating=True)
    adapted = learner.adapt(one(tasks, 0).support).state_dict()
    for name, tensor in copies[0].items():
        torch.testing.assert_close(adapted[name], tensor, **tolerance)


@pytest.mark.parametrize("module", MODULES)
def test_an_adapted_module_comes_back(module, tmp_path):
    """Its state, through a file, in a module that was made anew."""
    model, tasks = made(module), drawn()
    own = FOMAML(model, 0.1, STEPS).adapt(one(tasks, 0).support).eval()
    torch.save(own.state_dict(), tmp_path / "weights")
    again = made(module)
    again.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    inputs = tasks.query.inputs[0]
    torch.testing.assert_close(again.eval()(inputs), own(inputs), rtol=0, atol=0)
    assert not any(tensor.requires_grad for tensor in own.state_dict().values())


# embedding_bag has no double backward; spectral norm in training has a state that autograd does not see, and torch
# gives a padding no gradient; the slope of torch's orthogonal map is not its derivative already in first order
FIRST_ALONE = {
    "bag", "spectral norm", "old spectral norm", "padded embedding", "sparse embedding", "orthogonal", "two dtypes",
}  # fmt: skip


@pytest.mark.parametrize("module", [name for name in MODULES if name not in FIRST_ALONE])
def test_second_order_is_the_derivative(module):
    """As finite differences of the query loss after the inner steps see it, in both engines."""
    model, tasks = made(module), drawn()
    learner = MAML(model, 0.1, 2)
    names = list(learner.meta_parameters())
    assert torch.autograd.gradcheck(lambda *_: learner(tasks), list(learner.parameters()), fast_mode=True)
    learner(tasks).backward()
    for engine in ("loop",) if module in LOOP_ALONE else ("loop", "batched"):
        found = meta_gradient(learner, tasks, engine=engine).gradients
        for name in names:
            torch.testing.assert_close(
                found[name], learner.meta_parameters()[name].grad, rtol=1e-8, atol=1e-10
            )
