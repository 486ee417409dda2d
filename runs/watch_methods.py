"""What runs/watch.py compares: a network and what is trained of it, the learners, the baselines, their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from watch_tasks import EXERCISES, Recordings, TrainingTasks, UnseenTasks, Variation, confusions, features

import fomaml
from fomaml.tasks import one
from fomaml.train import cosine

STEPS = (5, 10, 20, 40)
LEARNER, TUNED = "meta-learned", "pooled, fine-tuned"
# As large as helped learners on subjects 3 to 10; the pooled network may take it or leave it.
VARIED = Variation(mixed=True, turn=15, turn_each=10, gain=0.2, stretch=0.2)


class Net(nn.Module):
    """Three strided convolutions of 64 channels over time, each with GroupNorm and ReLU; the mean over time; a head."""

    def __init__(self, channels: int = 64):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, kernel, stride in ((6, 9, 4), (channels, 5, 2), (channels, 5, 2)):
            layers += [
                nn.Conv1d(inputs, channels, kernel, stride, kernel // 2),
                nn.GroupNorm(8, channels),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, EXERCISES)

    def forward(self, windows: Tensor) -> Tensor:
        return self.head(self.body(windows).mean(-1))


@dataclass(frozen=True)
class PriorAndPrototypes:
    """Every task starts from the meta-learned head, moved towards that of a prototypical network.

    So what is known of the exercises counts, and what this person's look like. scale: how far; see `PrototypeHead`.
    """

    scale: float = 0.1

    def __call__(self, start, problem):
        embedded = problem.support_features("head")
        members = F.one_hot(problem.task.support.targets, EXERCISES).to(embedded.dtype)
        prototypes = members.mT @ embedded / members.sum(-2).unsqueeze(-1)
        return {
            **start,
            "head.weight": start["head.weight"] + 2 * self.scale * prototypes,
            "head.bias": start["head.bias"] - self.scale * prototypes.square().sum(-1),
        }


class Recipe(NamedTuple):
    """How a learner is meta-trained, from the pooled network, on 1-shot tasks: inner step size, start."""

    inner_lr: float
    start: PriorAndPrototypes | None
    variation: Variation = replace(VARIED, exchange=0.5)
    iterations: int = 500

    def learner(self, net: Net) -> fomaml.MetaLearner:
        return fomaml.FOMAML(net, self.inner_lr, inner_steps=5, start=self.start)


RECIPES = {
    "FOMAML from prior and prototypes": Recipe(0.01, PriorAndPrototypes()),
    "FOMAML": Recipe(0.03, None),
}


class Cell:
    """The training subjects of one part of the study, a seed, and what is trained on them, once."""

    def __init__(self, recordings: Recordings, left_out: tuple[int, ...], seed: int):
        self.recordings, self.seed = recordings, seed
        self.subjects = tuple(subject for subject in recordings.subjects if subject not in left_out)
        self._pooled: dict[str, Net] = {}
        self._learners: dict[str, fomaml.MetaLearner] = {}

    def tasks(self, shots: int, query_shots: int, variation: Variation, purpose: int) -> TrainingTasks:
        # seeds of their own for each purpose
        seed = 10 * self.seed + purpose
        return TrainingTasks(
            self.recordings, self.subjects, shots, query_shots, variation, seed, self.confusions
        )

    @cached_property
    def confusions(self) -> np.ndarray:
        return confusions(self.recordings, self.subjects)

    def fresh(self, number: int = 0) -> Net:
        torch.manual_seed(100 * self.seed + number)
        return Net()

    def pooled(self, name: str) -> Net:
        """The network as an ordinary classifier of the training subjects' windows, plain or varied as the learners'."""
        if name not in self._pooled:
            tasks = self.tasks(1, 8, VARIED if name == "varied" else Variation(mixed=True), purpose=1)
            net, iterations = self.fresh(), 300
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(iterations))
            for iteration in range(iterations):
                windows, targets = tasks.batch(2 * iteration, 2).query
                optimizer.zero_grad()
                F.cross_entropy(net(windows.flatten(0, 1)), targets.flatten()).backward()
                optimizer.step()
                schedule.step()
            self._pooled[name] = net
        return self._pooled[name]

    def learner(self, name: str) -> fomaml.MetaLearner:
        if name not in self._learners:
            recipe = RECIPES[name]
            net = self.fresh()
            net.load_state_dict(self.pooled("plain").state_dict())
            learner = recipe.learner(net)
            optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, weight_decay=0)
            for _ in fomaml.train(
                learner,
                self.tasks(1, 4, recipe.variation, purpose=2),
                optimizer,
                iterations=recipe.iterations,
                meta_batch_size=4,
                schedule=cosine(recipe.iterations),
                measure_every=recipe.iterations,
                clip=5.0,
                engine="batched",
            ):
                pass
            self._learners[name] = learner
        return self._learners[name]

    @cached_property
    def pooled_features(self) -> tuple[np.ndarray, np.ndarray]:
        windows, targets = self.tasks(1, 4, Variation(), purpose=3).batch(0, 24).query
        return features(windows.flatten(0, 1)), targets.flatten().numpy()


# ── methods: names of settings, and what scores one of them ──
# A score: (cell, test tasks, steps) → {steps: (tasks,) accuracies}. Settings without steps have the number 0 alone.
Score = Callable[[Cell, UnseenTasks, tuple[int, ...]], Mapping[int, Tensor]]


def adapted(make: Callable[[Cell], fomaml.MetaLearner]) -> Score:
    def score(cell: Cell, tasks: UnseenTasks, steps: tuple[int, ...]) -> Mapping[int, Tensor]:
        return fomaml.evaluate(make(cell), tasks, tasks=len(tasks), at_steps=steps, engine="batched")

    return score


def fine_tuned(start: str, layers: str, inner_lr: float) -> Score:
    return adapted(lambda cell: fomaml.FOMAML(cell.pooled(start), inner_lr, inner_steps=5, adapted=layers))


def from_prototypes(scale: float, inner_lr: float) -> Score:
    """What is left of the learner without its meta-training."""
    start = PriorAndPrototypes(scale)
    return adapted(lambda cell: fomaml.FOMAML(cell.pooled("plain"), inner_lr, inner_steps=5, start=start))


def from_scratch(inner_lr: float) -> Score:
    return adapted(lambda cell: fomaml.FOMAML(cell.fresh(1), inner_lr, inner_steps=5))


def by_features(predict: Callable[[Cell, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Score:
    """predict: cell, features of a support set, its targets, features of the query windows → labels."""

    def score(cell: Cell, tasks: UnseenTasks, steps: tuple[int, ...]) -> Mapping[int, Tensor]:
        found = []
        for index in range(len(tasks)):
            support, query = one(tasks.tasks, index)
            labels = predict(cell, features(support.inputs), support.targets.numpy(), features(query.inputs))
            found.append((labels == query.targets.numpy()).mean())
        return {0: torch.tensor(found)}

    return score


def neighbour(nearer: float, number: int) -> Score:
    """The vote of the nearest windows, a window of the support set counting as so many times nearer."""

    def predict(cell, support, targets, query):
        pooled, labels = cell.pooled_features
        scaler = StandardScaler().fit(pooled)
        known, asked = scaler.transform(np.concatenate([pooled, support])), scaler.transform(query)
        distances = np.linalg.norm(asked[:, None] - known, axis=-1)
        distances[:, len(pooled) :] /= nearer
        nearest = np.concatenate([labels, targets])[distances.argsort(1, kind="stable")[:, :number]]
        return stats.mode(nearest, axis=1).mode

    return by_features(predict)


def forest(weight: float, leaf: int) -> Score:
    """A random forest of the pooled windows and the support set, whose windows weigh so many times as much."""

    def predict(cell, support, targets, query):
        pooled, labels = cell.pooled_features
        weights = np.concatenate([np.ones(len(labels)), np.full(len(targets), weight)])
        model = RandomForestClassifier(30, min_samples_leaf=leaf, random_state=cell.seed)
        known, named = np.concatenate([pooled, support]), np.concatenate([labels, targets])
        return model.fit(known, named, weights).predict(query)

    return by_features(predict)


class Method(NamedTuple):
    settings: Mapping[str, Score]
    steps: tuple[int, ...] = (0,)

    @property
    def trials(self) -> int:
        return len(self.settings) * len(self.steps)


METHODS = {
    LEARNER: Method(
        {name: adapted(lambda cell, name=name: cell.learner(name)) for name in RECIPES}, (0, *STEPS)
    ),
    TUNED: Method(
        {
            f"{start}, {layers}, {lr}": fine_tuned(start, layers, lr)
            for start, layers, lrs in (
                ("plain", "*", (0.003, 0.01, 0.03, 0.1)),
                ("varied", "*", (0.003, 0.01, 0.03, 0.1)),
                ("plain", "head*", (0.1, 0.3)),
            )
            for lr in lrs
        },
        STEPS,
    ),
    "pooled, with prototypes, fine-tuned": Method(
        {f"{scale}, {lr}": from_prototypes(scale, lr) for scale in (0.1, 0.3) for lr in (0.003, 0.01, 0.03)},
        (0, *STEPS),
    ),
    "pooled, not adapted": Method({name: fine_tuned(name, "*", 0.01) for name in ("plain", "varied")}),
    "from scratch": Method({f"{lr}": from_scratch(lr) for lr in (0.01, 0.03, 0.1, 0.3)}, STEPS),
    "random forest, pooled and support": Method(
        {f"weight {w}, leaf {leaf}": forest(w, leaf) for w in (1, 3, 10, 30, 100) for leaf in (1, 3)}
    ),
    "nearest neighbours, pooled and support": Method(
        {
            f"{k}, {near} times nearer": neighbour(near, k)
            for k in (1, 3, 5)
            for near in (1, 1.25, 1.5, 2, 1e6)
        }
    ),
}
