"""Small tasks for estimators, and the estimators of scikit-learn used directly."""

import importlib

import numpy as np

from fomaml import GroupEpisodes, GroupSource
from fomaml.baselines import ESTIMATORS
from tables import uneven

TABLE = uneven(least=6)
TRAIN, TEST = [f"machine {n}" for n in range(4)], ["machine 4", "machine 5"]


def column(kind):
    return TABLE["value" if kind == "regression" else "label"]


def sources(kind):
    """The training and test groups, unscaled; the targets depend on the inputs and on the group."""
    source = GroupSource(features(), column(kind), TABLE["key"])
    return source.select(TRAIN), source.select(TEST)


def features():
    """Inputs in no order of magnitude of their own."""
    return np.stack([TABLE["x"][:, 0] / 50, TABLE["x"][:, 1]], 1)


def drawn(kind, **facts):
    facts = {"shots": 2, "query_shots": 3, "seed": 5, **facts}
    return GroupEpisodes(sources(kind)[1], **facts)


def arrays(examples, kind):
    inputs, targets = examples.inputs.double().numpy(), examples.targets.numpy()
    return inputs, targets.astype(np.float64)[:, 0] if kind == "regression" else targets


def score(kind, model, task):
    inputs, targets = arrays(task.query, kind)
    predicted = model.predict(inputs)
    return np.mean((predicted - targets) ** 2) if kind == "regression" else np.mean(predicted == targets)


def make(name, kind):
    entry = ESTIMATORS[name]
    module, _, attribute = (entry.regressor if kind == "regression" else entry.classifier).partition(":")
    return getattr(importlib.import_module(f"sklearn.{module}"), attribute)(**entry.options)


class Given:
    """These tasks; as many more as are asked for are the same again."""

    def __init__(self, *tasks):
        self.tasks = tasks

    def batch(self, start, tasks):
        return [self.tasks[number % len(self.tasks)] for number in range(start, start + tasks)]
