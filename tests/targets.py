"""Tasks of targets of many kinds: labels, some of them ignored, probabilities, numbers, truths."""

import torch
from torch import nn

from fomaml.learning.algorithms import FOMAML
from fomaml.tasks import Examples, Task

TASKS, STEPS, LR = 5, 2, 0.1
MAP = (2, 5, 5)  # inputs of a map; of as many pixels a side as classes no axis is taken for another unseen


class Drawn:
    """Tasks of inputs (6, *shape) each set, and of targets that `draw(generator, shape of the outputs)` draws."""

    def __init__(self, model, shape, draw):
        random = torch.Generator().manual_seed(0)
        parts = []
        for _ in range(2):
            inputs = torch.randn(TASKS, 6, *shape, generator=random).double()
            with torch.no_grad():
                outputs = torch.stack([model(each) for each in inputs])
            parts.append(Examples(inputs, draw(random, outputs.shape)))
        self.tasks = Task(*parts)

    def batch(self, start, tasks):
        rows = torch.arange(start, start + tasks) % TASKS
        return self.tasks.map(lambda tensor: tensor[rows])


def labels(random, shape, low=0, high=None):
    """Of the shape of the outputs without their axis of classes, 2 of a stack."""
    return torch.randint(low, high or shape[2], shape[:2] + shape[3:], generator=random)


def some_ignored(random, shape, ignored=-100):
    found = labels(random, shape)
    return found.masked_fill(torch.rand(found.shape, generator=random) < 0.3, ignored)


def probabilities(random, shape):
    return torch.rand(shape, generator=random).double().softmax(2)


def numbers(random, shape):
    return torch.randn(shape, generator=random).double()


def counts(random, shape):
    return torch.randint(0, 5, shape, generator=random)


def truths(random, shape):
    return torch.randint(0, 2, shape, generator=random)


def floating_truths(random, shape):
    return truths(random, shape).double()


def all_ignored(random, shape):
    found = labels(random, shape)
    found[3] = -100
    return found


def flat(outputs):
    return lambda: nn.Linear(4, outputs)


def pixels(classes):
    return lambda: nn.Conv2d(2, classes, 3, padding=1)


def situation(row):
    torch.manual_seed(0)
    model = row.model().double()
    return FOMAML(model, LR, STEPS, row.criterion), Drawn(model, row.shape, row.draw)
