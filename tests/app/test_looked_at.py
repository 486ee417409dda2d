"""Test tasks looked at: the scores of the result, and what the adapted learner says."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from fomaml.app.build import open_data
from fomaml.app.cli import main
from fomaml.app.looked_at import look
from fomaml.app.rundir import load_run

pd = pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
QUICK = (
    "--iterations 4 --meta-batch-size 2 --test-tasks 7 --validation-tasks 4 --test-steps 0 3 --no-baselines"
)
SOURCES = {
    "values": f"table:FILE --task machine --target wear --features load --shots 3 --query-shots 4 {QUICK}",
    "states": f"table:FILE --task machine --target state --features load --shots 2 --query-shots 3 {QUICK}",
    "drawn": f"table:FILE --task machine --target state --features load --ways 2 --query-shots 3 {QUICK} --shots 2",
    "functions": f"sinusoid {QUICK}",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Name → the directory of its run."""
    folder = tmp_path_factory.mktemp("looked")
    random = np.random.default_rng(0)
    pd.DataFrame({
        "machine": np.repeat([f"m{number}" for number in range(10)], 24),
        "load": random.random(240) * 9,
        "wear": 100 + 50 * random.random(240),
        "state": np.array(["good", "bad", "worn"])[np.arange(240) % 3],
    }).to_csv(folder / "rows.csv", index=False)  # fmt: skip
    made = {}

    def of(name):
        if name not in made:
            made[name] = folder / name
            words = SOURCES[name].replace("FILE", str(folder / "rows.csv")).split()
            main(["train", *words, "--out", str(made[name])])
        return made[name]

    return of


def looked_at(path, shown=3):
    settings, learner = load_run(path)
    data = open_data(settings)
    return look(settings, learner, data, settings.test_tasks, shown, []), settings, learner, data


@pytest.mark.parametrize("name", SOURCES)
def test_scores_are_those_of_the_result(name, run):
    result = json.loads((run(name) / "result.json").read_text())
    looked, _, _, data = looked_at(run(name))
    for row in result["rows"]:
        scores = looked.scores[row["steps"]]
        if "by_group" not in row:
            assert scores.mean().item() == pytest.approx(row["mean"])
            continue
        for group, mean in row["by_group"].items():
            own = [s for number, s in enumerate(scores.tolist()) if data.test.group(number) == group]
            assert np.mean(own) == pytest.approx(mean)


@pytest.mark.parametrize("name", ["values", "functions"])
def test_values_are_those_of_the_adapted_module(name, run):
    looked, _, learner, data = looked_at(run(name))
    scale = 1.0, 0.0
    if name == "values":
        frame = pd.read_csv(run(name).parent / "rows.csv")
        config = json.loads((run(name) / "config.json").read_text())
        own = frame.wear[frame.machine.isin(config["facts"]["split"]["train"])]
        scale = own.std(ddof=0), own.mean()
    for task in looked.shown:
        support, query = data.test[task.number]
        for steps, said in ((0, task.said_before), (3, task.said_after)):
            with torch.no_grad():
                expected = learner.adapt(support, steps).eval()(query.inputs) * scale[0] + scale[1]
            assert said.numpy() == pytest.approx(expected.double().numpy(), rel=1e-4, abs=1e-4)
        goals = query.targets.double() * scale[0] + scale[1]
        assert task.task.query.targets.numpy() == pytest.approx(goals.numpy(), rel=1e-5)
        x, before, after = task.curve
        if name == "functions":
            for steps, curve in ((0, before), (3, after)):
                with torch.no_grad():
                    expected = learner.adapt(support, steps).eval()(x.float()[:, None]).flatten()
                assert curve.numpy() == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-4)
        else:  # inputs are in their own unit again
            loads = frame.load[frame.machine == data.test.group(task.number)].to_numpy()
            for load in task.task.query.inputs.flatten().tolist():
                assert np.abs(loads - load).min() < 1e-5
            assert x.min() < min(part.inputs.min() for part in task.task)
    truth = torch.cat([data.test[number].query.targets for number in range(7)]).double() * scale[0] + scale[1]
    assert looked.truth.numpy() == pytest.approx(truth.numpy(), rel=1e-5)


@pytest.mark.parametrize("name", ["states", "drawn"])
def test_confusions_are_those_of_the_adapted_modules(name, run):
    looked, _, learner, data = looked_at(run(name))
    expected, confidences = Counter(), []
    for number in range(7):
        support, query = data.test[number]
        classes = data.test.classes_of(number)
        with torch.no_grad():
            logits = learner.adapt(support, 3).eval()(query.inputs)
        for true, guess in zip(query.targets.tolist(), logits.argmax(1).tolist()):
            expected[classes[true], classes[guess]] += 1
        confidences += logits.double().softmax(1).amax(1).tolist()
    assert looked.confusions == expected
    [found] = looked.reliable.values()
    assert found.examples.sum() == sum(expected.values())
    right = sum(number for (true, guess), number in expected.items() if true == guess)
    assert (found.examples * found.accuracy).sum().item() == pytest.approx(right)
    assert (found.examples * found.confidence).sum().item() == pytest.approx(sum(confidences), rel=1e-4)


@pytest.mark.parametrize("name", ["states", "functions"])
def test_the_first_tasks_and_the_worst_are_shown(name, run):
    looked, *_ = looked_at(run(name), shown=2)
    scores = looked.scores[3].tolist()
    worst = min(range(7), key=lambda number: scores[number] * looked.metric.direction)
    assert looked.worst(7) == sorted(range(7), key=lambda n: scores[n] * looked.metric.direction)
    assert [task.number for task in looked.shown] == ([0, worst] if worst > 1 else [0, 1])
    assert [task.after for task in looked.shown] == [scores[task.number] for task in looked.shown]
    assert looked_at(run(name), shown=0)[0].shown == []
