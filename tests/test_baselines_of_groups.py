"""Baselines of groups of rows, against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fomaml import MLP, GroupEpisodes, GroupSource
from fomaml.baselines import of_estimator, pool
from fomaml.metrics import METRICS
from tables import uneven

TABLE = uneven(least=6)


def source(kind):
    return GroupSource(TABLE["x"] / 50, TABLE["label" if kind == "classification" else "value"], TABLE["key"])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_pooled_training_is_a_plain_loop_over_random_rows(kind):
    found = source(kind)
    torch.manual_seed(0)
    model, other = (MLP(2, 8, found.outputs) for _ in range(2))
    other.load_state_dict(model.state_dict())
    pool(model, found, iterations=5, batch_size=16, lr=0.01, seed=3)
    random = torch.Generator().manual_seed(3)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    for _ in range(5):
        rows = found.rows[torch.randint(len(found.rows), (16,), generator=random).numpy()]
        inputs = torch.from_numpy(TABLE["x"][rows] / 50).float()
        if kind == "classification":
            loss = F.cross_entropy(other(inputs), torch.from_numpy(TABLE["label"][rows]))
        else:
            loss = F.mse_loss(other(inputs), torch.from_numpy(TABLE["value"][rows, None]).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for own, plain in zip(model.parameters(), other.parameters()):
        assert torch.equal(own, plain)


@pytest.mark.parametrize("with_pooled", [False, True])
def test_an_estimator_of_scikit_learn(with_pooled):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, test = source("regression").select([f"machine {n}" for n in range(4)]), source("regression")
    episodes = GroupEpisodes(test, shots=4, query_shots=None)
    found = of_estimator(
        lambda: linear.Ridge(alpha=2.0),
        episodes,
        tasks=5,
        metric="rmse",
        pooled=train if with_pooled else None,
    )
    for index in range(5):
        support, query = episodes.rows(index)
        rows = np.concatenate([train.rows, support]) if with_pooled else support
        x, y = (
            np.c_[TABLE["x"] / 50, np.ones(len(TABLE["x"]))].astype(np.float32).astype(float),
            TABLE["value"],
        )
        penalty = np.diag([2.0, 2.0, 0.0])
        weights = np.linalg.solve(x[rows].T @ x[rows] + penalty, x[rows].T @ y[rows])
        expected = np.sqrt(np.mean((x[query] @ weights - y[query]) ** 2))
        assert found[index].item() == pytest.approx(expected, rel=1e-4)


def test_a_classifier_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors", reason="scikit-learn is not installed")
    episodes = GroupEpisodes(source("classification"), shots=2, query_shots=3)
    found = of_estimator(
        lambda: neighbors.KNeighborsClassifier(1), episodes, tasks=6, metric=METRICS["accuracy"]
    )
    for index in range(6):
        support, query = episodes.rows(index)
        distances = np.square(TABLE["x"][query, None] - TABLE["x"][support]).sum(2)
        nearest = TABLE["label"][support][distances.argmin(1)]
        assert found[index].item() == pytest.approx(np.mean(nearest == TABLE["label"][query]))
