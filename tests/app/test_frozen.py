"""Networks that do not learn: a linear head on a frozen one as a baseline, and runs on the vectors of one."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from few import few_baselines
from fomaml import Episodes
from fomaml.app import frozen, serving
from fomaml.app.cli import main
from fomaml.app.rundir import load_run
from fomaml.backbones import backbone, decoder
from fomaml.data.folder import load_folder
from fomaml.errors import InputError

timm = pytest.importorskip("timm", reason="of the extra backbones")
linear_model = pytest.importorskip("sklearn.linear_model", reason="of the extra metrics")
NAME = "timm:resnet10t"
QUICK = (
    "--iterations 1 --meta-batch-size 1 --test-tasks 6 --validate-every 0 --test-steps 0 1 --ways 2 --shots 2"
)
QUICK = [*QUICK.split(), "--query-shots", "3", "--inner-steps", "1", "--seed", "3"]
QUICKER = ["2" if word == "6" else word for word in QUICK]  # test tasks, where nothing of them is asked
HEAD = "frozen backbone, linear head"
BODY = """
from torch import nn


class Body(nn.Sequential):
    def __init__(self, in_channels):
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(in_channels, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3)
        self.flat, self.fc = nn.Flatten(), nn.Linear(54, 5)


class Normed(nn.Sequential):
    def __init__(self, outputs):
        super().__init__(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Linear(8, outputs))


class Tail(nn.Sequential):
    def __init__(self, input_shape, outputs):
        assert input_shape == (6, 3, 3)
        super().__init__(nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, outputs))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Those of a network of seven classes that has seen some noise, so that its statistics are its own."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, 16, 16))
    path = tmp_path_factory.mktemp("weights") / "ten.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Baselines of a second."""
    few_baselines(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(BODY)


def train(images, out, *options, quick=QUICK):
    main(["train", f"folder:{images / 'even'}", *quick, *map(str, options), "--out", str(out)])
    return json.loads((out / "result.json").read_text())


def by_hand(images, weights, row):
    """The accuracy of scikit-learn's logistic regression on the vectors of the network, task by task."""
    folder = load_folder(images / "even", shares=None)
    test = folder.test
    test.decode = decoder(NAME)
    network = backbone(NAME, weights=weights).eval()
    scores = []
    for index in range(6):
        task = Episodes(test, ways=2, shots=2, query_shots=3, seed=11)[index]
        with torch.no_grad():
            (xs, ys), (xq, yq) = (
                (network(part.inputs).double().numpy(), part.targets.numpy()) for part in task
            )
        model = linear_model.LogisticRegression(C=row["settings"]["C"], max_iter=1000).fit(xs, ys)
        scores.append(np.mean(model.predict(xq) == yq))
    return np.mean(scores)


def test_the_baseline_is_logistic_regression_on_the_vectors(images, weights, tmp_path, capsys):
    result = train(images, tmp_path / "run", "--model", NAME, "--model-weights", weights)
    rows = {row["label"]: row for row in result["rows"]}
    assert rows[HEAD]["mean"] == pytest.approx(by_hand(images, weights, rows[HEAD]))
    assert rows[HEAD]["trials"] == 4 and HEAD in [each["to"] for each in result["differences"]]
    assert "the given weights, support set only" in rows  # not a random start
    told = capsys.readouterr().err
    assert told.count("the head 'fc' is a new one") == 1


def test_without_scikit_learn_it_is_said(images, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = train(images, tmp_path / "run", "--model", NAME, "--model-weights", weights, quick=QUICKER)
    assert HEAD not in [row["label"] for row in result["rows"]]
    assert "no linear head on a frozen network: it needs scikit-learn, pip install" in capsys.readouterr().out


def test_random_weights_have_no_frozen_head(images, tmp_path):
    result = train(images, tmp_path / "run", "--model", NAME, "--model-weights", "random", quick=QUICKER)
    labels = [row["label"] for row in result["rows"]]
    assert HEAD not in labels and "random start, support set only" in labels


def test_a_body_of_ones_own_is_frozen_as_it_was_pretrained(images, tmp_path, capsys):
    head = "pretrained classifier, frozen, linear head"
    result = train(images, tmp_path / "run", "--model", "own.py:Body", "--head", "fc")
    assert head in [row["label"] for row in result["rows"]]
    result = train(images, tmp_path / "normed", "--model", "own.py:Normed")  # batch statistics
    assert head not in [row["label"] for row in result["rows"]]
    assert (
        f"baseline: no {head}: what the model makes of an example depends on the others"
        in capsys.readouterr().out
    )


def test_each_way_to_freeze_has_a_method_that_is_tuned(images, weights, tmp_path):
    given = ["tune", f"folder:{images / 'even'}", *QUICK, "--trials", "2", "--trial-iterations", "1"]
    main([*given, "--features-of", NAME, "--features-weights", str(weights), "--out", str(tmp_path / "t")])
    best = json.loads((tmp_path / "t" / "best.json").read_text())
    assert HEAD in json.dumps(best)


# --- runs on vectors ------------------------------------------------------------------------------


def test_a_run_on_vectors_is_that_of_its_network_by_hand(images, weights, tmp_path):
    options = ["--features-of", NAME, "--features-weights", weights, "--features-in", tmp_path / "kept"]
    result = train(images, tmp_path / "run", *options)
    rows = {row["label"]: row for row in result["rows"]}
    assert rows[HEAD]["mean"] == pytest.approx(by_hand(images, weights, rows[HEAD]))
    assert "nearest centroid of the vectors" in rows
    settings, learner = load_run(tmp_path / "run")
    assert settings.model == "linear" and learner.model[1].in_features == 512
    assert settings.code["features_weights"]["name"] == "ten.safetensors"
    # the learner of the run, on vectors that the network gives again
    scores = []
    test = load_folder(images / "even").test
    test.decode = decoder(NAME)
    network = backbone(NAME, weights=weights).eval()
    for index in range(6):
        task = Episodes(test, ways=2, shots=2, query_shots=3, seed=11)[index]
        with torch.no_grad():
            support, query = (part._replace(inputs=network(part.inputs)) for part in task)
        adapted = learner.adapt(support, steps=1)
        scores.append((adapted(query.inputs).argmax(1) == query.targets).double().mean().item())
    assert result["rows"][1]["mean"] == pytest.approx(np.mean(scores))


def test_it_runs_once_over_the_data(images, weights, tmp_path, monkeypatch):
    options = ["--features-of", NAME, "--features-weights", weights, "--features-in", tmp_path / "kept"]
    first = train(images, tmp_path / "one", *options, "--no-baselines")
    examples, made = [], frozen.frozen_network

    def counted(*arguments):
        network = made(*arguments)
        network.register_forward_pre_hook(lambda module, inputs: examples.append(len(inputs[0])))
        return network

    monkeypatch.setattr(frozen, "frozen_network", counted)
    again = train(images, tmp_path / "two", *options, "--no-baselines")
    assert examples == [1] * 9  # three of each part are compared
    assert again["rows"] == first["rows"]
    main(["evaluate", str(tmp_path / "one")])
    assert examples == [1] * 18


def test_the_file_of_weights_must_be_the_one_it_began_with(images, weights, tmp_path, capsys):
    own = shutil.copy(weights, tmp_path / "mine.safetensors")
    run = tmp_path / "run"
    options = ["--features-of", NAME, "--features-weights", own, "--features-in", tmp_path / "kept"]
    train(images, run, *options, "--no-baselines")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    moved = shutil.move(own, tmp_path / "moved.safetensors")

    def refused(*options):
        with pytest.raises(SystemExit) as status:
            main(["evaluate", str(run), *map(str, options)])
        assert status.value.code == 2
        return capsys.readouterr().err

    assert "is not there any more: say where it lies by now, --features-weights FILE" in refused()
    assert "is not the file of weights that the run in" in refused("--features-weights", other)
    capsys.readouterr()
    main(["evaluate", str(run), "--features-weights", str(moved), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == json.loads((run / "result.json").read_text())["rows"]


def test_the_last_layers_adapt_and_own_code_is_named_again(images, tmp_path, capsys):
    run = tmp_path / "run"
    given = ["--features-of", "own.py:Body", "--features-layer", "pool", "--model", "own.py:Tail"]
    whole = train(images, run, *given, "--no-baselines")
    for named, missing in (
        ([], "a model and a frozen network of your own code"),
        (["--model", "own.py:Tail"], "a frozen network of your own code"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), *named])
        told = capsys.readouterr().err
        assert missing in told and "--model own.py:Tail --features-of own.py:Body" in told
    again = ["--features-of", "own.py:Body", "--model", "own.py:Tail"]
    main(["evaluate", str(run), *again, "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == whole["rows"]
    (tmp_path / "own.py").write_text(BODY + "\n# changed\n")
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), *again])
    assert "was made with other code: own.py has changed" in capsys.readouterr().err


def test_a_run_on_vectors_that_was_killed_goes_on(images, weights, tmp_path, monkeypatch):
    from fomaml.app import session

    options = ["--features-of", NAME, "--features-weights", weights, "--no-baselines"]
    whole = train(images, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(session, "judge", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            train(images, tmp_path / "killed", *options)
    main(["train", "--resume", str(tmp_path / "killed")])
    assert json.loads((tmp_path / "killed" / "result.json").read_text())["rows"] == whole["rows"]


def test_groups_of_rows_are_embedded_too(tmp_path, capsys):
    """Nested inputs with a frozen network of one's own, which sees them scaled; pooled rows are vectors as well."""
    random = np.random.default_rng(0)
    key, a = np.repeat(np.arange(10), 12), random.normal(5, 2, (120, 2))
    b = random.normal(size=(120, 3, 2)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", who=key, a=a, b=b, y=a[:, 0] + key)
    (tmp_path / "pair.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Pair(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.layer = nn.Linear(8, 7)\n\n    def forward(self, a, b):\n"
        "        return self.layer(torch.cat([a, b.flatten(1)], 1)).tanh()\n"
    )
    source = ["arrays:rows.npz", "--task", "who", "--inputs", "a", "b", "--target", "y"]
    quick = ["--iterations", "1", "--test-tasks", "4", "--test-steps", "0", "1", "--shots", "2"]
    quick += ["--query-shots", "3", "--out", "run"]
    main(["train", *source, "--features-of", "pair.py:Pair", "--model", "mlp", *quick])
    _, learner = load_run(tmp_path / "run", features_of="pair.py:Pair")
    assert next(m for m in learner.model.modules() if isinstance(m, nn.Linear)).in_features == 7
    capsys.readouterr()
    main(["evaluate", "run", "--features-of", "pair.py:Pair", "--json"])
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["rows"] == trained["rows"][:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"--features-of {NAME}", f"{NAME} needs --features-weights: a .safetensors file, or download"),
        (f"--features-of {NAME} --features-weights random", "what --features-of gives must mean something"),
        ("--features-of resnet10t", "--features-of takes timm:NAME, torchvision:NAME, FILE.py:NAME"),
        ("--features-in kept", "--features-in goes with --features-of"),
        ("--features-of own.py:Body --features-in x.safetensors", "--features-in takes a folder, which has a file"),
        ("--features-of own.py:Body --augment turns", "and --augment turns changes images: give --augment none"),
        ("--features-of own.py:Body --test-copies 3 --jitter 0.1", "changes images: give --jitter 0.0"),
        ("--features-of own.py:Body --features-layer none", "the model has no layer 'none'; it has conv, act, pool"),
        ("--features-of own.py:Body --model conv4", "but an input has the shape (5,): take --model mlp"),
        ("--features-of own.py:Tail", "AssertionError"),
        ("--features-of own.py:Bdoy", "own.py has no 'Bdoy'; the nearest names: Body"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(options, message, images, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        train(images, tmp_path / "run", *options.split())
    told = capsys.readouterr().err
    assert status.value.code == 2 and message in told and not (tmp_path / "run").exists()


def test_functions_have_no_inputs_that_stay(capsys):
    with pytest.raises(SystemExit):
        main(["train", "sinusoid", "--features-of", "own.py:Body"])
    assert "draws new inputs for each task: give no --features-of" in capsys.readouterr().err


def test_what_is_served_is_seen_as_in_training(images, weights, tmp_path, monkeypatch):
    """Pictures that an adapted model is given reach the network as those of the run did."""
    run = tmp_path / "run"
    train(images, run, "--model", NAME, "--model-weights", weights, "--no-baselines")
    loaded = serving.load_run(run)
    files = sorted((images / "even" / "class0").glob("*.png"))
    taken = loaded.intake.inputs(files)
    raw = torch.stack([torch.from_numpy(np.array(Image.open(path)))[None] for path in files])
    torch.testing.assert_close(taken.inputs, decoder(NAME)(raw))
    assert loaded.learner.model(taken.inputs).shape == (len(files), 2)
    torch.testing.assert_close(loaded.intake.ready(taken.inputs), taken.inputs)
    on_vectors = tmp_path / "vectors"
    train(images, on_vectors, "--features-of", NAME, "--features-weights", weights, "--no-baselines")
    with pytest.raises(InputError, match="has kept no size of its pictures"):
        serving.load_run(on_vectors)
