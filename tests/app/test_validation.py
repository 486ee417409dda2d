"""Validation while training: the best weights are kept, training stops on request, and a kill changes nothing."""

import json
import math

import pytest
import torch

import characters
from commands import refused
from fomaml import checkpoint
from fomaml.app import session, states
from fomaml.app.cli import main
from fomaml.app.rundir import load_settings, parsed_line
from fomaml.app.session import train_run
from fomaml.app.settle import settle
from fomaml.app.validate import Best
from fomaml.errors import InputError
from fomaml.evaluate import Estimate
from moments import TICK, Ticking

pytestmark = pytest.mark.usefixtures("small")

OPTIONS = {
    "source": "omniglot", "model": "conv4-strided", "channels": (4,), "ways": 3, "query_shots": 2, "inner_steps": 1,
    "meta_batch_size": 2, "iterations": 8, "schedule": "constant", "validate_every": 2, "validation_tasks": 5,
    "checkpoint_every": 3, "test_tasks": 4, "test_steps": (0, 1), "baselines": False,
}  # fmt: skip


OF_ITS_TIME = ["training_seconds", "validation_seconds", "date", "commit", "digest", "metrics.jsonl crc32"]


class Killed(BaseException):
    pass


def settings(root, **options):
    return settle(**{**OPTIONS, "data_root": root, **options})


def quiet(config, out, **options):
    return train_run(config, out, say=lambda line: None, **options)


def finds(monkeypatch, accuracies):
    """Let the validations find these accuracies, by iteration."""

    def found(config, learner, data, group):
        return dict.fromkeys(config.test_steps, Estimate(accuracies[learner.iteration + 1], 0.01))

    monkeypatch.setattr(session, "validate", found)


def weights(path):
    tensors, _ = checkpoint.load_tensors(path)
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def records(out):
    return [parsed_line(line) for line in (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)]


def assert_same_run(a, b):
    """Bit for bit, but for the time it took."""
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    for name in names:
        if name.endswith(".safetensors") or name == "result.txt":
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, other = ([{**record, "seconds": 0} for record in records(out)] for out in (a, b))
    assert one == other
    one, other = (json.loads((out / "result.json").read_text()) for out in (a, b))
    assert {**one, **dict.fromkeys(OF_ITS_TIME)} == {**other, **dict.fromkeys(OF_ITS_TIME)}


# --- which weights --------------------------------------------------------------------------------


def test_the_best_weights_are_the_runs_and_the_last_are_kept_beside(root, tmp_path, monkeypatch):
    finds(monkeypatch, {2: 0.5, 4: 0.7, 6: 0.6, 8: 0.7})  # ties keep the earlier
    result = quiet(settings(root), tmp_path / "a")
    assert result["weights"] == {
        "kept": "best by validation",
        "iteration": 4,
        "accuracy": 0.7,
        "interval": 0.01,
        "by_steps": dict.fromkeys(map(str, settings(root).test_steps), 0.7),
        "validation_tasks": 5,
    }
    assert result["iterations"] == 8
    assert json.loads((tmp_path / "a" / "result.json").read_text())["weights"] == result["weights"]
    finds(monkeypatch, {2: 0.1, 4: 0.2})
    shorter = quiet(settings(root, iterations=4), tmp_path / "b")
    assert torch.equal(weights(tmp_path / "a/weights.safetensors"), weights(tmp_path / "b/last.safetensors"))
    assert shorter["rows"] == result["rows"]  # the best were judged, not the last
    finds(monkeypatch, {2: 0.1, 4: 0.1, 6: 0.1, 8: 0.2})
    quiet(settings(root), tmp_path / "c")
    assert torch.equal(weights(tmp_path / "c/weights.safetensors"), weights(tmp_path / "a/last.safetensors"))
    assert not torch.equal(
        weights(tmp_path / "a/weights.safetensors"), weights(tmp_path / "a/last.safetensors")
    )


def test_without_validation_the_last_weights_are_the_runs(root, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "validate", lambda *_: pytest.fail("validated"))
    result = quiet(settings(root, validate_every=0), tmp_path / "a")
    assert result["weights"] == {"kept": "last", "iteration": 8}
    assert not (tmp_path / "a" / "last.safetensors").exists()


def test_validation_does_not_touch_the_training(root, tmp_path):
    quiet(settings(root), tmp_path / "a")
    quiet(settings(root, validate_every=0), tmp_path / "b")
    assert torch.equal(weights(tmp_path / "a/last.safetensors"), weights(tmp_path / "b/weights.safetensors"))


def test_a_validation_is_an_evaluation_on_the_validation_classes(root, tmp_path, capsys):
    """The record of the best is what `evaluate --part validation` finds."""
    config = settings(
        root, test_query_shots=3, test_augment="turns", statistics="with-query", validation_tasks=30
    )
    found = quiet(config, tmp_path / "a")["weights"]
    for part, options, same in (
        ("validation", [], True),
        ("validation", ["--statistics", "own"], False),
        ("test", [], False),
    ):
        main(["evaluate", str(tmp_path / "a"), "--part", part, *options, "--tasks", "30", "--json"])
        result = json.loads(capsys.readouterr().out)
        assert ((result["accuracy"], result["interval"]) == (found["accuracy"], found["interval"])) == same
        assert ([row["mean"] for row in result["rows"]] == list(found["by_steps"].values())) == same
        assert result["protocol"]["query_shots"] == 3 and result["part"] == part


def test_evaluate_takes_copies(root, tmp_path, capsys):
    quiet(settings(root), tmp_path / "a")
    base = ["evaluate", str(tmp_path / "a"), "--tasks", "5"]
    main([*base, "--copies", "3", "--jitter", "0.125", "--json"])
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert (protocol["copies"], protocol["jitter"]) == (3, 0.125)
    main([*base, "--copies", "3", "--jitter", "0.125"])
    assert "each image 3 times (jitter 0.125)" in capsys.readouterr().out
    main([*base])
    assert "times" not in capsys.readouterr().out
    for options, message in (
        (["--jitter", "0.1"], "--jitter moves the copies of each image: give --copies, 2 or more"),
        (["--copies", "2"], "2 copies of each image are the same without jitter, got jitter 0.0"),
        (["--copies", "0"], "--copies must be a whole number of 1 or more, got 0"),
        (["--copies", "2", "--jitter", "-1"], "--jitter must be 0 or more and below 1, got -1.0"),
    ):
        with pytest.raises(SystemExit):
            main([*base, *options])
        assert message in " ".join(capsys.readouterr().err.split())


def test_evaluate_says_where_it_took_the_balance_of_the_query_set_for_known(root, tmp_path, capsys):
    quiet(settings(root), tmp_path / "a")
    base = ["evaluate", str(tmp_path / "a"), "--tasks", "50"]
    main([*base, "--balanced", "--statistics", "own", "support", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["protocol"]["balanced"] and result["by_statistics"]["support"]["protocol"]["balanced"]
    main([*base, "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert not plain["protocol"]["balanced"] and plain["accuracy"] != result["accuracy"]
    main([*base, "--balanced"])
    assert ", balanced: the same number of query examples per class assumed\n" in capsys.readouterr().out
    main(base)
    assert "balanced" not in capsys.readouterr().out


def test_metrics_hold_the_validations_and_seconds_of_training_alone(root, tmp_path, monkeypatch):
    clock = Ticking(monkeypatch)

    def slow(config, learner, data, group):
        clock.sleep(0.5)
        return dict.fromkeys(config.test_steps, Estimate(0.25, 0.125))

    monkeypatch.setattr(session, "validate", slow)
    result = quiet(settings(root), tmp_path / "a")
    written = records(tmp_path / "a")
    found = [(r["iteration"], r["validation"], r["interval"]) for r in written if "validation" in r]
    assert found == [(iteration, 0.25, 0.125) for iteration in (2, 4, 6, 8)]
    seconds = [record["seconds"] for record in written]
    assert seconds == sorted(seconds) and seconds[0] == pytest.approx(TICK)
    assert seconds[-1] == pytest.approx(8 * TICK)  # one look before an iteration, one after
    assert result["validation_seconds"] == pytest.approx(2, abs=0.06)
    assert result["training_seconds"] == pytest.approx(seconds[-1], abs=0.06)


def test_the_last_iteration_is_validated_whatever_the_interval(root, tmp_path):
    quiet(settings(root, iterations=5, validate_every=3), tmp_path / "a")
    assert [r["iteration"] for r in records(tmp_path / "a") if "validation" in r] == [3, 5]


def test_by_default_a_tenth_of_the_iterations(root, tmp_path):
    quiet(settings(root, iterations=20, validate_every=None), tmp_path / "a")
    assert [r["iteration"] for r in records(tmp_path / "a") if "validation" in r] == list(range(2, 21, 2))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["validate_every"] == 2


# --- stopping early -------------------------------------------------------------------------------


def test_training_stops_after_so_many_validations_without_a_better_one(root, tmp_path, monkeypatch):
    finds(monkeypatch, {2: 0.5, 4: 0.4, 6: 0.6, 8: 0.6, 10: 0.1, 12: 0.9})
    result = quiet(settings(root, iterations=12, patience=2), tmp_path / "a")
    assert result["iterations"] == 10 and result["weights"]["iteration"] == 6
    assert records(tmp_path / "a")[-1]["iteration"] == 10
    result = quiet(settings(root, iterations=12, patience=3), tmp_path / "b")
    assert result["iterations"] == 12 and result["weights"]["iteration"] == 12


def test_best_counts_what_was_not_better():
    best = Best()
    assert best.beaten_by(Estimate(0.0, 0.1), 5)  # the first one is the best, even if it is 0
    assert [best.beaten_by(Estimate(0.0, 0.1), i) for i in (10, 15)] == [False, False]
    assert (best.iteration, best.waited) == (5, 2)
    assert best.beaten_by(Estimate(0.1, 0.2), 20)
    assert best == Best(0.1, 0.2, 20, 0)
    least = Best()
    found = [
        least.beaten_by(Estimate(mean, 0.1), i + 1, -1)
        for i, mean in enumerate((math.nan, 3, 4, 2, math.nan))
    ]
    assert found == [False, True, False, True, False] and least == Best(2, 0.1, 4, 1)


# --- killed and resumed ---------------------------------------------------------------------------

RESUMED = {
    "plain": {},
    "learned rates, all options": {
        "learn_rates": "per-step", "inner_steps": 2, "multi_step_iterations": 5, "weight_decay": 0.01, "clip": 0.1,
        "schedule": "cosine", "augment": "turns", "adapt": "no-norm", "norm_parameters": "shift",
    },
    "running statistics": {"norm_policy": "per-step", "schedule": "linear"},
    "reptile": {"algorithm": "reptile", "inner_optimizer": "adam", "inner_batch_size": 2, "train_shots": 3},
    "carried moments": {"algorithm": "reptile", "inner_optimizer": "carried-adam", "inner_batch_size": 2},
    "proto": {"algorithm": "proto-maml", "train_ways": 5, "learn_rates": "per-step"},
}  # fmt: skip


QUICK = ("learned rates, all options", "running statistics", "proto")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.long] * (case not in QUICK)) for case in RESUMED]
)
def test_a_killed_run_ends_bit_for_bit_as_the_uninterrupted_one(case, root, tmp_path):
    config = settings(root, **RESUMED[case])
    quiet(config, tmp_path / "whole")
    for killed_after in (1, 5, 7):

        def die(record, seconds, killed_after=killed_after):
            if record.iteration == killed_after:
                raise Killed

        out = tmp_path / f"killed{killed_after}"
        with pytest.raises(Killed):
            quiet(config, out, watch=die)
        main(["train", "--resume", str(out)])
        assert_same_run(tmp_path / "whole", out)


WHERE = {  # and in which of the calls
    "as the best weights are written": (states, "save_weights", (1, 2)),
    "as the last weights are written": (session, "save_weights", (1,)),
    "before a validation": (states, "save_state", (1, 5)),
    "between the best weights and the checkpoint": (states, "save_state", (2, 4)),
    "in a validation": (session, "validate", (1, 2, 5)),
    "in the last evaluation": (session, "judge", (1,)),
    "before the result was written": (session, "circumstances", (1,)),
}


STOPPED = {2: 0.3, 4: 0.5, 6: 0.4, 8: 0.45, 10: 0.2, 12: 0.9}  # after iteration 10, with a patience of 3


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The uninterrupted run that each killed one must end as."""
    with pytest.MonkeyPatch.context() as patch:
        characters.shrink(patch)
        finds(patch, STOPPED)
        out = tmp_path_factory.mktemp("whole") / "run"
        quiet(settings(root, iterations=12, patience=3), out)
    assert json.loads((out / "result.json").read_text())["iterations"] == 10
    return out


@pytest.mark.parametrize(
    ("module", "name", "nth"),
    [pytest.param(m, n, i, id=f"{w} {i}") for w, (m, n, each) in WHERE.items() for i in each],
)
def test_it_does_not_matter_where_it_was_killed(module, name, nth, whole, root, tmp_path, monkeypatch):
    finds(monkeypatch, STOPPED)
    config = settings(root, iterations=12, patience=3)
    real, calls = getattr(module, name), []

    def die(*args, **options):
        calls.append(1)
        if len(calls) == nth:
            raise Killed
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, die)
        with pytest.raises(Killed):
            quiet(config, tmp_path / "killed")
    quiet(load_settings(tmp_path / "killed"), tmp_path / "killed", resume=True)
    assert_same_run(whole, tmp_path / "killed")


def test_a_run_that_was_stopped_early_does_not_go_on(root, tmp_path, monkeypatch):
    """It was killed after its patience was over, before it was judged."""
    finds(monkeypatch, {2: 0.5, 4: 0.4})
    with monkeypatch.context() as patch:
        patch.setattr(session, "judge", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            quiet(settings(root, patience=1), tmp_path / "a")
    result = quiet(settings(root, patience=1), tmp_path / "a", resume=True)
    assert result["iterations"] == 4


def test_the_clock_goes_on_where_it_was(root, tmp_path, monkeypatch):
    clock = Ticking(monkeypatch)

    def slow(config, learner, data, group):
        clock.sleep(0.2)
        return dict.fromkeys(config.test_steps, Estimate(0.5, 0.1))

    monkeypatch.setattr(session, "validate", slow)
    config = settings(root, iterations=6)

    def die(record, seconds):
        if record.iteration == 5:
            clock.sleep(0.3)  # lost
            raise Killed

    with pytest.raises(Killed):
        quiet(config, tmp_path / "a", watch=die)
    before = records(tmp_path / "a")[-2]["seconds"]
    result = quiet(config, tmp_path / "a", resume=True)
    seconds = [record["seconds"] for record in records(tmp_path / "a")]
    assert seconds == sorted(seconds) and seconds[-1] > before
    assert seconds[-1] == pytest.approx(6 * TICK)
    assert result["validation_seconds"] == pytest.approx(0.6, abs=0.06)  # three, over two processes


def test_a_finished_run_cannot_be_resumed_or_trained_over(root, tmp_path):
    quiet(settings(root, iterations=2), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for resume, message in ((True, "is finished; see "), (False, "already holds a run")):
        with pytest.raises(InputError, match=message):
            quiet(settings(root, iterations=2), tmp_path / "a", resume=resume)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_no_second_process_trains_in_a_run_directory(root, tmp_path):
    config = settings(root, iterations=2)

    def intrude(record, seconds):
        with pytest.raises(InputError) as error:
            quiet(config, tmp_path / "a", resume=True)
        said = f"another process trains in {tmp_path / 'a'}; wait for it, or stop it first"
        assert str(error.value) == said

    quiet(config, tmp_path / "a", watch=intrude)
    quiet(config, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


# --- no validation classes ------------------------------------------------------------------------


def test_a_source_without_validation_classes_says_so_when_asked(root, tmp_path, capsys):
    base = ["train", "omniglot", "--data-root", root, "--split", "background-evaluation"]
    quick = ["--iterations", "1", "--meta-batch-size", "1", "--test-tasks", "2", "--no-baselines"]
    base += [*quick, "--channels", "4", "--out"]
    for option in ("--validate-every", "--patience"):
        said = refused(capsys, [*base, tmp_path / "a", option, "5"])
        assert said == f"Omniglot has no validation classes; give no {option}, or other data"
        assert not (tmp_path / "a").exists()
    main([str(argument) for argument in [*base, tmp_path / "a"]])
    assert "no validation: Omniglot has no validation classes" in capsys.readouterr().out
    said = refused(capsys, ["evaluate", tmp_path / "a", "--part", "validation"])
    assert said == "Omniglot has no validation classes; take --part test"


def test_too_few_validation_classes_are_told(root, tmp_path):
    config = settings(root, ways=21, validate_every=None, iterations=1, test_query_shots=19)
    assert quiet(config, tmp_path / "a")["weights"]["kept"] == "best by validation"
    characters_left = {"ways": 22, "algorithm": "zero-head"}
    with pytest.raises(InputError, match="22 ways need 22 classes, but there are 21"):
        quiet(settings(root, **characters_left), tmp_path / "b")
