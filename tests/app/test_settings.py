"""Settings: which options are refused, what an older run's settings mean, where each value comes from."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from characters import settings
from fomaml.app.cli import main
from fomaml.app.settings import from_json, identity, to_json
from fomaml.app.settle import settle_with_origins
from fomaml.errors import InputError
from fomaml.sealed import sealed, unsealed

RESULTS = Path(__file__).parents[2] / "docs" / "results"


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
        ({"algorithm": "maml++", "compile": True}, "--compile yes does not take the multi-step loss"),
        ({"compile": "always"}, "unknown compile 'always'; there are: auto, yes, no"),
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
        ({"clip": 0.0}, "--clip must be a positive finite number, got 0.0"),
        ({"weight_decay": -1.0}, "--weight-decay must be 0 or more and below inf, got -1.0"),
        ({"inner_momentum": 1.0}, "--inner-momentum must be 0 or more and below 1, got 1.0"),
        ({"jitter": -0.1}, "--jitter must be 0 or more and below 1, got -0.1"),
        ({"jitter": 1.0}, "--jitter must be 0 or more and below 1, got 1.0"),
        ({"source": "sinusoid", "channels": None, "model": None, "jitter": 0.1},
         "the source sinusoid has no classes: --jitter must be 0, got 0.1"),
        ({"source": "sinusoid", "channels": None, "model": None, "test_copies": 2},
         "the source sinusoid has no classes: --test-copies must be 1, got 2"),
        ({"test_copies": 0}, "--test-copies must be a whole number of 1 or more, got 0"),
        ({"test_copies": 2, "test_jitter": 1.0}, "--test-jitter must be 0 or more and below 1, got 1.0"),
        ({"test_jitter": 0.1}, "--test-jitter moves the copies of each image: give --test-copies, 2 or more"),
        ({"patience": 0}, "--patience must be a whole number of 1 or more, got 0"),
        ({"validate_every": -1}, "--validate-every must be a whole number of 1 or more, got -1"),
        ({"validate_every": 0, "patience": 2}, "--patience counts validations: give --validate-every 1 or more"),
        ({"source": "mnist", "channels": None, "model": None, "resize": "box"},
         "the source mnist takes no --resize, got 'box'"),
        ({"source": "sinusoid", "channels": None, "model": None, "test_augment": "turns"},
         "the source sinusoid has no classes: --test-augment must be none, got 'turns'"),
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
    del old["digest"]
    loaded = from_json(json.dumps(old), "here")
    assert loaded == dataclasses.replace(expected, format=0)


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
        ({"format": 99}, "format 99 is newer than this version, which reads up to 2"),
        ({"shots_": 3}, "there is no setting 'shots_', did you mean 'shots'"),
    ],
)
def test_settings_of_another_format_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        from_json(sealed({**unsealed(to_json(settings())), **change}), "here")


@pytest.mark.parametrize("name", ["seed", "inner_lr", "algorithm", "meta_batch_size", "format", "digest"])
def test_settings_that_were_edited_are_refused(name):
    """Also where the digest is taken away; the files of the run say that there was one."""
    values = json.loads(to_json(settings()))
    assert from_json(json.dumps(values), "here") == settings()
    edited = {"format": 1, "digest": "0" * 64, "algorithm": "maml"}
    with pytest.raises(InputError, match="it holds something else than what was written"):
        from_json(json.dumps(values | {name: edited.get(name, 7)}), "here")
    del values["digest"]
    with pytest.raises(InputError, match="it has no digest, which it was written with"):
        from_json(json.dumps(values), "here")
    assert identity(from_json(json.dumps(values | {"format": 1}), "here")) != identity(settings())


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
