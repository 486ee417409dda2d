"""Learners and runs as estimators of scikit-learn: the same numbers as by hand, and what scikit-learn asks of them."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml
from clusters import learner
from fomaml import FOMAML, MLP, ProtoMAML
from fomaml.app.cli import main
from fomaml.errors import InputError

pytest.importorskip("sklearn", "1.6", reason="the estimators are of scikit-learn, of the extra sklearn")
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Classifier, Regressor = fomaml.FewShotClassifier, fomaml.FewShotRegressor
RANDOM = np.random.default_rng(0)
LABELS = np.arange(18) % 3
ROWS = RANDOM.normal(size=(18, 6)) + 3 * np.eye(6)[LABELS]
VALUES = ROWS @ RANDOM.normal(size=6)
NAMES = np.array(["ash", "birch", "oak"])
KINDS = {
    "numbers": LABELS,
    "others": LABELS * 10 - 7,
    "text": NAMES[LABELS],
    "objects": NAMES[LABELS].astype(object),
    "a list": NAMES[LABELS].tolist(),
    "floating": LABELS.astype(np.float64),
}


def regressor(outputs=1):
    torch.manual_seed(3)
    return FOMAML(MLP(6, 16, outputs), 0.05, 3, F.mse_loss)


def by_hand(own, targets, steps=None):
    """What the learner itself makes of the rows: its outputs for the same rows."""
    inputs = torch.from_numpy(ROWS).float()
    with torch.no_grad():
        return own.adapt((inputs, torch.from_numpy(np.array(targets))), steps)(inputs).double()


# --- few shots, of a learner ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [None, 0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_the_learner(kind, steps):
    own = learner()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    model = Classifier(own, steps=steps)
    assert model.fit(ROWS, KINDS[kind]) is model
    expected = by_hand(own, LABELS, steps).softmax(1).numpy()
    np.testing.assert_array_equal(model.predict_proba(ROWS), expected)
    values = np.unique(KINDS[kind])
    np.testing.assert_array_equal(model.classes_, values)
    np.testing.assert_array_equal(model.predict(ROWS), values[expected.argmax(1)])
    assert model.score(ROWS, KINDS[kind]) == np.mean(expected.argmax(1) == LABELS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


@pytest.mark.parametrize("outputs", [1, 2])
def test_values_are_those_of_the_learner(outputs):
    own, targets = regressor(outputs), np.stack([VALUES, -VALUES], 1)[:, :outputs]
    expected = by_hand(own, targets.astype(np.float32)).numpy()
    given = targets[:, 0] if outputs == 1 else targets
    model = Regressor(own).fit(ROWS, given)
    np.testing.assert_array_equal(model.predict(ROWS), expected[:, 0] if outputs == 1 else expected)
    errors = np.square(expected - targets).sum(0) / np.square(targets - targets.mean(0)).sum(0)
    assert model.score(ROWS, given) == pytest.approx(np.mean(1 - errors))


def test_classes_given_are_the_outputs_in_their_order():
    own, order = learner(), [2, 0, 1]
    model = Classifier(own, classes=NAMES[order]).fit(ROWS[:12], NAMES[LABELS[:12]])
    numbers = torch.tensor([order.index(label) for label in LABELS[:12]])
    adapted = own.adapt((torch.from_numpy(ROWS[:12]).float(), numbers))
    expected = adapted(torch.from_numpy(ROWS).float()).double().softmax(1).detach().numpy()
    np.testing.assert_array_equal(model.classes_, NAMES)
    np.testing.assert_array_equal(model.predict_proba(ROWS), expected[:, np.argsort(order)])


def test_a_head_made_of_the_classes_takes_any_number():
    model = nn.Sequential()
    model.body, model.head = nn.Linear(6, 8), nn.Linear(8, 2)
    found = Classifier(ProtoMAML(model, 0.01, 1)).fit(ROWS, LABELS).predict_proba(ROWS)
    assert found.shape == (18, 3)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32])
def test_numbers_of_any_kind_are_taken(dtype):
    whole = (ROWS * 3).clip(0).astype(dtype)
    model = Classifier(learner()).fit(whole, LABELS)
    again = Classifier(learner()).fit(whole.astype(np.float64), LABELS)
    np.testing.assert_array_equal(model.predict_proba(whole), again.predict_proba(whole.astype(np.float64)))


def test_whole_numbers_stay_where_they_are_looked_up():
    words = RANDOM.integers(0, 5, (18, 4))
    torch.manual_seed(0)
    own = FOMAML(nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3)), 0.1, 2)
    adapted = own.adapt((torch.from_numpy(words), torch.from_numpy(LABELS)))
    expected = adapted(torch.from_numpy(words)).double().softmax(1).detach().numpy()
    np.testing.assert_array_equal(Classifier(own).fit(words, LABELS).predict_proba(words), expected)


def test_pictures_of_a_learner_keep_their_shape():
    torch.manual_seed(0)
    own = FOMAML(fomaml.Conv4Strided(3, channels=4), 0.1, 1)
    images = RANDOM.normal(size=(6, 1, 16, 16))
    model = Classifier(own).fit(images, LABELS[:6])
    together, alone = model.predict_proba(images), model.predict_proba(images[:1])
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)  # by the statistics of the support set


TOOLS = [
    (Classifier(learner()), LABELS),
    (Classifier(learner()), KINDS["text"]),
    (Regressor(regressor()), VALUES),
]
each_tool = pytest.mark.parametrize(("model", "targets"), TOOLS, ids=["numbers", "text", "values"])


@each_tool
def test_scikit_learn_clones_sets_crosses_and_pipes(model, targets):
    changed = clone(model).set_params(steps=1)
    assert changed.get_params()["steps"] == 1 and model.get_params()["steps"] is None
    assert changed.learner is not model.learner
    first, second = clone(model).fit(ROWS, targets), clone(changed).fit(ROWS, targets)
    assert not np.array_equal(first._predictions(ROWS).names, []) and first.steps is None
    kept = pickle.loads(pickle.dumps(second))
    np.testing.assert_array_equal(kept.predict(ROWS), second.predict(ROWS))
    scores = cross_val_score(model, ROWS, targets, cv=3, error_score="raise")
    [own] = cross_val_score(
        model, ROWS, targets, cv=[(np.arange(12), np.arange(12, 18))], error_score="raise"
    )
    assert own == clone(model).fit(ROWS[:12], targets[:12]).score(ROWS[12:], targets[12:])
    assert scores.shape == (3,) and np.isfinite(scores).all()
    pipe = make_pipeline(StandardScaler(), PCA(6), clone(model)).fit(ROWS, targets)
    moved = pipe[:-1].transform(ROWS)
    np.testing.assert_array_equal(pipe.predict(ROWS), clone(model).fit(moved, targets).predict(moved))


@each_tool
def test_widths_and_fits_are_checked(model, targets):
    with pytest.raises(NotFittedError):
        clone(model).predict(ROWS)
    fitted = clone(model).fit(ROWS, targets)
    assert fitted.n_features_in_ == 6
    with pytest.raises(ValueError, match=r"X has 4 features, but FewShot.* is expecting 6 features"):
        fitted.predict(ROWS[:, :4])
    with pytest.raises(InputError, match=r"does not take rows of shape \(4\)"):
        clone(model).fit(ROWS[:, :4], targets)


def test_names_of_columns_are_kept_and_compared():
    pd = pytest.importorskip("pandas", reason="DataFrames are of pandas, of the extra tables")
    frame = pd.DataFrame(ROWS, columns=list("abcdef"))
    model = Classifier(learner()).fit(frame, pd.Series(NAMES[LABELS]))
    assert model.feature_names_in_.tolist() == list("abcdef")
    np.testing.assert_array_equal(
        model.predict(frame), Classifier(learner()).fit(ROWS, NAMES[LABELS]).predict(ROWS)
    )
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"a": "z"}))


REFUSED = {
    "more classes": (lambda: Classifier(learner()).fit(ROWS, np.arange(18) % 4), "3 outputs .* 4 classes"),
    "one class": (lambda: Classifier(learner()).fit(ROWS, np.zeros(18, int)), "all examples are of the class '0'"),
    "another class": (lambda: Classifier(learner(), classes=[0, 1, 3]).fit(ROWS, LABELS), "'2' is none of the given"),
    "no learner": (lambda: Classifier(MLP(6, 3)).fit(ROWS, LABELS), "got a MLP"),
    "no run": (lambda: Classifier("nowhere").fit(ROWS, LABELS), "nowhere holds no run"),
    "auto": (lambda: Classifier(learner(), steps="auto").fit(ROWS, LABELS), "steps is a whole number"),
    "statistics": (lambda: Classifier(learner(), statistics="all").fit(ROWS, LABELS), "there are: support, own"),
    "classes as numbers": (lambda: Regressor(learner()).fit(ROWS, VALUES), "take a FewShotClassifier"),
    "more targets": (lambda: Regressor(regressor()).fit(ROWS, ROWS[:, :2]), "1 outputs .* 2 targets"),
    "cubes": (lambda: Regressor(regressor()).fit(ROWS, ROWS[:, :, None]), "dim 3|shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_learner_can_do_is_refused(name):
    fit, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        fit()


# --- few shots, of a run --------------------------------------------------------------------------

QUICK = "--iterations 2 --meta-batch-size 2 --test-tasks 2 --validation-tasks 2 --shots 2 --query-shots 2"
QUICK += " --no-baselines"
TABLES = {
    "wear": "--target wear --features load heat",
    "state": "--target state --features load heat",
    "both": "--target wear heat --features load",
    "tool": "--target wear --features load --categorical tool",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The rows of machines, and of a run on them by name its directory, trained when it is first asked for."""
    pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
    folder, rows = tmp_path_factory.mktemp("estimators"), 120
    frame = pd.DataFrame({
        "machine": np.repeat([f"m{number}" for number in range(10)], 12),
        "load": RANDOM.random(rows) * 9, "heat": 20 + 5 * RANDOM.random(rows), "wear": 100 + 50 * RANDOM.random(rows),
        "tool": np.array(["mill", "lathe"])[RANDOM.integers(0, 2, rows)],
        "state": np.array([3, 20, 100])[np.arange(rows) % 3],
    })  # fmt: skip
    frame.to_csv(folder / "machines.csv", index=False)

    def run(name):
        if not (folder / name).exists():
            command = f"train table:{folder}/machines.csv --task machine {TABLES[name]} {QUICK} --out {folder / name}"
            main(command.split())
        return folder / name

    return frame, run


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("given", ["path", "run"])
def test_a_run_of_a_table_says_what_the_run_itself_says(table, name, given, tmp_path):
    frame, run = table
    own, later = frame[frame.machine == "m3"], frame[frame.machine == "m4"]
    opened = fomaml.load_run(run(name))
    expected = opened.adapt(own).predict(later)
    target = list(opened.settings.target)
    columns = opened.intake.features + list(opened.intake.categories)
    kind = Classifier if name == "state" else Regressor
    model = kind(opened if given == "run" else run(name))
    model.fit(own[columns], own[target] if len(target) > 1 else own[target[0]])
    assert model.feature_names_in_.tolist() == columns
    found = model.predict(later[columns])
    if name == "state":
        assert model.classes_.tolist() == [3, 20, 100] and expected.classes == ["3", "20", "100"]
        assert found.tolist() == [int(label) for label in expected.labels]
        np.testing.assert_array_equal(model.predict_proba(later[columns]), expected.probabilities)
    else:
        np.testing.assert_array_equal(
            found, expected.values.squeeze(1) if len(target) == 1 else expected.values
        )


def test_a_run_of_a_table_takes_arrays_of_its_features(table):
    frame, run = table
    own = frame[frame.machine == "m3"]
    by_name = Regressor(run("wear")).fit(own[["load", "heat"]], own.wear).predict(own[["load", "heat"]])
    rows = own[["load", "heat"]].to_numpy()
    np.testing.assert_array_equal(Regressor(run("wear")).fit(rows, own.wear).predict(rows), by_name)
    with pytest.raises(InputError, match="takes the 2 features load, heat, got 1"):
        Regressor(run("wear")).fit(rows[:, :1], own.wear)
    with pytest.raises(InputError, match="columns of text, tool: give a DataFrame"):
        Regressor(run("tool")).fit(rows, own.wear)


def test_a_class_that_the_rows_lack_is_one_of_the_run(table):
    frame, run = table
    own = frame[(frame.machine == "m3") & (frame.state != 20)]
    model = Classifier(run("state")).fit(own[["load", "heat"]], own.state)
    assert model.classes_.tolist() == [3, 20, 100]
    with pytest.raises(InputError, match="'7' is none of the run's"):
        Classifier(run("state")).fit(own[["load", "heat"]], own.state + 4)
    with pytest.raises(InputError, match="predicts classes: take a FewShotClassifier"):
        Regressor(run("state")).fit(own[["load", "heat"]], own.wear)
    with pytest.raises(InputError, match="predicts numbers: take a FewShotRegressor"):
        Classifier(run("wear")).fit(own[["load", "heat"]], own.state)


def test_a_run_of_pictures_takes_paths_and_arrays(images, tmp_path):
    from PIL import Image

    small = "--channels 4 --ways 2 --shares 0.4 0.3 0.3 --image-size 16 16"
    main(f"train folder:{images / 'even'} {small} {QUICK} --out {tmp_path / 'run'}".split())
    paths = [images / "even" / f"class{own}" / f"{number}.png" for own in (3, 4) for number in range(4)]
    labels = np.repeat([9, 10], 4)  # as text, "10" comes before "9"
    model = Classifier(tmp_path / "run").fit(paths, labels)
    folders = {"9": paths[:4], "10": paths[4:]}
    expected = fomaml.load_run(tmp_path / "run").adapt(folders).predict(paths).probabilities.numpy()
    order = [sorted(folders).index(name) for name in ("9", "10")]
    assert model.classes_.tolist() == [9, 10]
    np.testing.assert_allclose(model.predict_proba(paths), expected[:, order], atol=1e-12)
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.testing.assert_array_equal(
        Classifier(tmp_path / "run").fit(arrays, labels).predict_proba(arrays), model.predict_proba(paths)
    )
    assert cross_val_score(model, paths, labels, cv=2, error_score="raise").shape == (2,)
    with pytest.raises(InputError, match=r"\(rows, height, width\)"):
        model.predict(arrays.reshape(8, -1))


# --- without scikit-learn -------------------------------------------------------------------------


def test_without_scikit_learn_the_extra_is_named():
    names = ["FewShotClassifier", "FewShotRegressor", "MetaClassifier", "MetaRegressor"]
    code = f"import sys; sys.modules['sklearn'] = None\nimport fomaml\nfor name in {names}:\n"
    code += "  try: getattr(fomaml, name)\n  except fomaml.InputError as error: print(error)"
    root = str(Path(fomaml.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": root}
    )
    expected = "the estimators need scikit-learn, 1.6 or later: pip install 'fomaml[sklearn]'\n"
    assert (done.stdout, done.stderr) == (4 * expected, "")
