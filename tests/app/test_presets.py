"""Presets: what they set, that any option beside one wins, and that each one trains."""

import dataclasses
import json

import pytest

from fomaml.app.cli import main
from fomaml.app.presets import PRESETS
from fomaml.app.settings import Settings, from_json, to_json
from fomaml.app.settle import settle
from fomaml.errors import InputError

pytestmark = pytest.mark.usefixtures("small")


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
