"""Episodes and regression tasks from a few numbers, and a digest of them that another process can print."""

import hashlib

import torch

from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import Episodes, RegressionEpisodes

COUNTS = [5, 7, 20, 5]  # the first and the last are drawn whole by 2 shots + 3 query examples
SIZES = {"ways": 3, "shots": 2, "query_shots": 3}


def source(counts=COUNTS):
    """Inputs (examples, 2): the class and the row within it."""
    inputs = [[label, row] for label, count in enumerate(counts) for row in range(count)]
    return ClassSource(torch.tensor(inputs), torch.tensor(inputs)[:, 0])


def episodes(seed=0, **sizes):
    return Episodes(source(), **(SIZES | sizes), seed=seed)


def moved(inputs, random):
    """Each number moved by a random whole one."""
    return inputs + torch.from_numpy(random.integers(1000, size=tuple(inputs.shape)))


def moved_together(task, random):
    """All numbers of a task moved by the same."""
    shift = int(random.integers(1_000_000))
    return task._replace(
        support=task.support._replace(inputs=task.support.inputs + shift),
        query=task.query._replace(inputs=task.query.inputs + shift),
    )


def augmented(seed=0, **sizes):
    return episodes(seed, augment=moved, augment_task=moved_together, **sizes)


def regression(seed=0, **sizes):
    return RegressionEpisodes(Sinusoids(), **({"shots": 5, "query_shots": 7} | sizes), seed=seed)


def digest() -> str:
    """Of 20 tasks of each kind."""
    found = hashlib.sha256()
    for own in (episodes(seed=5), augmented(seed=5), regression(seed=5)):
        for part in own.batch(100, 20):
            for tensor in part:
                found.update(tensor.numpy().tobytes())
    return found.hexdigest()
