"""A run adapted to a stranger's examples, kept, loaded and asked: in the shell and in Python."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fomaml
from commands import refused
from fomaml.app.build import open_data
from fomaml.app.calibrate import AT_ONCE, fitted
from fomaml.app.cli import main
from fomaml.app.serving import save_model
from fomaml.errors import InputError
from fomaml.files import write_json
from fomaml.group_episodes import GroupEpisodes
from fomaml.sealed import unsealed

pytest.importorskip("pandas", reason="tables are read by pandas, of the extra tables")
pytest.importorskip("timm", reason="some networks are timm's, of the extra backbones")
from served import QUICK, SOURCES, own_rows


@pytest.mark.parametrize("name", SOURCES)
def test_inputs_and_targets_are_made_ready_as_in_training(name, run_of, strangers, tmp_path):
    opened = fomaml.load_run(run_of(name))
    taken = opened.intake.labelled(own_rows(name, strangers, tmp_path / "own"))
    _, targets = opened._targets(taken)
    episodes = open_data(opened.settings).train
    if isinstance(episodes, GroupEpisodes):
        sources = [episodes.source, open_data(opened.settings).test.source]
        key = "0" if name == "windows" else "m3"
        sources += [open_data(opened.settings).validation.source]
        [source] = [each for each in sources if key in each.names]
        number = source.names.index(key)
        inputs, expected = source.take(np.sort(np.concatenate(source.positions(number))))
        flat = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs.values())
        found = [taken.inputs] if isinstance(taken.inputs, torch.Tensor) else list(taken.inputs.values())
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, flat, strict=True))
        assert torch.equal(targets, expected) and targets.dtype == expected.dtype
        return
    everything = [
        episodes.source,
        open_data(opened.settings).validation.source,
        open_data(opened.settings).test.source,
    ]
    for own in ("class0", "class1"):
        [source] = [each for each in everything if own in each.names]
        number = source.names.index(own)
        rows = torch.arange(source.offsets[number], source.offsets[number] + source.counts[number])
        mine = torch.tensor([label == own for label in taken.labels])
        if name == "frozen":  # whose matrix products round by the size of the batch
            assert torch.allclose(taken.inputs[mine], source.take(rows), atol=1e-5)
        else:
            assert torch.equal(taken.inputs[mine], source.take(rows))


@pytest.mark.parametrize("name", SOURCES)
def test_an_adapted_model_is_kept_loaded_and_asked(name, run_of, strangers, tmp_path, capsys):
    opened = fomaml.load_run(run_of(name))
    own = own_rows(name, strangers, tmp_path / "own")
    taken = opened.intake.labelled(own)
    classes, targets = opened._targets(taken)
    module = opened.learner.adapt(fomaml.Examples(taken.inputs, targets), 2, "support").eval()
    with torch.no_grad():
        outputs = module(**taken.inputs) if isinstance(taken.inputs, dict) else module(taken.inputs)
    capsys.readouterr()
    main(["adapt", str(run_of(name)), "--support", str(own), "--out", str(tmp_path / "model")])
    told = capsys.readouterr().out
    assert f"adapted to {len(targets)} examples in 2 steps" in told
    loaded = fomaml.load_adapted(tmp_path / "model")
    assert (f"probabilities: temperature {loaded.temperature:.3g} of 2-way 2-shot" in told) == (
        classes is not None
    )
    found = loaded.predict(own)
    for key, value in loaded.module.state_dict().items():
        assert torch.equal(value, module.state_dict()[key])
    main(["predict", str(tmp_path / "model"), str(own), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    main(["predict", str(tmp_path / "model"), str(own), "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["input"] for line in lines] == [row["input"] for row in rows] == found.names == taken.names
    if classes is not None:
        expected = (outputs[:, : len(classes)].double() / loaded.temperature).softmax(1)
        assert torch.allclose(found.probabilities, expected, atol=1e-6)
        assert [line["class"] for line in lines] == [classes[n] for n in expected.argmax(1).tolist()]
        assert [row["class"] for row in rows] == found.labels
        correct = np.mean([a == b for a, b in zip(found.labels, taken.labels)])
    else:
        standard = opened.settings.facts["scaling"]["targets"][""]
        expected = outputs.double() * torch.tensor(standard["deviation"]) + torch.tensor(standard["mean"])
        assert torch.allclose(found.values, expected, rtol=1e-5)
        columns = loaded.targets
        assert torch.allclose(
            torch.tensor([[line[c] for c in columns] for line in lines]).double(), found.values
        )
        correct = (found.values - taken.labels).square().mean().sqrt().item()
    main(["evaluate", str(tmp_path / "model"), "--query", str(own), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts[facts["metric"]] == pytest.approx(correct, rel=1e-6) and facts["examples"] == len(targets)
    assert "Made on" in (tmp_path / "model" / "README.md").read_text()


def test_one_picture_is_judged_alone(run_of, strangers, tmp_path):
    """The folder's owner gets the same answer, however many pictures are asked about together."""
    model = fomaml.load_run(run_of("grey")).adapt(own_rows("grey", strangers, tmp_path / "own"))
    together = model.predict(tmp_path / "own").probabilities
    paths = [path for own in ("class0", "class1") for path in sorted((tmp_path / "own" / own).iterdir())]
    alone = torch.cat([model.predict(path).probabilities for path in paths])
    assert torch.allclose(together, alone, atol=1e-6)


def test_pictures_in_python_are_those_of_files(run_of, strangers, tmp_path):
    model = fomaml.load_run(run_of("colour")).adapt(own_rows("colour", strangers, tmp_path / "own"))
    path = tmp_path / "own" / "class0" / "1.png"
    expected = model.predict(path).probabilities
    with Image.open(path) as image:
        for given in (
            image,
            np.asarray(image),
            [np.asarray(image)],
            np.asarray(image)[None],
            [image, str(path)][:1],
        ):
            assert torch.equal(model.predict(given).probabilities, expected)
    ready = fomaml.load_run(run_of("colour")).intake.inputs(path).inputs
    assert torch.equal(model.predict(ready).probabilities, expected)


def test_a_head_made_of_classes_takes_any_number(run_of, strangers, tmp_path):
    symbols = {f"class{n}": strangers / "symbols" / f"class{n}" for n in range(5)}
    opened = fomaml.load_run(run_of("colour"))
    for number in (2, 3, 5):
        model = opened.adapt({name: symbols[name] for name in list(symbols)[:number]})
        assert model.predict(symbols["class0"]).probabilities.shape == (6, number)
    with pytest.raises(InputError, match=r"a head for 2 classes, got 3; .*zero-head or proto-maml"):
        fomaml.load_run(run_of("grey")).adapt({name: symbols[name] for name in list(symbols)[:3]})


def test_a_head_made_of_classes_has_those_of_the_examples(tmp_path):
    rows = [
        f"m{task},{task + 5 * state + place},{name}"
        for task in range(9)
        for state, name in enumerate(("broken", "good", "worn"))
        for place in range(6)
    ]
    (tmp_path / "states.csv").write_text("\n".join(["machine,load,state", *rows]) + "\n")
    own = [row.split(",", 1)[1] for row in rows if row.startswith("m8") and "worn" not in row]
    (tmp_path / "own.csv").write_text("\n".join(["load,state", *own]) + "\n")
    source = f"table:{tmp_path}/states.csv --task machine --target state --features load"
    for algorithm, classes in (
        ("proto-maml", ["broken", "good"]),
        ("fomaml", ["broken", "good", "worn"]),
    ):
        run = tmp_path / algorithm
        main([*f"train {source} --algorithm {algorithm} {QUICK} --out {run}".split()])
        opened = fomaml.load_run(run)
        model = opened.adapt(tmp_path / "own.csv")
        saved = save_model(model, tmp_path / f"{algorithm}-model")
        found = fomaml.load_adapted(saved).predict(tmp_path / "own.csv")
        assert model.classes == classes and found.probabilities.shape == (12, len(classes))
        assert torch.equal(found.probabilities, model.predict(tmp_path / "own.csv").probabilities)


def test_the_run_stays_as_it_is(run_of, strangers, tmp_path):
    opened = fomaml.load_run(run_of("grey"))
    before = {name: value.clone() for name, value in opened.learner.state_dict().items()}
    first = (
        opened.adapt(own_rows("grey", strangers, tmp_path / "own")).predict(tmp_path / "own").probabilities
    )
    second = opened.adapt(tmp_path / "own").predict(tmp_path / "own").probabilities
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in opened.learner.state_dict().items())


def test_confidence_is_calibrated_on_validation_tasks(run_of, strangers, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run_of("colour"), copied)
    own = own_rows("colour", strangers, tmp_path / "own")
    (copied / "calibration.json").unlink()
    main(["calibrate", str(copied), "--tasks", "6", "--shots", "2", "4", "--ways", "2", "3"])
    assert "calibration error" in capsys.readouterr().out
    facts = json.loads((copied / "calibration.json").read_text())["calibrations"]
    assert [(row["ways"], row["shots"]) for row in facts] == [(2, 2), (2, 4), (3, 2), (3, 4)]
    main(["adapt", str(copied), "--support", str(own), "--out", str(tmp_path / "model"), "--steps", "auto"])
    [row] = [
        row for row in facts if (row["ways"], row["shots"]) == (2, 4)
    ]  # six examples a class are nearest to four
    best = max(row["by_steps"], key=lambda steps: (row["by_steps"][steps]["accuracy"], -int(steps)))
    model = fomaml.load_adapted(tmp_path / "model")
    assert model.facts["steps"] == int(best)
    assert model.temperature == row["by_steps"][best]["temperature"]
    logits = model.outputs(model.intake.inputs(own)).double()
    assert torch.allclose(model.predict(own).probabilities, (logits / model.temperature).softmax(1))
    assert "validation tasks of 2 ways and 4 shots" in (tmp_path / "model" / "README.md").read_text()


def test_a_finished_training_has_calibrated_itself(run_of, strangers, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run_of("grey"), copied)
    of_training = json.loads((copied / "calibration.json").read_text())
    (copied / "calibration.json").unlink()
    main(["calibrate", str(copied), "--tasks", "4", "--shots", "2"])
    assert json.loads((copied / "calibration.json").read_text()) == of_training
    result = unsealed((copied / "result.json").read_text())
    [row] = of_training["calibrations"]
    assert result["calibration"] == {
        "ways": 2, "shots": 2, "tasks": 4, "steps": 2, **row["by_steps"]["2"],
    }  # fmt: skip
    assert "calibration error" in (copied / "result.txt").read_text()


def test_a_loss_of_ones_own_is_calibrated_on_the_same_tasks(run_of):
    opened = fomaml.load_run(run_of("states"))
    settings, data = opened.settings, open_data(opened.settings)

    def loss(forward, examples):
        return torch.nn.functional.cross_entropy(forward(examples.inputs), examples.targets)

    with_loss = fomaml.FOMAML(opened.learner.model, settings.inner_lr, settings.inner_steps, loss=loss)
    tasks = AT_ONCE + 3
    expected, found = (fitted(settings, own, data, tasks) for own in (opened.learner, with_loss))
    for steps, row in expected.by_steps.items():
        assert found.by_steps[steps] == pytest.approx(row, rel=1e-3)


def test_pictures_of_a_folder_are_judged_alone_and_the_other_figure_is_named(run_of, capsys):
    run = run_of("grey")
    result = json.loads((run / "result.json").read_text())
    assert result["protocol"]["statistics"] == "support" and not result["protocol"]["transductive"]
    main(["evaluate", str(run), "--tasks", "4", "--json", "--statistics", "own"])
    together = json.loads(capsys.readouterr().out)
    assert together["protocol"]["transductive"] and "transductive" not in together
    assert result["transductive"] == {"mean": together["accuracy"], "interval": together["interval"]}
    main(["evaluate", str(run), "--tasks", "4"])
    for text in ((run / "result.txt").read_text(), capsys.readouterr().out):
        assert "query examples that inform each other (transductive), after 2 steps: " in text
    for name in ("table", "of a library"):  # without batch norms, or with random ones of another's
        found = json.loads((run_of(name) / "result.json").read_text())
        assert ("transductive" in found) == (name != "table")


def test_the_best_number_of_steps_is_that_of_validation(run_of, strangers, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run_of("table"), copied)  # regression, which has no temperature
    own = own_rows("table", strangers, tmp_path / "own")
    result = unsealed((copied / "result.json").read_text())
    for means, best in (({"0": 3.0, "2": 4.0}, 0), ({"0": 3.0, "2": 2.0}, 2), ({"0": 3.0, "2": 3.0}, 0)):
        result["weights"]["by_steps"] = means  # errors, of which the least is best
        write_json(copied / "result.json", result)
        assert fomaml.load_run(copied).adapt(own, steps="auto").facts["steps"] == best
    del result["weights"]["by_steps"]
    write_json(copied / "result.json", result)
    with pytest.raises(InputError, match="had no validation, and has no calibration"):
        fomaml.load_run(copied).adapt(own, steps="auto")


OWN_MODEL = """
from torch import nn

class Own(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU()), nn.Linear(8, outputs)

    def forward(self, x):
        return self.head(self.body(x))
"""


def test_code_of_ones_own_is_named_again(strangers, tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN_MODEL)
    text = (
        SOURCES["grey"]
        .replace("DATA", str(strangers))
        .replace("--channels 4", f"--model {tmp_path}/own.py:Own")
    )
    main(["train", *text.split(), "--out", str(tmp_path / "run")])
    own = own_rows("grey", strangers, tmp_path / "own")
    adapt = ["adapt", str(tmp_path / "run"), "--support", str(own), "--out", str(tmp_path / "model")]
    assert "--model" in refused(capsys, adapt)
    main([*adapt, "--model", f"{tmp_path}/own.py:Own"])
    assert "--model" in refused(capsys, ["predict", tmp_path / "model", own])
    main(["predict", str(tmp_path / "model"), str(own), "--model", f"{tmp_path}/own.py:Own"])
    (tmp_path / "own.py").write_text(OWN_MODEL + "\n# changed\n")
    assert "changed" in refused(
        capsys, ["predict", tmp_path / "model", own, "--model", f"{tmp_path}/own.py:Own"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("adapt RUN/grey --support OWN/none --out OUT", "is no folder"),
        ("adapt RUN/grey --support DATA/symbols/class0 --out OUT", "found no directories"),
        ("adapt RUN/grey --support DATA --out OUT", "found the directory class0 in a class"),
        ("adapt RUN/grey --support DATA/symbols --out OUT", "a head for 2 classes, got 10"),
        ("adapt RUN/table --support DATA/machines.csv --out OUT", "of 10 tasks, m0, m1"),
        (
            "adapt RUN/table --support OWN/other.csv --out OUT",
            "is 'saw' in row 1, which no row of the training had",
        ),
        ("adapt RUN/table --support OWN/short.csv --out OUT", "has no column 'wear'; there are: "),
        ("adapt RUN/table --support DATA/symbols --out OUT", "is a folder, expected a table"),
        ("adapt RUN/states --support OWN/third.csv --out OUT", "'odd' is none of the run's"),
        ("adapt RUN/arrays --support OWN/other.csv --out OUT", "cannot be read as an .npz file"),
        ("adapt RUN/grey --support DATA/symbols --out OUT --steps many", "--steps is a whole number or auto"),
        ("adapt RUN/grey --support OWN/two --out DATA", "already holds something"),
        ("adapt OWN --support DATA/symbols --out OUT", "holds no run"),
        ("predict RUN/grey DATA/symbols", "holds no adapted model"),
        ("predict MODEL OWN/none.png", "no file"),
        ("predict MODEL DATA/machines.csv", "cannot be read as an image"),
        ("predict MODEL OWN/empty", "holds no picture"),
        ("predict MODEL OWN/two --json --csv", "two ways to print"),
        ("evaluate MODEL", "give the labelled inputs to judge it on, --query PATH"),
        ("evaluate MODEL --query DATA/symbols", "is none of the model's"),
        ("evaluate MODEL --query OWN/two --tasks 3", "takes no --tasks"),
        ("evaluate RUN/grey --query OWN/two", "fomaml adapt makes one of it"),
        ("calibrate RUN/table", "this run predicts numbers"),
        ("calibrate RUN/grey --ways 3", "learned a head for 2 ways"),
        ("calibrate RUN/states --ways 3", "the same ones in all tasks"),
        ("calibrate RUN/grey --shots 0", "--shots must be a whole number of 1 or more"),
        ("calibrate RUN/grey --shots 9", "10 of 10 classes have fewer images than a task takes"),
    ],
)
def test_what_does_not_go_is_one_line(arguments, message, run_of, strangers, tmp_path, capsys):
    own = tmp_path / "own"
    (own / "empty").mkdir(parents=True)
    for name in ("class0", "class1"):
        shutil.copytree(strangers / "symbols" / name, own / "two" / name)
    row = "load,tool,wear,heat,state\n1,{},3,4,{}\n2,mill,5,6,bad\n"
    (own / "other.csv").write_text(row.format("saw", "good"))
    (own / "third.csv").write_text(row.format("mill", "odd"))
    (own / "short.csv").write_text("load,tool,heat\n1,mill,3\n")
    for name in SOURCES:
        arguments = arguments.replace(
            f"RUN/{name}", str(run_of(name)) if f"RUN/{name} " in arguments + " " else name
        )
    if "MODEL" in arguments:
        main(["adapt", str(run_of("grey")), "--support", str(own / "two"), "--out", str(tmp_path / "model")])
    places = {"DATA": strangers, "OWN": own, "OUT": tmp_path / "out", "MODEL": tmp_path / "model"}
    for word, place in places.items():
        arguments = arguments.replace(word, str(place))
    assert message in refused(capsys, arguments.split())
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_noticed(run_of, strangers, tmp_path, capsys):
    own = own_rows("grey", strangers, tmp_path / "own")
    main(["adapt", str(run_of("grey")), "--support", str(own), "--out", str(tmp_path / "model")])
    facts = json.loads((tmp_path / "model" / "model.json").read_text())
    weights = tmp_path / "model" / "weights.safetensors"
    whole = weights.read_bytes()
    for damage in (
        lambda: weights.write_bytes(whole[:-3]),
        lambda: weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 64]) + whole[-2:]),
        lambda: (tmp_path / "model" / "model.json").write_text(
            json.dumps(facts | {"classes": ["cat", "dog"]})
        ),
        lambda: (tmp_path / "model" / "model.json").write_text("{"),
        lambda: (tmp_path / "model" / "model.json").write_text(json.dumps(facts | {"format": 99})),
        lambda: (tmp_path / "model" / "model.json").write_text(json.dumps({"format": 1})),
    ):
        damage()
        assert str(tmp_path / "model") in refused(capsys, ["predict", tmp_path / "model", own])
        weights.write_bytes(whole)
        (tmp_path / "model" / "model.json").write_text(json.dumps(facts))
    main(["predict", str(tmp_path / "model"), str(own)])
