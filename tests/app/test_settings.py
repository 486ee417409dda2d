"""Options and presets: what they resolve to, what they refuse, and what they make of model, learner and optimiser."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import characters
from fomaml.app.build import build_learner, build_model, build_optimizer, build_schedule, for_test, open_data
from fomaml.app.cli import main
from fomaml.app.presets import PRESETS
from fomaml.app.settings import Settings, from_json, to_json
from fomaml.app.settle import settle, settle_with_origins
from fomaml.errors import InputError
from fomaml.learning.objectives import MultiStepLoss
from fomaml.models import BatchNorm, Conv4Strided, Conv4StridedFlat
from fomaml.tasks import one
from fomaml.train import linear, train

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return characters.write(tmp_path_factory.mktemp("omniglot"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    characters.shrink(monkeypatch)


def settings(**options):
    return settle(**{"source": "omniglot", "model": "conv4-strided", "channels": (4,), **options})


def built(config):
    model = build_model(config)
    return model, build_learner(config, model)


# --- presets --------------------------------------------------------------------------------------


def test_a_preset_sets_options_that_an_option_can_override():
    names = {field.name for field in dataclasses.fields(Settings)}
    for name, preset in PRESETS.items():
        assert set(preset.settings) <= names, name


@pytest.mark.parametrize("name", PRESETS)
def test_every_value_of_a_preset_is_recorded_and_any_option_beside_it_wins(name):
    config = settle(preset=name)
    assert config.preset == name
    for option, value in PRESETS[name].settings.items():
        assert getattr(config, option) == value
    other = {"inner_lr": 0.123, "channels": (8,), "iterations": 7, "query_shots": 3, "augment": "rotations"}
    changed = settle(preset=name, **other)
    for option, value in {**vars(config), **other}.items():
        assert getattr(changed, option) == value
    assert from_json(to_json(changed), "here") == changed


def test_the_published_settings():
    five, twenty = (settle(preset=f"maml-omniglot-{name}") for name in ("5w1s", "20w5s"))
    assert (five.inner_lr, five.inner_steps, five.meta_batch_size) == (0.4, 1, 32)
    assert (twenty.inner_lr, twenty.inner_steps, twenty.meta_batch_size) == (0.1, 5, 16)
    assert (five.ways, five.shots, five.query_shots, five.test_query_shots) == (5, 1, 1, 1)
    assert (twenty.ways, twenty.shots, twenty.query_shots, twenty.test_query_shots) == (20, 5, 5, 5)
    reptile = settle(preset="reptile-omniglot-5w1s")
    assert (reptile.train_shots, reptile.shots, reptile.test_steps[-1]) == (10, 1, 50)
    assert reptile.schedule == "linear" and reptile.meta_lr == 1.0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name, root, tmp_path, capsys):
    """With the whole model, on tasks of its own size."""
    out = tmp_path / "run"
    quick = ["--iterations", "1", "--meta-batch-size", "1", "--test-tasks", "2", "--validation-tasks", "2"]
    steps = ["--channels", "4", "--test-steps", "0", "1", "--no-baselines"]
    steps += (
        ["--train-ways", "8"] if "train_ways" in PRESETS[name].settings else []
    )  # of the classes there are
    main(["train", "--preset", name, "--data-root", str(root), "--out", str(out), *quick, *steps])
    result = json.loads((out / "result.json").read_text())
    preset = PRESETS[name]
    assert result["preset"] == name
    for key in ("ways", "shots"):
        assert result["protocol"][key] == preset.settings[key]
    assert result["protocol"]["query_shots"] == settle(preset=name).test_query_shots
    said = capsys.readouterr().out
    assert ("each class turned at random" in said) == (preset.settings.get("test_augment") == "turns")
    assert result["weights"]["kept"] == "best by validation"


def test_the_table_of_presets(capsys):
    main(["presets"])
    text = capsys.readouterr().out
    for name, preset in PRESETS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(name + " ")]
        assert preset.aim in line and preset.source in line
    main(["presets", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fomaml-omniglot-5w1s"]["settings"]["inner_lr"] == 0.4


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(InputError, match=r"unknown preset 'x'; there are: fomaml-omniglot-5w1s, "):
        settle(preset="x")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_ways": 8}, "8 ways in training and 5 at test need a head made of classes: "
         "--algorithm zero-head or proto-maml, got fomaml"),
        ({"algorithm": "reptile", "learn_rates": "per-step"}, "the option --learn-rates per-step does not go "
         "with the algorithm reptile: its meta-gradient does not reach the step sizes"),
        ({"algorithm": "meta-sgd", "learn_rates": "per-step"}, "the option --learn-rates per-step does not go with"),
        ({"inner_optimizer": "adam", "learn_rates": "per-step"}, "--learn-rates goes with --inner-optimizer sgd"),
        ({"algorithm": "reptile", "multi_step_iterations": 5}, "the option --multi-step-iterations 5 does not"),
        ({"algorithm": "maml++", "compile": True}, "--compile does not take the multi-step loss"),
        ({"algorithm": "maml", "inner_optimizer": "adam"}, "the option --inner-optimizer adam does not go"),
        ({"algorithm": "maml++", "inner_optimizer": "carried-adam"}, "the option --inner-optimizer carried-adam does"),
        ({"inner_optimizer": "carried-adam", "learn_rates": "per-step"}, "--learn-rates goes with"),
        ({"algorithm": "proto-maml", "inner_optimizer": "carried-adam"}, "the option --inner-optimizer carried-adam d"),
        ({"algorithm": "sign-maml", "inner_momentum": 0.5}, "the option --inner-momentum 0.5 does not go with"),
        ({"algorithm": "anil", "adapt": "no-norm"}, "the option --adapt no-norm does not go with the algorithm"),
        ({"model": "mlp"}, "the model mlp has no convolutions and no batch norm: no --channels 4"),
        ({"algorithm": "zero-head", "train_ways": 8, "learn_rates": "elementwise"},
         "--learn-rates elementwise learns a head of 8 classes, of which 5 at test have no use"),
        ({"algorithm": "zero-head", "train_ways": 8, "inner_loss": "summed"}, "--inner-loss summed is N times"),
        ({"resize": "cubic"}, "unknown resize 'cubic'; there are: lanczos, nearest, box, bilinear"),
        ({"augment": "flips"}, "unknown augment 'flips'; there are: none, rotations, turns, warps"),
        ({"test_augment": "rotations"}, "unknown test augment 'rotations'; there are: none, turns"),
        ({"norm_policy": "own"}, "unknown norm policy 'own'; there are: batch, support, running, per-step"),
        ({"clip": 0.0}, "clip must be a positive finite number, got 0.0"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more and below inf, got -1.0"),
        ({"inner_momentum": 1.0}, "inner_momentum must be 0 or more and below 1, got 1.0"),
        ({"jitter": -0.1}, "jitter must be 0 or more and below 1, got -0.1"),
        ({"jitter": 1.0}, "jitter must be 0 or more and below 1, got 1.0"),
        ({"source": "sinusoid", "channels": None, "model": None, "jitter": 0.1},
         "the source sinusoid has no classes: jitter must be 0, got 0.1"),
        ({"source": "sinusoid", "channels": None, "model": None, "test_copies": 2},
         "the source sinusoid has no classes: test_copies must be 1, got 2"),
        ({"test_copies": 0}, "test_copies must be a whole number of 1 or more, got 0"),
        ({"test_copies": 2, "test_jitter": 1.0}, "test_jitter must be 0 or more and below 1, got 1.0"),
        ({"test_jitter": 0.1}, "--test-jitter moves the copies of each image: give --test-copies, 2 or more"),
        ({"patience": 0}, "patience must be a whole number of 1 or more, got 0"),
        ({"validate_every": -1}, "validate_every must be a whole number of 1 or more, got -1"),
        ({"validate_every": 0, "patience": 2}, "--patience counts validations: give --validate-every 1 or more"),
        ({"source": "mnist", "channels": None, "model": None, "resize": "box"},
         "the source mnist takes no --resize, got 'box'"),
        ({"source": "sinusoid", "channels": None, "model": None, "test_augment": "turns"},
         "the source sinusoid has no classes: test_augment must be none, got 'turns'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError) as error:
        settings(**options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_settings_of_an_older_run_are_what_they_were():
    """Format 0 had no number, other names, and a run knew no option that was not there yet."""
    expected = settings(statistics="support")
    old = json.loads(to_json(expected))
    old |= {"resume": None, "question": "", "test_statistics": "inductive", "norm_statistics": "batch"}
    added = ("format", "seconds", "train_ways", "test_query_shots", "inner_loss", "preset", "validate_every")
    for name in (*added, "statistics", "norm_policy"):
        del old[name]
    assert from_json(json.dumps(old), "here") == expected


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/config.json")), ids=lambda path: path.parent.name)
def test_kept_runs_have_format_0_and_load(path):
    text = path.read_text()
    assert "format" not in json.loads(text)
    loaded = from_json(text, "here")
    assert loaded.statistics in ("own", "with-query") and loaded.seconds is None
    assert from_json(to_json(loaded), "there") == loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99 is newer than this version, which reads up to 1"),
        ({"shots_": 3}, "unexpected keyword argument 'shots_'"),
    ],
)
def test_settings_of_another_format_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        from_json(json.dumps({**json.loads(to_json(settings())), **change}), "here")


def test_a_dry_run_says_where_each_setting_comes_from(tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", "--preset", "maml-omniglot-5w5s", "--meta-lr", "0.5", "--out", str(out), "--dry-run"])
    rows = {
        line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1]
        for line in capsys.readouterr().out.splitlines()
        if len(line.split(maxsplit=1)) == 2
    }
    origin = {name: re.split(r"  +", row.rstrip())[-1] for name, row in rows.items()}
    expected = {
        "meta_lr": "given",
        "inner_lr": "preset maml-omniglot-5w5s",
        "split": "preset maml-omniglot-5w5s",
        "train_ways": "as ways",
        "clip": "default",
    }
    assert {name: origin[name] for name in expected} == expected
    assert not out.exists()
    _, origins = settle_with_origins({"source": "mnist", "algorithm": "anil"})
    assert (origins["inner_lr"], origins["iterations"]) == ("algorithm anil", "source mnist")


# --- what the options stand for -------------------------------------------------------------------


def test_the_models_options_reach_the_model():
    model, _ = built(settings(channels=(6,), norm_parameters="shift", norm_policy="per-step", inner_steps=2))
    assert isinstance(model, Conv4Strided) and model.head.in_features == 6
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    assert all(m.weight is None and m.policy == "per-step" and len(m.mean) == 3 for m in norms)
    model, _ = built(settings(model="conv4"))
    assert all(m.weight is not None for m in model.modules() if isinstance(m, BatchNorm))
    model, _ = built(settings(model="conv4-strided-flat"))
    assert isinstance(model, Conv4StridedFlat) and model.head.in_features == 4 * 2 * 2
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    assert Conv4StridedFlat(5, image=(3, 33, 17))(torch.rand(2, 3, 33, 17)).shape == (2, 5)


def test_no_norm_is_meta_learned_and_does_not_adapt():
    model, learner = built(settings(adapt="no-norm"))
    norms = {
        f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, BatchNorm) for p in ("weight", "bias")
    }
    assert len(norms) == 8
    assert norms <= set(learner.meta_learned)
    assert set(learner.adapted) == set(learner.meta_learned) - norms
    _, learner = built(settings())
    assert norms <= set(learner.adapted)


def test_the_summed_loss_is_the_original_codes(root):
    """One inner step on the sum of the losses over the shots only, by hand."""
    config = settings(inner_loss="summed", inner_lr=0.03, inner_steps=1, shots=3, ways=4, data_root=root)
    model, learner = built(config)
    support = open_data(config).train[0].support
    loss = F.cross_entropy(model(support.inputs), support.targets, reduction="sum") / 3
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    adapted = learner.adapt(support)
    for own, gradient, found in zip(model.parameters(), gradients, adapted.parameters()):
        torch.testing.assert_close(found, own - 0.03 * gradient)


def test_the_learners_options_reach_the_learner():
    _, learner = built(settings(inner_optimizer="adam", inner_batch_size=10))
    assert learner.optimizer.betas == (0.0, 0.999) and learner.inner_batch_size == 10
    assert not learner.optimizer.carried
    assert built(settings(inner_optimizer="carried-adam"))[1].optimizer.carried
    _, learner = built(settings(inner_momentum=0.5, multi_step_iterations=9))
    assert learner.optimizer.momentum == 0.5 and learner.objective == MultiStepLoss(9)
    _, learner = built(settings(algorithm="maml++", iterations=50))
    assert learner.objective == MultiStepLoss(5)
    config = settings(learn_rates="per-step", inner_steps=2, inner_lr=0.3, meta_lr=0.01)
    _, learner = built(config)
    assert learner.meta_parameters()["inner_lr.head.bias"].tolist() == pytest.approx([0.3, 0.3])
    optimizer = build_optimizer(config, learner)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, pytest.approx(0.003)]
    config = dataclasses.replace(config, rates_lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer(config, learner)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.1), (0.5, 0.0)]
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_tests_mini_batches_do_not_touch_training():
    config = settings(algorithm="reptile", inner_batch_size=10, test_inner_batch_size=5)
    _, learner = built(config)
    other = for_test(config, learner)
    assert (learner.inner_batch_size, other.inner_batch_size) == (10, 5)
    assert all(a is b for a, b in zip(learner.parameters(), other.parameters()))
    assert for_test(settings(inner_batch_size=10), learner) is learner


def test_schedules():
    assert [linear(4)(i) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    assert build_schedule(settings(schedule="constant")) is None
    assert build_schedule(settings(schedule="linear", iterations=4))(1) == 0.75
    assert build_schedule(settings(schedule="cosine", iterations=4))(2) == pytest.approx(0.5)


def test_training_and_test_tasks_have_sizes_of_their_own(root):
    config = settings(
        algorithm="proto-maml",
        ways=3,
        train_ways=7,
        train_shots=2,
        query_shots=4,
        test_query_shots=6,
        augment="none",
        data_root=root,
    )
    data = open_data(config)
    assert data.train[0].support.inputs.shape[0] == 14
    assert data.train[0].query.inputs.shape[0] == 28
    for episodes in (data.test, data.validation, data.tuning):
        assert episodes[0].support.inputs.shape[0] == 3
        assert episodes[0].query.inputs.shape[0] == 18
    names = [set(e.source.names) for e in (data.train, data.validation, data.test)]
    assert [len(n) for n in names] == [24, 21, 21] and not set.intersection(*names)
    assert data.test.source.names != data.validation.source.names


@pytest.mark.parametrize("augment", ["none", "rotations", "turns"])
def test_rotations_and_turns_are_two_things(augment, root):
    data = open_data(settings(augment=augment, test_augment="turns", data_root=root))
    assert len(data.train.source) == (96 if augment == "rotations" else 24)
    assert data.train.turns == (augment == "turns")
    assert data.test.turns and data.validation.turns
    assert not open_data(settings(augment=augment, data_root=root)).test.turns


def test_jitter_is_of_training_alone(root):
    data = open_data(settings(jitter=0.2, data_root=root))
    assert data.train.jitter == 0.2
    assert data.test.jitter == data.validation.jitter == data.tuning.jitter == 0
    assert open_data(settings(data_root=root)).train.jitter == 0


def test_copies_are_of_the_test_alone(root):
    data = open_data(settings(jitter=0.2, test_copies=3, data_root=root))
    for episodes in (data.test, data.validation, data.tuning):
        assert (episodes.copies, episodes.jitter) == (3, 0.2)
    assert data.train.copies == 1
    assert open_data(settings(test_copies=2, test_jitter=0.1, data_root=root)).test.jitter == 0.1


def test_the_filter_reaches_the_images(root):
    size = {"data_root": root}
    near, smooth = (open_data(settings(resize=name, **size)) for name in ("nearest", "box"))
    assert "by nearest" in near.origin and "by box" in smooth.origin


def test_clipping_bounds_the_whole_gradient(root):
    def moved(clip):
        config = settings(data_root=root, ways=3, inner_steps=1)
        model, learner = built(config)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
        list(train(learner, open_data(config).train, optimizer, iterations=1, meta_batch_size=2, clip=clip))
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    free = moved(None)
    assert free.norm() > 0.05
    torch.testing.assert_close(moved(0.05), 0.05 * free / free.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(moved(1e6), free)


def test_the_engines_options_reach_the_meta_gradient(root, tmp_path, monkeypatch):
    seen = []

    def spy(learner, tasks, **options):
        seen.append(options)
        return real(learner, tasks, engine=options["engine"])

    training = sys.modules["fomaml.train"]  # the package's own `train` is the function
    real = training.meta_gradient
    monkeypatch.setattr(training, "meta_gradient", spy)
    quick = ["--iterations", "1", "--meta-batch-size", "2", "--test-tasks", "2", "--no-baselines"]
    options = ["--engine", "batched", "--tasks-at-once", "2", "--compile", "--autocast", "bfloat16"]
    base = ["train", "omniglot", "--channels", "4", "--data-root", str(root), "--validate-every", "0"]
    main([*base, *quick, *options, "--out", str(tmp_path / "a")])
    main([*base, *quick, "--out", str(tmp_path / "b")])
    asked = {"engine": "batched", "tasks_at_once": 2, "compile": True, "autocast": torch.bfloat16}
    plain = {"engine": "batched", "tasks_at_once": None, "compile": False, "autocast": None}
    assert seen == [asked, plain]


@pytest.mark.parametrize(
    ("asked", "fast", "meant", "told"),
    [
        ("auto", True, "bfloat16", ["forward passes in bfloat16"]),
        ("auto", False, "none", []),
        (
            "bfloat16",
            False,
            "bfloat16",
            ["forward passes in bfloat16, which this device may only imitate, slowly"],
        ),
    ],
)
def test_the_precision_is_settled_when_a_run_begins(
    root, tmp_path, monkeypatch, capsys, asked, fast, meant, told
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    quick = ["--iterations", "1", "--meta-batch-size", "2", "--test-tasks", "2", "--no-baselines"]
    base = ["train", "omniglot", "--channels", "4", "--data-root", str(root), "--validate-every", "0"]
    main([*base, *quick, "--autocast", asked, "--out", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a" / "config.json").read_text())["autocast"] == meant
    assert [line for line in capsys.readouterr().out.splitlines() if "forward passes" in line] == told


def test_one_task_keeps_its_examples_through_all_of_it(root):
    """Turned test tasks are the plain ones, turned: the same characters and drawings."""
    plain, turned = (
        open_data(settings(test_augment=name, data_root=root)).test for name in ("none", "turns")
    )
    a, b = one(plain.batch(0, 1), 0), one(turned.batch(0, 1), 0)
    assert torch.equal(a.support.inputs.flatten(1).sum(1), b.support.inputs.flatten(1).sum(1))
    assert not torch.equal(a.support.inputs, b.support.inputs)
