"""Every config.json is checked as the options are: one line that names the setting, its value and what is expected."""

import json

import pytest

from characters import settings
from fomaml.app.check_settings import read_settings
from fomaml.app.settings import to_json
from fomaml.app.settle import settle
from fomaml.errors import InputError

SINUSOID = {"source": "sinusoid"}
FACTS = {
    "classes": None, "inputs": ["a"], "targets": ["y"], "categories": {}, "shapes": [1], "outputs": 1,
    "split": {"train": ["t1"], "validation": [], "test": ["t2"]},
    "scaling": {"inputs": {"": {"mean": [0.0], "deviation": [1.0]}}, "targets": {}},
}  # fmt: skip
TABLE = {
    "source": "table:t.csv", "task": "t", "target": ["y"], "kind": "regression", "draw": "random",
    "train_draw": "random", "scale": True, "facts": FACTS,
}  # fmt: skip


def written(change, base=SINUSOID):
    """config.json of a run, of a format without a digest, whose settings were then changed."""
    values = json.loads(to_json(settle(**SINUSOID))) | base | change
    del values["digest"]
    return json.dumps({name: value for name, value in values.items() if value is not ...} | {"format": 1})


def test_what_a_run_writes_is_read():
    for found in (settle(**SINUSOID), settings(), settle(**SINUSOID, algorithm="imaml")):
        assert read_settings(to_json(found), "here") == found
    found = read_settings(written({}, TABLE), "here")
    assert found.facts == FACTS and found.target == ("y",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # names
        ({"shotz": 3}, "there is no setting 'shotz', did you mean 'shots'?"),
        ({"shots": ...}, "the setting 'shots' is missing"),
        ({"source": "x"}, "unknown source 'x'; there are: mnist, "),
        ({"source": "sinusoid:"}, "unknown source 'sinusoid:', did you mean sinusoid?"),
        ({"source": "table"}, "unknown source 'table', did you mean table:FILE?"),
        ({"algorithm": "mamml"}, "unknown algorithm 'mamml', did you mean maml?"),
        ({"preset": "x"}, "unknown preset 'x'"),
        ({"schedule": "Cosine"}, "unknown schedule 'Cosine', did you mean cosine?"),
        ({"schedule": ["cosine"]}, "unknown schedule ('cosine',); there are: "),
        ({"schedule": None}, "--schedule must be one of constant, cosine, linear, got None"),
        ({"engine": 3}, "--engine must be text, got 3"),
        ({"metric": ["acurracy"]}, "unknown metric 'acurracy'"),
        # types
        ({"shots": True}, "--shots must be a whole number, got True"),
        ({"shots": [1]}, "--shots must be a whole number, got [1]"),
        ({"shots": 2.0}, "--shots must be a whole number, got 2.0"),
        ({"shots": "1"}, "--shots must be a whole number, got '1'"),
        ({"shots": None}, "--shots must be a whole number, got None"),
        ({"inner_lr": "0.1"}, "--inner-lr must be a number, got '0.1'"),
        ({"inner_lr": False}, "--inner-lr must be a number, got False"),
        ({"baselines": 1}, "--baselines must be true or false, got 1"),
        ({"compile": 3}, "unknown compile 3; there are: auto, yes, no"),
        ({"test_steps": 5}, "--test-steps must be a list of one or more whole numbers, got 5"),
        ({"test_steps": []}, "--test-steps must be a list of one or more whole numbers, got []"),
        ({"test_steps": [0, "1"]}, "--test-steps must be a list of one or more whole numbers, got [0, '1']"),
        ({"channels": [[64]]}, "--channels must be a list of one or more whole numbers"),
        ({"out": 3}, "--out must be a path, got 3"),
        ({"image_size": [3]}, "--image-size must be a list of 2 whole numbers, got [3]"),
        ({"model_options": ["x"]}, "--model-options must be an object, got ['x']"),
        ({"code": {"model": 3}}, "--code must be an object, got {'model': 3}"),
        ({"device": 0}, "--device must be text, got 0"),
        ({"model": "a\0b"}, "--model has a character that no text has"),
        # ranges
        ({"shots": -1}, "--shots must be a whole number of 1 or more, got -1"),
        ({"ways": 10**400}, "--ways must be a whole number from 1 to 1000000000000000, got 1000"),
        ({"inner_steps": 10**9}, "--inner-steps must be a whole number from 1 to 1000000, got 1000000000"),
        ({"test_steps": [0, 10**9]}, "--test-steps must be at most 1000000, got 1000000000"),
        ({"inner_lr": float("nan")}, "--inner-lr must be a positive finite number, got nan"),
        ({"inner_lr": float("inf")}, "--inner-lr must be a positive finite number, got inf"),
        ({"inner_lr": 1e300}, "--inner-lr must be a positive number of at most 3.4e+38, got 1e+300"),
        ({"inner_lr": 0}, "--inner-lr must be a positive finite number, got 0"),
        ({"weight_decay": float("nan")}, "--weight-decay must be 0 or more and below inf, got nan"),
        ({"seed": 2**70}, "--seed must be a whole number from 0 to"),
        ({"gap": -1}, "--gap must be a whole number from 0 to"),
        ({"image": [0, 3]}, "each number of image must be a whole number of 1 or more, got 0"),
        # what does not go together
        ({"question": "new-digits"}, "the source sinusoid takes no --question, got 'new-digits'"),
        ({"model": "conv4"}, "the source sinusoid goes with the model mlp or one of your own, got 'conv4'"),
        ({"kind": "classification"}, "the source sinusoid needs --draw, got none"),
        ({"source": "mnist"}, "the source mnist needs --question, got none"),
        ({"choices": {"strength": 1.0}}, "the algorithm fomaml takes no choice 'strength'"),
        ({"algorithm": "imaml", "choices": {"cg_steps": 0.5}}, "the choice cg_steps must be a whole number"),
        ({"algorithm": "imaml", "choices": {"damping": -1.0}}, "the choice damping must be 0 or more"),
        ({"code": {"loss": {"name": "x"}}}, "the sha256 of code 'loss' must be text, got None"),
    ],
)  # fmt: skip
def test_a_changed_setting_is_one_line(change, message):
    with pytest.raises(InputError) as error:
        read_settings(written(change), "run/config.json")
    said = str(error.value)
    assert said.startswith("run/config.json") and message in said and "\n" not in said and len(said) < 800


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": None}, "it has no facts of its data"),
        ({"target": None}, "the source table needs --target, got none"),
        ({"kind": None}, "the source table needs --kind, got none"),
        ({"kind": "x"}, "unknown kind 'x'; there are: classification, regression"),
        ({"facts": {}}, "facts lacks classes"),
        ({"facts": FACTS | {"outputs": 0}}, "outputs of facts must be a whole number of 1 or more, got 0"),
        ({"facts": FACTS | {"shapes": 3}}, "shapes of facts must be a list of"),
        ({"facts": FACTS | {"shapes": [-1]}}, "each number of shapes of facts must be a whole number of 1 or more"),
        ({"facts": FACTS | {"shapes": {"numbers": "x"}}}, "shapes of facts must be lists of whole numbers, got 'x'"),
        ({"facts": FACTS | {"split": {}}}, "train of the split of facts must be one or more keys, got none"),
        ({"facts": FACTS | {"split": {"train": [1], "test": ["a"]}}}, "train of the split of facts must be a list"),
        ({"facts": FACTS | {"scaling": []}}, "scaling of facts must be an object, got []"),
        ({"facts": FACTS | {"scaling": {"inputs": {"": {}}, "targets": {}}}}, "expected what Scaling.to_dict gives"),
        ({"facts": FACTS | {"scaling": {"inputs": {"": {"mean": ["x"], "deviation": [1.0]}}, "targets": {}}}},
         "mean of the scaling of facts must be a list of one or more numbers, got ['x']"),
    ],
)  # fmt: skip
def test_changed_facts_are_one_line(change, message):
    with pytest.raises(InputError) as error:
        read_settings(written(change, TABLE), "run/config.json")
    assert str(error.value).startswith("run/config.json: ") and message in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '"x"', "{", "[" * 100_000, '{"format": ' + "9" * 5000 + "}"]
)
def test_what_is_no_settings_is_one_line(text):
    with pytest.raises(InputError) as error:
        read_settings(text, "run/config.json")
    assert str(error.value).startswith("run/config.json is not") and "\n" not in str(error.value)


def test_every_setting_is_checked_for_its_type():
    """Whatever is added to `Settings`: an object that no setting is of is refused under its name."""
    for name in vars(settle(**SINUSOID)).keys() - {"own", "format", "data"}:
        with pytest.raises(InputError) as error:
            read_settings(written({name: {"nonsense": [[None]]}}), "here")
        shown = name.replace("_", "-")
        assert any(
            each in str(error.value) for each in (shown, name, name.replace("_", " "), "config of a run")
        ), name
