"""Estimators that meta-train: scikit-learn's own checks, and what they learn of groups."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fomaml
from fomaml import FOMAML
from fomaml.errors import InputError
from fomaml.train import cosine

pytest.importorskip("sklearn", "1.6", reason="the estimators are of scikit-learn, of the extra sklearn")
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

Classifier, Regressor = fomaml.MetaClassifier, fomaml.MetaRegressor
# Enough for the scores that the checks ask for; there are about a hundred trainings.
QUICK = {
    "hidden": 32,
    "inner_steps": 1,
    "meta_lr": 0.02,
    "iterations": 20,
    "meta_batch_size": 2,
    "random_state": 0,
}
GROUPS = np.repeat([f"task {number:02}" for number in range(12)], 20)


# No check is excepted; that of the array API is skipped by scikit-learn where SCIPY_ARRAY_API is not set.
@parametrize_with_checks([Classifier(**QUICK), Regressor(**QUICK)])
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def lines():
    """Tasks that differ in a slope, of the order of thousands: which it is, a few rows tell."""
    random = np.random.default_rng(0)
    inputs = random.uniform(-1, 1, (240, 1))
    slopes = np.repeat(random.uniform(-3, 3, 12), 20)
    return 50 + 10 * inputs, 5000 + 1000 * slopes * inputs[:, 0]


def sides():
    """Tasks that differ in the sign with which an input decides the class."""
    inputs = np.random.default_rng(0).normal(size=(240, 2))
    signs = np.repeat(np.arange(12) % 2 * 2 - 1, 20)
    return inputs, np.where(signs * inputs[:, 0] > 0, "on", "off")


def waves():
    """Tasks that differ in a phase, of which a few rows tell something."""
    random = np.random.default_rng(7)
    groups = np.repeat([f"task {number:02}" for number in range(24)], 20)
    phases = np.repeat(random.uniform(0, 3, 24), 20)
    inputs = random.uniform(-3, 3, (480, 1))
    return inputs, 100 * np.sin(inputs[:, 0] + phases), groups


@pytest.mark.parametrize(
    ("settings", "least"),
    # the default settings were chosen on other tasks
    [pytest.param({}, 0.8, marks=pytest.mark.long), ({"iterations": 150}, 0.6)],
    ids=["default", "short"],
)
def test_regression_of_a_new_task_from_a_few_rows(settings, least):
    inputs, targets, groups = waves()
    old = groups < "task 16"
    model = Regressor(**settings, random_state=0).fit(inputs[old], targets[old], groups=groups[old])
    alone = Regressor(iterations=100, random_state=0).fit(inputs[old], targets[old])
    scores, without = [], []
    for name in np.unique(groups[~old]):
        own_inputs, own = inputs[name == groups], targets[name == groups]
        scores.append(model.adapt(own_inputs[:5], own[:5]).score(own_inputs[5:], own[5:]))
        without.append(alone.adapt(own_inputs[:5], own[:5]).score(own_inputs[5:], own[5:]))
    assert np.median(scores) > least
    # tasks of all rows teach nothing of what differs between tasks
    assert np.median(scores) > np.median(without) + 0.1


def test_both_orders_are_there():
    for kind, data, usual in ((Classifier, sides, True), (Regressor, lines, False)):
        inputs, targets = data()
        for asked in (None, True, False):
            model = kind(**QUICK | {"iterations": 2}, first_order=asked).fit(inputs, targets, groups=GROUPS)
            assert model.learner_.first_order == (usual if asked is None else asked)


def test_classification_of_a_new_task_from_a_few_rows():
    inputs, targets = sides()
    old = GROUPS < "task 08"
    model = Classifier(inner_lr=0.3, iterations=150, random_state=0).fit(
        inputs[old], targets[old], groups=GROUPS[old]
    )
    assert model.classes_.tolist() == ["off", "on"]
    scores = []
    for name in np.unique(GROUPS[~old]):
        own_inputs, own = inputs[name == GROUPS], targets[name == GROUPS]
        few = np.concatenate([np.flatnonzero(own == side)[:4] for side in model.classes_])
        rest = np.setdiff1d(np.arange(20), few)
        scores.append(model.adapt(own_inputs[few], own[few]).score(own_inputs[rest], own[rest]))
    assert np.mean(scores) > 0.8
    with pytest.raises(InputError, match="'dim' is none of the given: off, on"):
        model.adapt(inputs[:3], ["on", "off", "dim"])


@pytest.mark.parametrize("kind", [Classifier, Regressor])
def test_the_learner_takes_rows_as_they_are(kind):
    """Its predictions are those of the learner adapted to all rows, and it is meta-trained in standardised units."""
    inputs, targets = lines()
    targets = (inputs[:, 0] > 50).astype(int) if kind is Classifier else targets
    model = kind(**QUICK).fit(inputs, targets, groups=GROUPS)
    rows = torch.from_numpy(inputs)
    labels = torch.from_numpy(targets) if kind is Classifier else torch.from_numpy(targets)[:, None]
    outputs = model.learner_.adapt((rows, labels))(rows).detach()
    if kind is Classifier:
        np.testing.assert_array_equal(model.predict_proba(inputs), outputs.softmax(1).numpy())
    else:
        np.testing.assert_array_equal(model.predict(inputs), outputs[:, 0].numpy())
    network = model.learner_.model.network
    with torch.no_grad():
        standard = (rows - rows.mean(0)) / rows.std(0, correction=0)
        inner = network(standard)
        unit, offset = (labels.std(correction=0), labels.mean()) if kind is Regressor else (1, 0)
        torch.testing.assert_close(model.learner_.model(rows), inner * unit + offset)
    if kind is Regressor:
        error = model.learner_.criterion(outputs, labels)
        torch.testing.assert_close(error, F.mse_loss(outputs, labels) / labels.var(correction=0))


def test_the_training_is_that_of_the_library():
    """The same numbers as FOMAML by `train` from the same weights on the same tasks."""
    inputs, targets = sides()
    settings = {**QUICK, "iterations": 3, "shots": 2, "query_shots": 3}
    start = Classifier(**{**settings, "meta_lr": 1e-300}).fit(inputs, targets, groups=GROUPS)
    model = Classifier(**settings).fit(inputs, targets, groups=GROUPS)
    network = start.learner_.model
    learner = FOMAML(network, 0.1, 1)
    numbers = np.searchsorted(["off", "on"], targets)
    source = fomaml.GroupSource(torch.from_numpy(inputs), numbers, GROUPS)
    seed = np.random.RandomState(0).randint(2**31 - 1)
    tasks = fomaml.GroupEpisodes(source, shots=2, query_shots=3, seed=int(seed))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    records = fomaml.train(learner, tasks, optimizer, iterations=3, meta_batch_size=2, schedule=cosine(3))
    assert model.loss_curve_ == pytest.approx([float(record.meta_loss) for record in records], rel=1e-9)
    for own, other in zip(model.learner_.parameters(), learner.parameters()):
        torch.testing.assert_close(own, other)


def test_seeds_decide_and_leave_the_global_ones():
    inputs, targets = lines()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (
        Regressor(**{**QUICK, "random_state": seed}).fit(inputs, targets) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(first.predict(inputs), again.predict(inputs))
    assert not np.array_equal(first.predict(inputs), other.predict(inputs))


@pytest.mark.parametrize("kind", [Classifier, Regressor])
def test_groups_are_crossed_and_piped(kind):
    inputs, targets = sides() if kind is Classifier else lines()
    scores = cross_val_score(
        kind(**QUICK),
        inputs,
        targets,
        groups=GROUPS,
        params={"groups": GROUPS},
        cv=GroupKFold(3),
        error_score="raise",
    )
    assert scores.shape == (3,)
    pipe = make_pipeline(StandardScaler(), kind(**QUICK))
    name = pipe.steps[-1][0]
    pipe.fit(inputs, targets, **{f"{name}__groups": GROUPS})
    moved = pipe[:-1].transform(inputs)
    own = kind(**QUICK).fit(moved, targets, groups=GROUPS)
    np.testing.assert_array_equal(pipe.predict(inputs), own.predict(moved))


def test_several_targets():
    inputs, targets = lines()
    both = np.stack([targets, inputs[:, 0]], 1)
    model = Regressor(**{**QUICK, "iterations": 60}).fit(inputs, both)
    assert model.predict(inputs).shape == (240, 2)
    assert model.adapt(inputs[:5], both[:5]).predict(inputs[:3]).shape == (3, 2)


def test_groups_that_are_too_small_are_left_out_with_a_warning():
    inputs, targets = sides()
    groups = np.append(GROUPS[:-2], ["alone", "another"])
    with pytest.warns(UserWarning, match="2 of 14 groups have too few rows .* alone, another"):
        model = Classifier(**QUICK).fit(inputs, targets, groups=groups)
    assert model.left_out_ == ["alone", "another"]


X, Y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
REFUSED = {
    "one class": (lambda: Classifier().fit(X, np.zeros(30, int)), "the same class, '0'"),
    "one value": (lambda: Regressor().fit(X, np.ones(30)), "there is nothing to learn"),
    "rows alone": (lambda: Regressor().fit(X, X[:, 0], groups=np.arange(30)), "no group has two rows or more: "),
    "classes alone": (lambda: Classifier().fit(X, Y, groups=Y), "two rows or more of two classes"),
    "shots": (lambda: Classifier(shots=8).fit(X, Y), "8 shots"),
    "widths": (lambda: Classifier(hidden=(8, 0)).fit(X, Y), "a width in hidden"),
    "groups": (lambda: Classifier().fit(X, Y, groups=[1, 2]), "inconsistent numbers of samples"),
    "iterations": (lambda: Classifier(iterations=0).fit(X, Y), "iterations must be"),
    "another width": (lambda: Classifier(**QUICK).fit(X, Y).adapt(X[:, :2], Y), "X has 2 features"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused(name):
    fit, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        fit()


def test_nothing_is_predicted_before_fit():
    for ask in (Classifier().predict, Classifier().predict_proba, Regressor().predict):
        with pytest.raises(NotFittedError):
            ask(X)
    for kind in (Classifier, Regressor):
        with pytest.raises(NotFittedError):
            kind().adapt(X, Y)
