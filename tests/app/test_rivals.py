"""The baselines of groups of rows stand in the result of a run, on the learner's tasks; LOSES where they are better."""

import json

import numpy as np
import pytest
import torch

from fomaml import GroupEpisodes, GroupSource, estimate
from fomaml.app import pretrained, rivals
from fomaml.app.cli import main
from fomaml.baselines import fit_estimator
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import RegressionEpisodes

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
KNeighborsRegressor = pytest.importorskip(
    "sklearn.neighbors", reason="needs scikit-learn, of the extra metrics"
).KNeighborsRegressor
QUICK = "--iterations 3 --meta-batch-size 2 --test-tasks 6 --validation-tasks 4 --test-steps 0 1 --shots 2"
QUICK += " --query-shots 3 --inner-lr 1e-6 --seed 3"
NETWORK = [
    "all tasks pooled, not adapted",
    "all tasks pooled, fine-tuned",
    "all tasks pooled, head fine-tuned",
]
START = "random start, support set only"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Machines whose wear is one line in load, with an offset of each; "state" says whether it is large."""
    random = np.random.default_rng(0)
    machine = np.repeat(np.arange(12), 16)
    load = random.random(len(machine))
    wear = 10 * load + random.normal(0, 0.3, 12)[machine]
    state = np.where(wear > np.median(wear), "bad", "good")
    state[::8], state[1::8] = "good", "bad"  # of each some in every machine
    state[2::8], state[3::8] = "good", "bad"
    state[4::8] = "good"
    state[5::8] = "bad"
    path = tmp_path_factory.mktemp("rivals") / "machines.csv"
    frame = pd.DataFrame({"machine": machine, "load": load, "heat": random.random(len(load)), "wear": wear})
    frame.assign(state=state).to_csv(path, index=False)
    return path


@pytest.fixture
def quick(monkeypatch):
    """Forests of few trees; networks that are trained and tuned for a few steps."""
    fine_tune, pretrain = rivals.fine_tune, pretrained.pretrain
    few = {"tuning_tasks": 2, "inner_lrs": (0.01, 0.1), "at_steps": (1, 3)}
    monkeypatch.setattr(rivals, "fine_tune", lambda *data, **options: fine_tune(*data, **(options | few)))
    monkeypatch.setattr(
        pretrained,
        "pretrain",
        lambda *data, **options: pretrain(*data, **(options | {"iterations": 60, "lr": 0.01})),
    )
    tune = rivals.tune_estimator
    monkeypatch.setattr(
        rivals,
        "tune_estimator",
        lambda *data, **options: tune(*data, **(options | {"trials": 3, "tuning_tasks": 2})),
    )


def trained(table, out, *options):
    main(["train", f"table:{table}", "--task", "machine", *options, *QUICK.split(), "--out", str(out)])
    return json.loads((out / "result.json").read_text())


def rows_of(result):
    return {row["label"]: row for row in result["rows"][2:]}


def test_of_regression(table, tmp_path, quick):
    result = trained(
        table, tmp_path / "run", "--target", "wear", "--features", "load", "heat", "--metric", "mae", "rmse"
    )
    rows = rows_of(result)
    pooled = "support set and pooled rows"
    assert list(rows) == [
        *NETWORK, START, f"nearest neighbours, {pooled}", f"ridge, {pooled}", f"random forest, {pooled}",
        "ridge, support set only",
    ]  # fmt: skip
    assert [row["to"] for row in result["differences"]] == list(rows)
    headline = result["rows"][1]["mean"]
    for row, difference in zip(rows.values(), result["differences"]):
        assert difference["mean"] == pytest.approx(headline - row["mean"])
    assert list(rows_of(result["others"][0])) == list(rows)
    # a learner that has hardly learned, beside a line: in words too
    assert rows[f"ridge, {pooled}"]["mean"] < rows[START]["mean"]
    assert " LOSES to the baseline " in (tmp_path / "run" / "result.txt").read_text()
    # the ridge by hand, in the unit of the targets
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    split = config["facts"]["split"]
    frame = pd.read_csv(table)
    source = GroupSource(frame[["load", "heat"]].to_numpy(), frame.wear, frame.machine.astype(str))
    train, test = source.select(split["train"]), source.select(split["test"])
    scaling = train.fit_scaling()
    episodes = GroupEpisodes(test.scaled(scaling), shots=2, query_shots=3, seed=11, in_turn=True)
    settings = rows["ridge, support set only"]["settings"]
    found = fit_estimator("ridge", episodes, options=settings, tasks=6, metric="mae")
    deviation = scaling.targets[""].deviation[0]
    own = estimate(episodes.by_group(found * deviation))
    by_group = rows["ridge, support set only"]["by_group"]
    one_after_the_other = [test.names[task % len(test)] for task in range(6)]
    assert by_group == pytest.approx(
        {
            name: sum(
                deviation * float(found[task]) for task in range(6) if one_after_the_other[task] == name
            )
            / one_after_the_other.count(name)
            for name in test.names
        },
        rel=1e-5,
    )
    assert rows["ridge, support set only"]["mean"] == pytest.approx(own.mean, rel=1e-5)
    assert rows["ridge, support set only"]["interval"] == pytest.approx(own.interval, rel=1e-5)


def test_of_classes_that_are_fixed_and_of_classes_that_are_drawn(table, tmp_path, quick):
    options = ["--target", "state", "--features", "load", "heat"]
    rows = rows_of(trained(table, tmp_path / "fixed", *options))
    pooled = "support set and pooled rows"
    assert list(rows) == [
        *NETWORK, START, f"nearest neighbours, {pooled}", f"ridge, {pooled}", f"random forest, {pooled}",
    ]  # fmt: skip
    assert rows[f"ridge, {pooled}"]["trials"] == 3
    rows = rows_of(trained(table, tmp_path / "drawn", *options, "--ways", "2"))
    assert list(rows) == [
        "pretrained classifier, fine-tuned", START, "nearest neighbours, support set", "ridge, support set",
        "random forest, support set",
    ]  # fmt: skip


def test_without_scikit_learn_it_is_said(table, tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    result = trained(table, tmp_path / "run", "--target", "wear", "--features", "load", "--metric", "mse")
    assert list(rows_of(result)) == [*NETWORK, START]
    assert "baseline: nothing without a network: it needs scikit-learn" in capsys.readouterr().out


def test_they_are_the_same_again_and_end_where_a_run_is_killed(table, tmp_path, quick, monkeypatch):
    options = ["--target", "wear", "--features", "load"]
    whole = trained(table, tmp_path / "whole", *options)
    with monkeypatch.context() as broken:
        broken.setattr(
            rivals, "tune_estimator", lambda *data, **options: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(SystemExit):
            trained(table, tmp_path / "killed", *options)
    begun = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert list(rows_of(begun)) == [*NETWORK, START] and "unfinished" in begun
    main(["train", "--resume", str(tmp_path / "killed")])
    again = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert again["rows"] == whole["rows"] and again["differences"] == whole["differences"]
    assert torch.tensor([row["mean"] for row in again["rows"]]).isfinite().all()


def test_of_functions(tmp_path, quick):
    """The pooled network, and neighbours of the support set alone: another function's points say nothing."""
    out = tmp_path / "run"
    more = ["--shots", "10", "--query-shots", "20", "--test-tasks", "60", "--out", str(out)]
    main(["train", "sinusoid", *QUICK.split(), *more])
    result = json.loads((out / "result.json").read_text())
    rows = rows_of(result)
    assert list(rows) == [*NETWORK, START, "nearest neighbours, support set", "ridge, support set"]
    assert [row["to"] for row in result["differences"]] == list(rows)
    assert " LOSES to the baseline " in (out / "result.txt").read_text()
    row = rows["nearest neighbours, support set"]
    options, errors = row["settings"], []
    for index in range(60):  # by hand
        (xs, ys), (xq, yq) = RegressionEpisodes(Sinusoids(), shots=10, query_shots=20, seed=11)[index]
        model = KNeighborsRegressor(min(options["n_neighbors"], 10), weights=options["weights"]).fit(xs, ys)
        errors.append(float(np.mean((model.predict(xq.numpy()) - yq.numpy()) ** 2)))
    assert row["mean"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_of_functions_with_a_loss_of_ones_own_no_estimator(tmp_path, quick, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_loss.py").write_text(
        "def absolute(forward, examples):\n    return (forward(examples.inputs) - examples.targets).abs().mean()\n"
    )
    main(["train", "sinusoid", *QUICK.split(), "--loss", "own_loss.py:absolute", "--out", "run"])
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(rows_of(result)) == [*NETWORK, START]
    assert "baseline: nothing without a network: an estimator has no --loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source", ["sinusoid", "table:{table} --task machine --target wear --features load --metric mae rmse"]
)
def test_a_run_is_evaluated_beside_the_baselines_that_its_training_would_have_had(
    source, table, tmp_path, quick, capsys
):
    given = ["train", *source.format(table=table).split(), *QUICK.split()]
    main([*given, "--out", str(tmp_path / "with")])
    main([*given, "--out", str(tmp_path / "without"), "--no-baselines"])
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "without"), "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert len(plain["rows"]) == 2 and plain["differences"] == []
    main(["evaluate", str(tmp_path / "without"), "--json", "--baselines"])
    told = capsys.readouterr()
    found, trained = json.loads(told.out), json.loads((tmp_path / "with" / "result.json").read_text())
    assert found["rows"] == trained["rows"] and found["differences"] == trained["differences"]
    assert found.get("others") == trained.get("others")
    assert "baseline: the same network from a random start" in told.err
    main(["evaluate", str(tmp_path / "without"), "--baselines"])
    assert " the baseline " in capsys.readouterr().out


def test_on_the_validation_part_baselines_are_not_tuned_on_what_is_judged(
    table, tmp_path, quick, monkeypatch
):
    options = ["--target", "wear", "--features", "load", "--no-baselines"]
    trained(table, tmp_path / "run", *options)
    fine_tune, seen = rivals.fine_tune, []

    def noted(model, tuning, test, **options):
        seen.append((set(tuning.source.names), set(test.source.names)))
        return fine_tune(model, tuning, test, **options)

    monkeypatch.setattr(rivals, "fine_tune", noted)
    split = json.loads((tmp_path / "run" / "config.json").read_text())["facts"]["split"]
    for part, tuned in (("test", "validation"), ("validation", "train")):
        main(["evaluate", str(tmp_path / "run"), "--baselines", "--part", part])
        assert seen and all(each == (set(split[tuned]), set(split[part])) for each in seen)
        seen.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--baselines --balanced", "--balanced scales the outputs of the learner alone: give no --baselines"),
        ("--baseline-size full", "--baseline-size is of baselines: give --baselines beside it"),
        ("--model-weights x.safetensors", "--model-weights is of baselines: give --baselines beside it"),
        ("--baselines --model-weights x", "the run in {run} began with no file of weights: give no"),
        ("--baselines --baseline-size most", "unknown baseline size 'most'; there are: run, full"),
    ],
)
def test_what_does_not_go_with_an_evaluation(options, message, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", "sinusoid", *QUICK.split(), "--no-baselines", "--out", str(run)])
    with pytest.raises(SystemExit) as status:
        main(["evaluate", str(run), *options.split()])
    assert status.value.code == 2 and message.format(run=run) in capsys.readouterr().err
