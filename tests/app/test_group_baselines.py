"""What a run on groups of rows is compared with: which baselines there are, and that they see what they are said to."""

import json

import numpy as np
import pytest

from fomaml.app import sizing
from fomaml.app.build import open_data
from fomaml.app.cli import main
from fomaml.app.rundir import load_settings

pytest.importorskip("sklearn", reason="scikit-learn computes baselines, of the extra metrics")
QUICK = "--iterations 2 --meta-batch-size 2 --test-tasks 8 --validation-tasks 4 --test-steps 0 1 --shots 2"
QUICK = [*QUICK.split(), "--query-shots", "3", "--task", "key"]
FOREST = "random forest on pooled rows and the support set, on 2 tasks"
NETWORKS = [
    "random start, support set only",
    "pooled training tasks, not adapted",
    "pooled training tasks, fine-tuned",
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Ten groups of rows: y is x₀ plus the number of the group, and label whether x₀ is above 0."""
    path = tmp_path_factory.mktemp("baselines") / "rows.npz"
    random = np.random.default_rng(0)
    key = np.arange(10).repeat(24)
    x = random.normal(size=(240, 2))
    y = x[:, 0] + key
    label, kind = (x[:, 0] > 0).astype(int), key * 4 + np.arange(240) % 4
    np.savez(path, x=x, key=key, y=y, label=label, kind=kind, image=x.repeat(8, 1).reshape(240, 4, 4))
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    sizes = sizing.Sizes(4, 4, 2, (1, 5), 5)
    monkeypatch.setattr(sizing, "sized", lambda settings: sizes)


def run(file, tmp_path, *options):
    main(["train", f"arrays:{file}", *QUICK, *options, "--out", str(tmp_path / "run")])
    return json.loads((tmp_path / "run" / "result.json").read_text())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--inputs", "x", "--target", "y"], [*NETWORKS, "ridge on the support set", FOREST]),
        (["--inputs", "x", "--target", "label"], [*NETWORKS, "nearest neighbour in the support set", FOREST]),
        (["--inputs", "image", "--target", "y"], [*NETWORKS, "ridge on the support set"]),
        (["--inputs", "x", "--target", "kind", "--ways", "3"],
         [NETWORKS[0], NETWORKS[2], "nearest neighbour in the support set"]),
    ],
)  # fmt: skip
def test_a_run_has_the_baselines_that_fit_its_tasks(options, expected, file, tmp_path):
    result = run(file, tmp_path, *options)
    labels = [row["label"].replace(", on 4 tasks", "") for row in result["rows"][2:]]
    assert labels == expected
    assert [row["to"].replace(", on 4 tasks", "") for row in result["differences"]] == expected
    assert all(np.isfinite(row["mean"]) for row in result["rows"])


def test_ridge_is_told_in_the_unit_of_the_targets(file, tmp_path):
    """Against normal equations in numpy, on the rows of each task: its mean over groups."""
    result = run(file, tmp_path, "--inputs", "x", "--target", "y")
    found = next(row for row in result["rows"] if row["label"] == "ridge on the support set")
    arrays, settings = np.load(file), load_settings(tmp_path / "run")
    test = open_data(settings).test
    rows = np.isin(arrays["key"], [int(name) for name in settings.facts["split"]["train"]])
    x = (arrays["x"] - arrays["x"][rows].mean(0)) / arrays["x"][rows].std(0)
    mean, deviation = arrays["y"][rows].mean(), arrays["y"][rows].std()
    by_group = {}
    for index in range(8):
        support, query = test.rows(index)
        y = (arrays["y"] - mean) / deviation
        centre = x[support].mean(0)
        inputs = x[support] - centre
        weights = np.linalg.solve(inputs.T @ inputs + np.eye(2), inputs.T @ (y[support] - y[support].mean()))
        told = ((x[query] - centre) @ weights + y[support].mean()) * deviation + mean
        error = np.sqrt(np.mean((told - arrays["y"][query]) ** 2))
        by_group.setdefault(arrays["key"][query[0]], []).append(error)
    assert found["mean"] == pytest.approx(np.mean([np.mean(own) for own in by_group.values()]), rel=1e-4)


def test_without_scikit_learn_there_are_the_networks(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.ensemble", None)
    result = run(file, tmp_path, "--inputs", "x", "--target", "y")
    assert len(result["rows"]) == 5
    assert "baseline: none without a network: pip install 'fomaml[metrics]'" in capsys.readouterr().out
