"""Estimators of scikit-learn, fitted to each task: the scores of scikit-learn used directly."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clusters import episodes as clusters
from estimators import TABLE, TRAIN, Given, arrays, column, drawn, features, make, score, sources
from fomaml import GroupEpisodes, tuning
from fomaml.baselines import ESTIMATORS, fit_estimator, pooled, tune_estimator
from fomaml.tasks import Examples, Task

sklearn = pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra metrics")
TASKS = 3


@pytest.fixture(autouse=True)
def small_forest(monkeypatch):
    few = replace(ESTIMATORS["forest"], options={"n_estimators": 5, "random_state": 0})
    monkeypatch.setitem(ESTIMATORS, "forest", few)


KINDS = [
    *((name, "classification") for name in ("nearest", "ridge", "logistic", "forest")),
    *((name, "regression") for name in ("nearest", "ridge", "line", "forest")),
]
SHARES = {"nearest": (None, 0.0, 1.0)}


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_scores_are_those_of_scikit_learn(name, kind):
    train, _ = sources(kind)
    pool = pooled(train)
    rows = np.flatnonzero(np.isin(TABLE["key"], TRAIN))
    assert len(pool.groups) == len(rows)
    x, y = features()[rows].astype(np.float32).astype(np.float64), column(kind)[rows]
    if kind == "regression":
        y = y.astype(np.float32).astype(np.float64)
    order = np.argsort(TABLE["key"][rows], kind="stable")
    x, y = x[order], y[order]
    episodes = drawn(kind)
    for share in SHARES.get(name, (None, 0.0, 0.3, 1.0)):
        expected = []
        for number in range(TASKS):
            xs, ys = arrays(episodes[number].support, kind)
            if share in (0, 1):
                own = (x, y) if share == 0 else (xs, ys)
                model = make(name, kind).fit(*own)
            else:
                joined = np.concatenate([xs, x]), np.concatenate([ys, y])
                weights = {}
                if share is not None:
                    each = [share / len(xs)] * len(xs) + [(1 - share) / len(x)] * len(x)
                    weights["sample_weight"] = np.array(each) * len(each)
                model = make(name, kind).fit(*joined, **weights)
            expected.append(score(kind, model, episodes[number]))
        found = fit_estimator(name, episodes, pool=pool, share=share, tasks=TASKS)
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("metric", ["auprc", "balanced-accuracy", "f1"])
@pytest.mark.parametrize("name", ["ridge", "logistic", "forest", "nearest"])
def test_other_metrics_of_classes(metric, name):
    from sklearn import metrics

    episodes = drawn("classification")
    expected = []
    for number in range(TASKS):
        xs, ys = arrays(episodes[number].support, "classification")
        xq, yq = arrays(episodes[number].query, "classification")
        model = make(name, "classification").fit(xs, ys)
        if metric == "balanced-accuracy":
            expected.append(metrics.balanced_accuracy_score(yq, model.predict(xq)))
        elif metric == "f1":
            expected.append(metrics.f1_score(yq, model.predict(xq), average="macro"))
        else:
            if hasattr(model, "predict_proba"):
                odds = model.predict_proba(xq)
            else:
                odds = model.decision_function(xq)
                odds = np.exp(odds) / np.exp(odds).sum(1, keepdims=True)
            expected.append(metrics.average_precision_score(np.eye(3)[yq], odds, average="macro"))
    found = fit_estimator(name, episodes, tasks=TASKS, metric=metric)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_losses_and_metrics_of_ones_own():
    episodes = drawn("classification")
    model = [
        make("logistic", "classification").fit(*arrays(episodes[n].support, "classification"))
        for n in range(2)
    ]
    expected = []
    for number in range(2):
        xq, yq = arrays(episodes[number].query, "classification")
        expected.append(-np.log(model[number].predict_proba(xq)[np.arange(len(yq)), yq]).mean())
    found = fit_estimator("logistic", episodes, tasks=2, metric="loss")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    found = fit_estimator("logistic", episodes, tasks=2, metric=lambda outputs, targets: outputs.shape[1])
    assert found.tolist() == [3, 3]
    regression = drawn("regression")
    found = fit_estimator("ridge", regression, tasks=2, criterion=F.l1_loss)  # scored by the loss
    again = fit_estimator("ridge", regression, tasks=2, metric="mae")
    np.testing.assert_allclose(found.numpy(), again.numpy(), rtol=1e-6)


def test_the_rows_of_the_task_itself_are_not_in_its_pool():
    train, _ = sources("classification")
    episodes = GroupEpisodes(train, shots=1, query_shots=2, seed=1, in_turn=True)
    found = fit_estimator("nearest", episodes, pool=pooled(train), share=0.0, tasks=4)
    expected = []
    for number in range(4):
        others = np.isin(TABLE["key"], [key for key in TRAIN if key != episodes.group(number)])
        model = make("nearest", "classification").fit(
            features()[others].astype(np.float32), TABLE["label"][others]
        )
        expected.append(score("classification", model, episodes[number]))
    assert found.tolist() == expected and min(expected) < 1  # each query row would be its own neighbour


def test_unequal_tasks_and_a_pool_of_episodes():
    train, test = sources("regression")
    episodes = GroupEpisodes(test, shots=3, query_shots=None, seed=2)
    tasks = GroupEpisodes(train, shots=3, query_shots=2, seed=3)
    pool = pooled(tasks, rows=23)
    parts = [part for number in range(4) for part in tasks[number]]  # 4 tasks of 5 rows have room
    assert torch.equal(pool.examples.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(pool.examples.targets, torch.cat([part.targets for part in parts]))
    found = fit_estimator("ridge", episodes, pool=pool, share=None, tasks=2)
    expected = []
    for number in range(2):
        sets = [arrays(part, "regression") for part in [episodes[number].support, *parts]]
        model = make("ridge", "regression").fit(*(np.concatenate(own) for own in zip(*sets)))
        expected.append(score("regression", model, episodes[number]))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_a_pool_of_some_rows():
    train, _ = sources("regression")
    pool = pooled(train, rows=20, seed=1)
    inputs, targets = train.take(np.arange(len(train.rows)))
    whole = {tuple(row): (float(y), key) for row, y, key in zip(
        inputs.tolist(), targets[:, 0], np.repeat(train.names, train.counts)
    )}  # fmt: skip
    found = list(
        zip(map(tuple, pool.examples.inputs.tolist()), pool.examples.targets[:, 0].tolist(), pool.groups)
    )
    assert len(set(found)) == 20 and all(whole[row] == (y, key) for row, y, key in found)
    assert torch.equal(pooled(train, rows=20, seed=1).examples.inputs, pool.examples.inputs)
    assert not torch.equal(pooled(train, rows=20, seed=2).examples.inputs, pool.examples.inputs)


def test_nested_inputs_are_side_by_side_categories_one_hot():
    random = np.random.default_rng(0)

    def examples(number, high):
        return Examples(
            (
                torch.tensor(random.normal(size=(number, 2, 2))),
                {"code": torch.tensor(random.integers(0, high, (number, 2)))},
            ),
            torch.tensor(random.integers(0, 2, number)),
        )

    task = Task(examples(12, 3), examples(9, 5))  # categories 3 and 4 are new to the query set

    def encoded(part):
        numbers, codes = part.inputs[0].numpy().reshape(-1, 4), part.inputs[1]["code"].numpy()
        return np.concatenate([numbers, *((codes[:, [c]] == np.arange(3)) * 1.0 for c in range(2))], 1)

    model = make("ridge", "classification").fit(encoded(task.support), task.support.targets.numpy())
    expected = np.mean(model.predict(encoded(task.query)) == task.query.targets.numpy())
    assert fit_estimator("ridge", Given(task), tasks=1).tolist() == [expected]


def test_several_targets_and_shapes():
    random = np.random.default_rng(0)
    parts = [
        Examples(torch.tensor(random.normal(size=(n, 3))), torch.tensor(random.normal(size=(n, 2, 2))))
        for n in (7, 4)
    ]
    model = make("ridge", "regression").fit(parts[0].inputs.numpy(), parts[0].targets.numpy().reshape(7, 4))
    expected = np.mean((model.predict(parts[1].inputs.numpy()) - parts[1].targets.numpy().reshape(4, 4)) ** 2)
    found = fit_estimator("ridge", Given(Task(*parts)), tasks=1)
    np.testing.assert_allclose(found.numpy(), [expected])


@pytest.mark.parametrize("name", ["ridge", "logistic", "nearest"])
def test_what_is_ignored_and_a_single_class(name):
    random = np.random.default_rng(0)
    xs, xq = (torch.tensor(random.normal(size=(n, 3))) for n in (8, 6))
    ys, yq = torch.tensor([0, 1, -100, 1, 0, 2, 2, -100]), torch.tensor([0, -100, 1, 2, 2, 0])
    keep, judged = ys >= 0, yq >= 0
    model = make(name, "classification").fit(xs[keep].numpy(), ys[keep].numpy())
    expected = np.mean(model.predict(xq[judged].numpy()) == yq[judged].numpy())
    found = fit_estimator(name, Given(Task(Examples(xs, ys), Examples(xq, yq))), tasks=1)
    assert found.tolist() == pytest.approx([expected])
    alone = Given(
        Task(Examples(xs, torch.ones(8, dtype=torch.long)), Examples(xq, torch.tensor([0, 1, 1, 1, 2, 0])))
    )
    assert fit_estimator(name, alone, tasks=1).tolist() == [0.5]


@pytest.mark.parametrize("criterion", [F.binary_cross_entropy_with_logits, nn.BCELoss()])
@pytest.mark.parametrize("name", ["logistic", "ridge", "forest"])
def test_of_a_binary_cross_entropy(criterion, name):
    random = np.random.default_rng(1)
    xs, xq = (torch.tensor(random.normal(size=(n, 3))) for n in (30, 20))
    ys, yq = ((x[:, :1] + 0.3 * torch.tensor(random.normal(size=(len(x), 1))) > 0).double() for x in (xs, xq))
    model = make(name, "classification").fit(xs.numpy(), ys[:, 0].numpy())
    expected = np.mean(model.predict(xq.numpy()) == yq[:, 0].numpy())
    episodes = Given(Task(Examples(xs, ys), Examples(xq, yq)))
    found = fit_estimator(name, episodes, tasks=1, criterion=criterion, metric="accuracy")
    assert found.tolist() == pytest.approx([expected])


def test_features_of_a_frozen_backbone():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Tanh())
    episodes = clusters()
    found = fit_estimator("logistic", episodes, features=backbone, tasks=3)
    assert backbone.training  # as it was
    expected = []
    for number in range(3):
        (xs, ys), (xq, yq) = episodes[number]
        with torch.no_grad():
            hidden = [torch.tanh(backbone[0](own)).double().numpy() for own in (xs, xq)]
        model = make("logistic", "classification").fit(hidden[0], ys.numpy())
        expected.append(np.mean(model.predict(hidden[1]) == yq.numpy()))
    assert found.tolist() == pytest.approx(expected)
    again = fit_estimator("logistic", episodes, features=lambda x: torch.tanh(backbone[0](x)), tasks=3)
    assert torch.equal(found, again)


def test_an_estimator_of_ones_own():
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    episodes = clusters()
    own = make_pipeline(StandardScaler(), SVC(C=3.0))
    found = fit_estimator(own, episodes, tasks=3)
    expected = []
    for number in range(3):
        (xs, ys), (xq, yq) = episodes[number]
        expected.append(own.fit(xs.numpy(), ys.numpy()).score(xq.numpy(), yq.numpy()))
    assert found.tolist() == pytest.approx(expected)
    space = {"svc__C": tuning.LogUniform(1e-4, 100)}
    chosen = tune_estimator(own, clusters(seed=1), episodes, trials=3, space=space, tasks=3, tuning_tasks=2)
    assert (
        chosen.settings
        == chosen.trials[chosen.trials.index(max(chosen.trials, key=lambda t: t.score))].settings
    )


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("name", ["nearest", "ridge", "forest"])
def test_it_is_tuned_on_other_tasks(name, kind):
    train, _ = sources(kind)
    tuning_episodes = GroupEpisodes(train, shots=2, query_shots=3, seed=9)
    episodes, pool = drawn(kind), pooled(train, rows=40)
    options = {"pool": pool, "metric": None if kind == "classification" else "mae"}
    chosen = tune_estimator(
        name, tuning_episodes, episodes, trials=5, tasks=3, tuning_tasks=3, seed=2, **options
    )
    assert len(chosen.trials) == 5
    worth = []
    for trial in chosen.trials:
        own = dict(trial.settings)
        assert set(own) == {*ESTIMATORS[name].space, "share"}
        share = own.pop("share")
        assert name != "nearest" or share in (None, 0.0, 1.0)
        found = fit_estimator(name, tuning_episodes, tasks=3, share=share, options=own, **options)
        worth.append(found.mean().item())
    assert [trial.score for trial in chosen.trials] == worth
    best = worth.index(max(worth) if kind == "classification" else min(worth))
    assert chosen.settings == chosen.trials[best].settings
    own = dict(chosen.settings)
    share = own.pop("share")
    assert torch.equal(
        chosen.scores, fit_estimator(name, episodes, tasks=3, share=share, options=own, **options)
    )


def test_several_metrics_of_one_fit(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    fits = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *data: fits.append(1) or fit(self, *data))
    episodes, tuning_episodes = drawn("classification"), drawn("classification", seed=9)
    metrics = ["f1", "loss", "accuracy"]
    options = {"trials": 4, "tasks": 3, "tuning_tasks": 2}
    chosen = tune_estimator("logistic", tuning_episodes, episodes, metric=metrics, **options)
    assert len(fits) == 4 * 2 + 3
    by_first = tune_estimator("logistic", tuning_episodes, episodes, metric="f1", **options)
    assert (chosen.settings, chosen.trials) == (by_first.settings, by_first.trials)
    assert list(chosen.scores) == metrics and torch.equal(chosen.scores["f1"], by_first.scores)
    together = fit_estimator("logistic", episodes, tasks=3, options=chosen.settings, metric=metrics)
    for metric in metrics:
        alone = fit_estimator("logistic", episodes, tasks=3, options=chosen.settings, metric=metric)
        assert torch.equal(alone, together[metric]) and torch.equal(alone, chosen.scores[metric])


def test_without_a_pool_the_support_set_is_alone():
    episodes = drawn("regression")
    chosen = tune_estimator("line", episodes, episodes, tasks=2)
    assert chosen.settings == {} and chosen.trials == []
    assert torch.equal(chosen.scores, fit_estimator("line", episodes, tasks=2))
    chosen = tune_estimator("ridge", episodes, episodes, trials=2, tasks=2, tuning_tasks=2)
    assert set(chosen.settings) == {"alpha"}
