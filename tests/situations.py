"""Situations that are refused or warned of, for the table of `refusals.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fomaml import FOMAML, ClassSource, Episodes, Examples, FastModel, Task, evaluate, meta_gradient, train
from fomaml.checkpoint import save_weights
from fomaml.errors import InputError


def classifier(outputs=4):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def tasks(number=2, examples=8, dtype=torch.float32):
    torch.manual_seed(0)
    labels = (torch.arange(examples) % 4).expand(number, -1)
    return Task(*(Examples(torch.randn(number, examples, 6).to(dtype), labels) for _ in range(2)))


def numbers(shape):
    torch.manual_seed(0)
    return Task(*(Examples(torch.randn(2, 8, 6), torch.randn(2, *shape)) for _ in range(2)))


def gradient(model=None, given=None, engine="auto", **choices):
    given = tasks() if given is None else given
    return meta_gradient(FOMAML(model or classifier(), 0.1, 2, **choices), given, engine=engine)


def evaluated(model=None, given=None, metric=None, balanced=False, **choices):
    learner = FOMAML(model or classifier(), 0.1, 2, **choices)
    return evaluate(learner, Given(given), tasks=2, at_steps=[2], metric=metric, balanced=balanced)


def relabelled(label, everywhere=False):
    """Tasks whose last query label, or all of them, is another."""
    given = tasks()
    targets = given.query.targets.clone()
    targets[:, slice(None) if everywhere else -1] = label
    return given._replace(query=Examples(given.query.inputs, targets))


def labelled(form):
    """Tasks whose labels have another form."""
    return Task(*(Examples(inputs, form(targets)) for inputs, targets in tasks()))


class Given:
    """Episodes of given tasks."""

    def __init__(self, given=None):
        self.given = given or tasks(8)

    def batch(self, start, number):
        return self.given.map(lambda tensor: tensor[torch.arange(start, start + number) % len(tensor)])


def trained(learner=None, episodes=None, optimizer=None, iterations=2, **options):
    learner = learner or FOMAML(classifier(), 0.1, 2)
    episodes = Given() if episodes is None else episodes
    optimizer = optimizer or torch.optim.SGD(learner.parameters(), lr=0.1)
    records = train(learner, episodes, optimizer, iterations=iterations, meta_batch_size=2, **options)
    return [record.iteration for record in records]


def hooked(what="parameter"):
    model = classifier()
    if what == "layer":
        model[0].register_full_backward_hook(lambda layer, into, out: None)
    else:
        model[0].weight.register_hook(lambda slope: slope / 2)
    return model


class Late(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, inputs):
        if not hasattr(self, "body"):
            self.body = nn.Linear(inputs.shape[1], 8)
        return self.head(self.body(inputs))


class Delegating(nn.Module):
    def __init__(self):
        super().__init__()
        object.__setattr__(self, "own", classifier())

    def named_parameters(self, *arguments, **choices):
        return self.own.named_parameters(*arguments, **choices)

    def forward(self, inputs):
        return self.own(inputs)


class Reentrant(nn.Sequential):
    def __init__(self):
        super().__init__(*classifier())

    def forward(self, inputs):
        return checkpoint(super().forward, inputs.requires_grad_(), use_reentrant=True)


class Elsewhere(nn.Module):
    """Calls its layer, or reads its parameters, by an object of its own."""

    class Box:
        pass

    def __init__(self, read=False):
        super().__init__()
        self.layer, self.box, self.read = nn.Linear(6, 4), self.Box(), read
        self.box.layer, self.box.weight = self.layer, self.layer.weight

    def forward(self, inputs):
        return F.linear(inputs, self.box.weight) if self.read else self.box.layer(inputs)


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = classifier()

    def forward(self, inputs):
        return self.body(inputs), inputs


class PerTensor:
    """An inner optimiser that looks at a whole tensor."""

    second_order, carried = True, False

    def direction(self, slope, parameter, state, step):
        return slope / slope.norm()


class Carried(PerTensor):
    carried, elementwise = True, False


def thawed():
    model = classifier()
    model[0].weight.requires_grad_(False)
    learner = FOMAML(model, 0.1, 2)
    model[0].weight.requires_grad_(True)
    return meta_gradient(learner, tasks())


def frozen_later():
    learner = FOMAML(classifier(), 0.1, 2)
    learner.model[0].weight.requires_grad_(False)
    return meta_gradient(learner, tasks())


def replaced():
    learner = FOMAML(classifier(), 0.1, 2)
    learner.model[2] = nn.Sequential(nn.Linear(8, 4))
    return meta_gradient(learner, tasks())


def others():
    return trained(optimizer=torch.optim.SGD(classifier().parameters(), lr=0.1))


def beyond():
    learner = FOMAML(classifier(), 0.1, 2)
    return trained(
        learner, optimizer=torch.optim.SGD([*learner.parameters(), nn.Parameter(torch.ones(3))], lr=0.1)
    )


class Detached(nn.Sequential):
    def __init__(self):
        super().__init__(*classifier())

    def forward(self, inputs):
        return super().forward(inputs).detach()


def astray():
    model = classifier()
    fast = FastModel(model)
    for _ in range(2):
        fast.step(model(torch.ones(1, 6)).sum(), 0.1)


def partly():
    learner = FOMAML(classifier(), 0.1, 2, learn_rates="elementwise")
    return trained(learner, optimizer=torch.optim.SGD(learner.model.parameters(), lr=0.1))


def unmoved():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    return FOMAML(model.eval(), 0.1, 2)


def spoiled_model():
    model = classifier()
    nn.init.constant_(model[0].bias, float("nan"))
    return model


def cosine_of_torch():
    optimizer = torch.optim.SGD(classifier().parameters(), lr=0.1)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


class Few(Given):
    def batch(self, start, number):
        return super().batch(start, 1)


def spoiled(number=float("nan")):
    given = tasks(8)
    given.query.inputs[2, 0] = number
    return Given(given)


def not_iterated():
    learner = FOMAML(classifier(), 0.1, 2)
    train(learner, Given(), torch.optim.SGD(learner.parameters(), lr=0.1), iterations=1, meta_batch_size=2)


def lbfgs():
    learner = FOMAML(classifier(), 0.1, 2)
    return trained(learner, optimizer=torch.optim.LBFGS(learner.parameters()))


def fused_over_gaps():
    model = classifier()
    first = next(model.parameters())
    first.data = first.repeat(1, 2)[:, : first.shape[1]]
    learner = FOMAML(model, 0.1, 2)
    return trained(learner, optimizer=torch.optim.SGD(learner.parameters(), lr=0.1, fused=True))


def loader():
    given = tasks(8)
    return DataLoader([given.map(lambda tensor, i=index: tensor[i]) for index in range(8)], batch_size=2)


def batches_of_numbers():
    torch.manual_seed(0)
    return Task(*(Examples(torch.randn(4, 5, 6), torch.randn(4, 5, 1)) for _ in range(2)))


def sums():
    return FOMAML(nn.Linear(6, 1), 0.1, 1, F.mse_loss)


def one_task():
    return tasks().map(lambda tensor: tensor[0])


def emptied(part):
    given = tasks()
    return given._replace(**{part: Examples(*(tensor[:, :0] for tensor in getattr(given, part)))})


def unlike():
    given = tasks()
    return given._replace(query=Examples(given.query.inputs, given.query.targets[:, :5]))


def dataset(last):
    return ClassSource.from_dataset([(torch.zeros(6), 0), (torch.ones(6), 1), last])


def to_a_folder():
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_weights(Path(folder), classifier())
        except InputError as error:
            raise InputError(str(error).replace(folder, "runs")) from error


def halved():
    source = ClassSource(torch.ones(8, 6), torch.arange(8) // 4)
    return Episodes(source, ways=2, shots=2, query_shots=2, augment=lambda inputs, random: inputs[::2])[0]
