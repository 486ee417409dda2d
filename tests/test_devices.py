"""On a device that is not the CPU, see elsewhere.py: the numbers of the CPU, no float64, no two devices in one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elsewhere import Elsewhere
from family import ALGORITHMS
from fomaml.baselines import fine_tune, fit_estimator, nearest_centroid, pretrain, unadapted
from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.engines import meta_gradient
from fomaml.episodes import Episodes
from fomaml.evaluate import estimate, evaluate
from fomaml.group_episodes import GroupEpisodes
from fomaml.learning.algorithms import FOMAML
from fomaml.serve.calibration import calibration_error, fit_temperature
from fomaml.tasks import Examples, Task
from fomaml.train import train

INPUTS = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6).repeat_interleave(8)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3))


def classes(device, **more) -> Episodes:
    own = {"ways": 3, "shots": 1, "query_shots": 2, **more}
    return Episodes(ClassSource(INPUTS, LABELS).to(device), **own)


class Lines:
    """Tasks of regression. copies, ways: see `TaskSequence`."""

    ways, copies = None, 1

    def __init__(self, device):
        self.device = device

    def batch(self, start: int, tasks: int) -> Task:
        random = torch.Generator().manual_seed(start)
        slopes = torch.randn(tasks, 1, 1, generator=random)
        inputs = [torch.randn(tasks, 5, 1, generator=random) for _ in range(2)]
        return Task(*(Examples(own, slopes * own + 0.1) for own in inputs)).to(self.device)


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def trained(device, algorithm: str = "fomaml", engine: str = "auto", **more):
    learner = ALGORITHMS[algorithm].learner(network(), F.cross_entropy).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    episodes = classes(device, turns=True, jitter=0.1)
    records = train(
        learner, episodes, optimizer, iterations=2, meta_batch_size=3, engine=engine, clip=1.0, **more
    )
    found = [(record.meta_loss.cpu(), record.before, record.after) for record in records]
    return found, {name: value.cpu() for name, value in learner.state_dict().items()}


def evaluated(device, episodes=classes, model=network, **more):
    criterion = F.mse_loss if model is line else None
    learner = FOMAML(model().to(device), 0.1, 2, criterion)
    found = evaluate(learner, episodes(device), tasks=4, at_steps=[0, 2], **more)
    return found, [tuple(estimate(scores)) for scores in found.values() if not isinstance(scores, dict)]


def of_function(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def served(device):
    learner = FOMAML(network().to(device), 0.1, 2)
    task = classes(device)[0]
    logits = learner.adapt(task.support)(task.query.inputs).detach()
    labels = task.query.targets
    return logits.cpu(), fit_temperature(logits, labels), calibration_error(logits.softmax(1), labels)


def pretrained(device):
    model = pretrain(network().to(device), classes(device), iterations=2, batch_size=9)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def tuned(device):
    found = fine_tune(
        network().to(device), classes(device), classes(device), tasks=2, tuning_tasks=2, at_steps=(1, 2)
    )
    return found.scores, found.inner_lr, found.steps


def unequal(device):
    """Tasks of two shapes, with a gradient in parts."""
    tasks = [classes(device, shots=shots)[0] for shots in (1, 2, 1)]
    learner = FOMAML(network().to(device), 0.1, 2, inner_accumulate=2)
    found = meta_gradient(learner, tasks)
    return {n: g.cpu() for n, g in found.gradients.items()}, found.query_losses.cpu()


def grouped(device):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 2, generator=random)
    source = GroupSource(rows, rows.sum(1, keepdim=True), torch.arange(30) % 5)
    episodes = GroupEpisodes(source, shots=2, query_shots=2, device=device)
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 0.1)
    nn.init.zeros_(model.bias)
    return evaluate(FOMAML(model.to(device), 0.1, 2, F.mse_loss), episodes, tasks=4, metric=["rmse", "loss"])


SITUATIONS = {
    **{
        f"training, {algorithm} on {engine}": lambda device, a=algorithm, e=engine: trained(device, a, e)
        for algorithm in ("fomaml", "maml", "reptile", "meta-sgd", "proto-maml", "zero-head", "fomaml-adam")
        for engine in ("loop", "batched")
    },
    "training, factored": lambda device: trained(device, engine="factored"),
    "training, weighted tasks": lambda device: trained(device, task_weights=lambda task: 2.0),
    "evaluation by names": lambda device: evaluated(
        device, metric=["accuracy", "loss", "balanced-accuracy", "f1", "auprc", of_function]
    ),
    "evaluation, balanced": lambda device: evaluated(device, balanced=True),
    "evaluation of copies": lambda device: evaluated(
        device, lambda d: classes(d, jitter=0.1, copies=2), engine="batched"
    ),
    "evaluation of numbers": lambda device: evaluated(
        device, Lines, line, metric=["loss", "mse", "rmse", "mae", "r2", "psnr"]
    ),
    "the nearest centroid": lambda device: nearest_centroid(classes(device), tasks=3),
    "no adaptation": lambda device: unadapted(network().to(device), classes(device), tasks=3),
    "fine-tuning": tuned,
    "pretraining": pretrained,
    "an adapted model and its temperature": served,
    "an estimator for each task": lambda device: fit_estimator("nearest", classes(device), tasks=3),
    "groups of rows": grouped,
    "tasks of unequal sizes": unequal,
}


def same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.device.type == "cpu" and type(found) is torch.Tensor
        torch.testing.assert_close(found, expected, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            same(one, other)
    else:
        assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_device_without_float64_gives_what_the_cpu_gives(situation):
    expected = SITUATIONS[situation](torch.device("cpu"))
    with Elsewhere() as machine:
        found = SITUATIONS[situation](machine.device)
    same(found, expected)


def test_what_fails_on_a_device_fails_on_the_one_that_is_played():
    with Elsewhere() as machine:
        there = torch.ones(2).to(machine.device)
        with pytest.raises(TypeError, match="has no"):
            there.double()
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)
        assert (there + 1).cpu().tolist() == [2.0, 2.0]
        assert machine.waits == {"copy to the CPU": 1} and machine.copies == {"copy": 1}
        assert there.sum().item() == 2 and there[there > 0].shape == (2,)
        assert machine.waits["_local_scalar_dense"] and machine.waits["index by a mask"]
