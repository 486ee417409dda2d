"""Short runs have small validations and baselines, which come after the learner's result; the time left counts them."""

import dataclasses
import json
import math
import re

import pytest

from fomaml.app import rivals, session, sizing
from fomaml.app.agenda import Agenda
from fomaml.app.cli import main
from fomaml.app.presets import PRESETS
from fomaml.app.progress import Watch
from fomaml.app.rundir import load_settings
from fomaml.app.settings import identity
from fomaml.app.settle import settle, settle_with_origins

RUNS = {
    "mnist": {"source": "mnist"},
    "mnist, new digits": {"source": "mnist", "question": "new-digits", "shots": 5},
    "omniglot": {"source": "omniglot"},
    "folder": {"source": "folder:x"},
    "folder, 5 shots": {"source": "folder:x", "shots": 5},
    "folder, augmented": {"source": "folder:x", "augment": "rotations"},
    "folder, few queries": {"source": "folder:x", "query_shots": 1},
    "sinusoid": {"source": "sinusoid"},
}


@pytest.mark.parametrize("run", RUNS)
def test_runs_of_the_default_length_have_the_full_sizes(run):
    settings = settle(**RUNS[run])
    assert sizing.of_baselines(settings) == sizing.full(settings)
    assert (settings.validation_tasks, sizing.full(settings)[1:]) == (200, (1000, 50, (5, 20, 50, 100), 1000))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_full_sizes(preset):
    settings = settle(preset=preset)
    assert sizing.of_baselines(settings) == sizing.full(settings)
    assert settings.validation_tasks == PRESETS[preset].settings["validation_tasks"]


@pytest.mark.parametrize("iterations", [50, 100, 200, 399])
@pytest.mark.parametrize("run", RUNS)
def test_validation_and_baselines_cost_about_as_much_as_a_short_training(run, iterations):
    settings = settle(**RUNS[run], iterations=iterations)
    sizes = sizing.of_baselines(settings)
    own = sizes._replace(validation_tasks=settings.validation_tasks)
    cost = 10 * sizing.validation(settings, own) + sizing.baselines(settings, own)
    floor = 10 * sizing.validation(settings, sizing.least(settings))
    floor += sizing.baselines(settings, sizing.least(settings))
    assert cost <= 1.1 * max(sizing.training(settings), floor)
    assert floor < 3.5 * sizing.training(settings)  # of 50 iterations of the cheapest tasks


def test_what_is_asked_for_wins():
    short = {"source": "folder:x", "iterations": 50}
    settings, origins = settle_with_origins(short)
    assert settings.validation_tasks == 20 and origins["validation_tasks"] == "the length of the run"
    settings, origins = settle_with_origins({**short, "validation_tasks": 150, "baseline_size": "full"})
    assert settings.validation_tasks == 150 and origins["validation_tasks"] == "given"
    assert sizing.of_baselines(settings) == sizing.full(settings)
    assert settle(preset="maml-omniglot-5w1s", iterations=10).validation_tasks == 300


def test_settings_that_came_later_leave_the_identity_of_earlier_runs():
    names = identity(settle(source="folder:x"))
    assert not names.keys() & {"shares", "skip_small_classes", "baseline_size"}
    assert identity(settle(source="folder:x", shares=(0.5, 0.0, 0.5)))["shares"] == [0.5, 0.0, 0.5]


# --- the learner first, then the baselines --------------------------------------------------------

OPTIONS = (
    "--iterations 4 --validate-every 4 --validation-tasks 9 --meta-batch-size 2 --ways 2 --query-shots 2 "
    "--model conv4-strided --channels 4 --test-tasks 8 --test-steps 0 1"
)


class Killed(BaseException):
    pass


def train(images, out):
    main(["train", f"folder:{images / 'even'}", *OPTIONS.split(), "--out", str(out)])


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(images, out)
    return out


def result_of(out):
    """The result, without the time it took."""
    result = json.loads((out / "result.json").read_text())
    for name in ("training_seconds", "validation_seconds", "date", "commit", "digest", "metrics.jsonl crc32"):
        del result[name]
    return result


@pytest.mark.parametrize(
    ("what", "calls"),
    [
        pytest.param("fine_tune", 0, marks=pytest.mark.long),
        pytest.param("fine_tune", 1, marks=pytest.mark.long),
        ("nearest_centroid", 0),
    ],
)
def test_the_learner_has_its_result_before_the_baselines(
    what, calls, whole, images, tmp_path, monkeypatch, capsys
):
    real, out, done = getattr(rivals, what), tmp_path / "run", []

    def die(*arguments, **options):
        if len(done) == calls:
            raise Killed
        done.append(what)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(rivals, what, die)
        with pytest.raises(Killed):
            train(images, out)
    said, found = capsys.readouterr().out, json.loads((out / "result.json").read_text())
    complete = result_of(whole)
    assert found["accuracy"] == complete["accuracy"] and "unfinished" in found
    assert found["rows"] == complete["rows"][: len(found["rows"])] and len(found["rows"]) >= 2
    assert "FOMAML, after 1 step" in said.partition("baseline: ")[0]
    assert f"--resume {out}" in (out / "result.txt").read_text()
    main(["train", "--resume", str(out)])
    assert result_of(out) == complete and not (out / "state.safetensors").exists()
    for name in ("result.txt", "weights.safetensors", "last.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_the_baselines_that_were_chosen_are_told(images, tmp_path, capsys):
    train(images, tmp_path / "run")
    said = capsys.readouterr().out
    assert "validation: 9 tasks every 4 iterations" in said
    assert (
        "baselines, sized to a short run: tuned on 5 tasks with at most 20 steps, tested on 8 of 8 tasks"
        in said
    )
    assert "--baseline-size full" in said
    main(
        [
            "train",
            f"folder:{images / 'even'}",
            *OPTIONS.split(),
            "--no-baselines",
            "--out",
            str(tmp_path / "b"),
        ]
    )
    assert "sized to a short run" not in capsys.readouterr().out


def test_fewer_tasks_of_a_baseline_are_named_and_paired(monkeypatch, images, tmp_path):
    few = sizing.least
    monkeypatch.setattr(sizing, "least", lambda settings: few(settings)._replace(tasks=3))
    settings = settle(
        source=f"folder:{images / 'even'}", iterations=1, meta_batch_size=1, ways=2, query_shots=2,
        channels=(4,), model="conv4-strided", test_tasks=8, test_steps=(0, 1), validate_every=0,
    )  # fmt: skip
    out = tmp_path / "run"
    with session.session(settings, out, say=lambda line: None) as run:
        run.train()
        result = run.finish()
    rows = {row["label"]: row for row in result["rows"]}
    assert "random start, support set only, on 3 tasks" in rows and "nearest centroid of the pixels" in rows
    mean = run.scores[1][:3].mean().item()
    [paired] = [each for each in result["differences"] if each["to"].startswith("random start")]
    assert paired["mean"] == pytest.approx(mean - rows[paired["to"]]["mean"])
    assert load_settings(out).baseline_size == "run"


# --- the time left --------------------------------------------------------------------------------


def test_the_time_left_counts_validation_test_and_baselines():
    settings = settle(source="folder:x", validate_every=200)
    agenda = Agenda(settings)
    assert math.isnan(agenda.left())
    agenda.trained(1000, 100.0, 0.0)
    pace = 100 / agenda.done["training"]
    rest = {"validation": 10 * agenda.of_validation, "test": sizing.test(settings)}
    rest["baselines"] = sizing.baselines(settings, sizing.full(settings))
    expected = 100 + pace * (rest["validation"] / 2 + rest["test"] + rest["baselines"])
    assert agenda.left() == pytest.approx(expected)
    agenda.trained(1000, 100.0, 50.0)  # validation, of its own pace, is what the test is like
    own = 50 / (rest["validation"] / 2)
    assert agenda.left() == pytest.approx(
        100 + own * (rest["validation"] / 2 + rest["test"] + rest["baselines"])
    )
    without = Agenda(dataclasses.replace(settings, baselines=False))
    without.trained(1000, 100.0, 50.0)
    assert without.left() == pytest.approx(100 + own * (rest["validation"] / 2 + rest["test"]))


def test_the_time_left_counts_the_fits_of_a_forest_in_seconds_until_they_are_measured():
    settings = settle(source="sinusoid", baselines=True)
    sizes = sizing.full(settings)
    number = 20 * sizing.FEW_TASKS + sizes.tasks
    forest = number * sizing.FITS["forest"][True]
    plain, counted = Agenda(settings), Agenda(settings, [("forest", True)])
    for agenda in (plain, counted):
        agenda.trained(1000, 100.0, 0.0)
    assert forest > 60 and counted.left() == pytest.approx(plain.left() + forest)
    tell, now = [], [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fomaml.app.agenda.time.perf_counter", lambda: now[0])
        note = counted.counter("estimators", "estimators", forest, lambda *told: tell.append(told))
        note(0.5 * forest)
        now[0] = 2 * forest  # on a machine that is four times slower
        note(0.5 * forest)
    assert counted.left() == pytest.approx(plain.left() + 0.5 * forest * 4)
    assert tell[-1][:3] == ("estimators", 0.5 * forest, forest)
    off = Agenda(dataclasses.replace(settings, baselines=False), [("forest", True)])
    assert off.totals["estimators"] == off.totals["baselines"] == 0


def test_a_run_by_seconds_has_the_seconds_left():
    agenda = Agenda(settle(source="sinusoid", seconds=100.0, baselines=False))
    agenda.totals["test"] = 0.0
    agenda.trained(30, 25.0, 0.0)
    assert agenda.left() == pytest.approx(75, rel=0.02)


def test_long_work_is_told_now_and_then():
    lines, now = [], [0.0]
    watch = Watch(settle(source="folder:x"), lines.append, clock=lambda: now[0])
    for second, done in enumerate((0.0, 100.0, 200.0, 300.0)):
        now[0] = 6.0 * second
        watch.work("testing", done, 400.0, 100.0 - second)
    watch.work("validating", 0.0, 400.0, 90.0)
    assert lines == ["testing: 1 min 40 s left", "testing: 50 %, 1 min 38 s left"]


def test_the_bar_tells_all_that_a_person_wants_to_know(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    main(["train", f"folder:{images / 'even'}", *OPTIONS.split(), "--iterations", "8", "--no-baselines",
          "--out", str(tmp_path / "run")])  # fmt: skip
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    bar = r"meta-training .*iteration [5-8]/8  meta-loss \d\.\d+  query accuracy \d+ → \d+ %  \d+ tasks/s  "
    assert re.search(bar + r"validation \d+\.\d+ ± \d+\.\d+ % .* left", shown), shown
