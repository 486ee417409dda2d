"""The search over settings: seeded, recorded, resumable; failures count as the worst."""

import json
import math
import warnings

import pytest

from fomaml import tuning
from fomaml.errors import InputError
from fomaml.tuning import Choice, LogUniform, Trial, Uniform, search, settings_of

SPACE = {
    "inner_lr": LogUniform(1e-3, 1.0),
    "steps": LogUniform(1, 20, whole=True),
    "share": Uniform(-1.0, 3.0),
    "kind": Choice(["a", "b", None]),
}


def test_trials_are_functions_of_seed_and_number():
    forward = [settings_of(SPACE, 3, number) for number in range(12)]
    assert [settings_of(SPACE, 3, number) for number in reversed(range(12))] == forward[::-1]
    assert len({json.dumps(own) for own in forward}) == 12
    assert settings_of(SPACE, 4, 0) != forward[0]
    assert search(SPACE, 12, lambda own: own["share"], seed=3).trials == [
        Trial(number, own, own["share"]) for number, own in enumerate(forward)
    ]


def test_values_cover_their_ranges_evenly():
    drawn = [settings_of(SPACE, 0, number) for number in range(256)]
    logs = [math.log10(own["inner_lr"]) for own in drawn]
    assert min(logs) >= -3 and max(logs) <= 0
    for low in (-3, -2, -1):  # a third of them in each order of magnitude
        assert sum(low <= own < low + 1 for own in logs) == pytest.approx(256 / 3, abs=3)
    steps = [own["steps"] for own in drawn]
    assert set(steps) == set(range(1, 21)) and all(type(own) is int for own in steps)
    assert sum(own <= 4 for own in steps) == pytest.approx(256 * math.log(5) / math.log(21), abs=6)
    assert all(-1 <= own["share"] <= 3 for own in drawn)
    assert sum(own["share"] < 0 for own in drawn) == pytest.approx(64, abs=3)
    for kind in SPACE["kind"].options:
        assert sum(own["kind"] == kind for own in drawn) == pytest.approx(256 / 3, abs=3)
    assert all(own["inner_lr"] == float(f"{own['inner_lr']:.3g}") for own in drawn)  # as it is typed


@pytest.mark.parametrize("direction", [1, -1])
def test_the_best_in_the_metrics_direction(direction):
    def score(own):
        return abs(math.log10(own["inner_lr"]) + 1.5)

    found = search(SPACE, 16, score, direction=direction, seed=1)
    expected = sorted((score(settings_of(SPACE, 1, n)), n) for n in range(16))
    assert found.best.number == expected[0 if direction < 0 else -1][1]
    assert found.best == found.trials[found.best.number]
    same = search(SPACE, 5, lambda own: 1.0, direction=direction)
    assert same.best.number == 0  # of equal ones the earliest


def test_failures_are_the_worst_and_say_why():
    def score(own):
        if own["steps"] > 12:
            raise InputError("the meta-loss is nan at iteration 3")
        if own["steps"] > 5:
            return math.nan if own["kind"] == "a" else -math.inf
        if own["steps"] == 1:
            warnings.warn("outputs of some tasks are no numbers", RuntimeWarning, stacklevel=1)
        return -1000.0 + own["steps"]

    found = search(SPACE, 32, score, seed=2)
    assert found.best.score == max(t.score for t in found.trials if t.score is not None)
    for trial in found.trials:
        steps = trial.settings["steps"]
        assert (trial.score is None) == (steps > 5)
        if steps > 12:
            assert trial.reason == "the meta-loss is nan at iteration 3"
        elif steps > 5:
            assert trial.reason in ("the score is nan", "the score is -inf")
        else:
            assert trial.reason == ("outputs of some tasks are no numbers" if steps == 1 else "")
    assert {trial.reason for trial in found.trials} >= {"the score is nan", "the score is -inf", ""}
    with pytest.raises(InputError, match=r"^all 3 trials have failed; the first one: the score is nan$"):
        search(SPACE, 3, lambda own: math.nan)


def test_other_errors_and_warnings_are_not_swallowed():
    def broken(own):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(SPACE, 3, broken)
    with pytest.warns(DeprecationWarning, match="old"):

        def old(own):
            warnings.warn("old", DeprecationWarning, stacklevel=1)
            return 1.0

        warnings.simplefilter("default", DeprecationWarning)
        search(SPACE, 1, old)


def test_a_search_goes_on_from_its_record():
    tried, lines = [], []

    def score(own):
        tried.append(own)
        return own["share"] if own["steps"] > 3 else math.nan

    whole = search(
        SPACE, 10, score, seed=7, note=lambda trial: lines.append(json.dumps(tuning.to_json(trial)))
    )
    assert len(tried) == 10
    record = [tuning.from_json(json.loads(line)) for line in lines]
    assert record == whole.trials
    for kept in (record[:4], [record[2], record[9]], record):
        tried.clear()
        assert search(SPACE, 10, score, seed=7, finished=kept) == whole
        assert len(tried) == 10 - len(kept)
    with pytest.raises(InputError, match=r"^trial 0 of the record has .* of another space or seed$"):
        search(SPACE, 10, score, seed=8, finished=record)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogUniform(0, 1), "low must be a positive finite number, got 0"),
        (lambda: LogUniform(1, 2.5, whole=True), "high must be a whole number of 1 or more, got 2.5"),
        (lambda: LogUniform(2, 1), "high must be 2, the low, or more, got 1"),
        (lambda: Uniform(1, math.inf), "low and high must be finite and in this order, got 1 and inf"),
        (lambda: Choice([]), "a Choice is of a list of one or more values, got []"),
        (lambda: Choice("ab"), "a Choice is of a list of one or more values, got 'ab'"),
        (lambda: search(SPACE, 0, lambda own: 1.0), "trials must be a whole number of 1 or more, got 0"),
        (lambda: search({}, 1, lambda own: 1.0), "there is nothing to search: the space is empty"),
        (lambda: search(SPACE, 1, lambda own: None), "a score is a number, got None"),
        (lambda: search(SPACE, 1, lambda own: 1.0, direction=0), "direction is 1 or -1, got 0"),
        (
            lambda: tuning.from_json({"x": 1}),
            "expected a trial as tuning.to_json gives it, got {'x': 1}",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == message
