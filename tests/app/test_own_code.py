"""A model, a loss and metrics of one's own on the command line: what is recorded, compared, refused and repeated."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from commands import refused
from fomaml.app import rundir, session
from fomaml.app.cli import main
from fomaml.app.named import parsed
from fomaml.app.settle import settle
from fomaml.errors import InputError

FILE = """
import torch
from torch import nn
from wide import WIDTH

class Net(nn.Module):
    def __init__(self, outputs, in_features=7, width=WIDTH, drop=0.2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_features, width), nn.Tanh(), nn.Dropout(drop))
        self.last = nn.Linear(width, outputs)

    def forward(self, inputs):
        return self.last(self.layers(inputs))

def huber(forward, examples):
    return nn.functional.smooth_l1_loss(forward(examples.inputs), examples.targets)

def twice(forward, examples):
    return 2 * nn.functional.mse_loss(forward(examples.inputs), examples.targets)

def worst(outputs, targets):
    return (outputs - targets).abs().max()

def worst_of(forward, examples):
    return (forward(examples.inputs) - examples.targets).abs().max()
"""
WRONG = """
import random, time
import torch
from torch import nn

class Good(nn.Sequential):
    def __init__(self, width=3):
        super().__init__(nn.Linear(1, width), nn.Linear(width, 1))

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.more = nn.Linear(1, 1), [nn.Linear(1, 1)]

    def forward(self, inputs):
        return self.more[0](self.first(inputs))

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LazyLinear(1))

class Several(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, inputs):
        return {"first": super().forward(inputs), "second": inputs}

class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(28, 1))

class Empty(nn.Module):
    def forward(self, inputs):
        return inputs

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        raise KeyError("no such size")

class Plain:
    pass

one = Good()
def same():
    return one
def number():
    return 3
def unseeded():
    generator = torch.Generator()
    generator.seed()
    model = Good()
    model[0].weight.data.normal_(generator=generator)
    return model
def vector(forward, examples):
    return (forward(examples.inputs) - examples.targets) ** 2
class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs):
        return outputs.mean()
    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no derivative")
def once(forward, examples):
    return Once.apply(forward(examples.inputs))
def crashes(forward, examples):
    return examples.nothing
def sizes(outputs, targets):
    return outputs
"""
SINUSOID = [
    "sinusoid",
    "--iterations",
    "4",
    "--meta-batch-size",
    "2",
    "--test-tasks",
    "4",
    "--test-steps",
    "0",
    "1",
    "--no-baselines",
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with files of one's own code."""
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "wide.py").write_text("WIDTH = 6\n")
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "needs.py").write_text("\nimport nothing_of_that_name\n")
    (tmp_path / "doubles.py").write_text("import torch\ntorch.set_default_dtype(torch.float64)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def train(out, *more):
    main(["train", *SINUSOID, "--model", "net.py:Net", *more, "--out", str(out)])
    return json.loads((out / "result.json").read_text())


def tensors(out):
    return (out / rundir.WEIGHTS).read_bytes()


def test_the_run_records_code_and_options_and_repeats(folder, capsys):
    (folder / "net.py").write_text(FILE + "print('imported')\n")
    train(folder / "a", "--model-options", "width=4", "drop=0.5")
    train(folder / "b", "--model-options", "width=4", "drop=0.5")
    assert tensors(folder / "a") == tensors(folder / "b")  # the masks of dropout are the seed's too
    assert "imported" not in capsys.readouterr().out
    config = json.loads((folder / "a" / "config.json").read_text())
    assert config["model"] == "net.py:Net" and config["model_options"] == {"width": 4, "drop": 0.5}
    assert config["code"]["model"]["beside"].keys() == {"wide.py"}
    _, learner = rundir.load_run(folder / "a", model="net.py:Net")
    assert [tuple(p.shape) for p in learner.model.parameters()] == [
        (4, 1),
        (4,),
        (1, 4),
        (1,),
    ]  # told outputs, inputs


def test_nothing_is_imported_that_was_not_named(folder, capsys):
    train(folder / "run")
    (folder / "net.py").write_text("raise SystemExit('it ran')\n")
    said = refused(capsys, ["evaluate", folder / "run"])
    assert said.endswith("which is imported only where it is named again: add --model net.py:Net")
    with pytest.raises(InputError, match=r"add --model net\.py:Net"):
        rundir.load_run(folder / "run")


@pytest.mark.parametrize("file", ["net.py", "wide.py"])
def test_other_code_is_refused_unless_it_is_accepted(file, folder, capsys):
    train(folder / "run")
    for name in ("wide",):
        sys.modules.pop(name, None)
    path = folder / "elsewhere"
    path.mkdir()
    for each in ("net.py", "wide.py"):
        (path / each).write_text((folder / each).read_text() + ("# changed\n" if each == file else ""))
    sys.path[:] = [each for each in sys.path if each != str(folder)]
    arguments = ["evaluate", folder / "run", "--model", f"{path}/net.py:Net", "--json"]
    said = refused(capsys, arguments)
    assert "was made with other code" in said and file in said and "--accept-changed-code" in said
    main([*map(str, arguments), "--accept-changed-code"])
    assert json.loads(capsys.readouterr().out)["tasks"] == 4


def test_evaluate_gives_the_figures_of_the_run_and_takes_other_metrics(folder, capsys):
    result = train(folder / "run")
    capsys.readouterr()
    base = ["evaluate", str(folder / "run"), "--model", "net.py:Net", "--json"]
    main(base)
    assert json.loads(capsys.readouterr().out)["rows"] == result["rows"]
    main([*base, "--metric", "net.py:worst", "loss", "--metric-direction", "lower"])
    found = json.loads(capsys.readouterr().out)
    assert (found["metric"], found["direction"], found["unit"]) == ("worst", -1, "")
    assert [row["mean"] for row in found["others"][0]["rows"]] == [row["mean"] for row in result["rows"]]


def test_a_loss_of_ones_own_is_learned_from(folder):
    """Twice the squared error at half the step size is the squared error."""
    train(folder / "mse", "--inner-lr", "0.02", "--model-options", "drop=0.0", "--engine", "loop")
    own = ["--loss", "net.py:twice", "--inner-lr", "0.01", "--model-options", "drop=0.0", "--engine", "loop"]
    train(folder / "twice", *own)
    one = rundir.load_run(folder / "mse", model="net.py:Net")[1]
    other = rundir.load_run(folder / "twice", model="net.py:Net", loss="net.py:twice")[1]
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)  # Adam does not see the factor


def test_a_metric_of_the_model_goes_with_a_loss(folder):
    own = ["--loss", "net.py:huber", "--metric", "net.py:worst_of", "loss", "--metric-direction", "lower"]
    result = train(folder / "run", *own)
    assert result["metric"] == "worst_of" and result["others"][0]["metric"] == "loss"
    assert all(math.isfinite(row["mean"]) for row in result["rows"])


class Killed(BaseException):
    pass


def test_a_killed_run_resumes_bit_for_bit_where_its_code_is_named(folder, capsys):
    own = ["--loss", "net.py:huber", "--checkpoint-every", "2", "--iterations", "6"]
    train(folder / "whole", *own)
    named = {"model": "net.py:Net", "loss": "net.py:huber", "checkpoint_every": 2, "iterations": 6}
    settings = settle(
        source="sinusoid", meta_batch_size=2, test_tasks=4, test_steps=(0, 1), baselines=False, **named
    )

    def watch(record, seconds):
        if record.iteration == 5:
            raise Killed

    with pytest.raises(Killed):
        session.train_run(settings, folder / "killed", say=lambda line: None, watch=watch)
    resume = ["train", "--resume", folder / "killed"]
    assert refused(capsys, resume).endswith("add --model net.py:Net --loss net.py:huber")
    assert "was made with other code: the loss was huber, and is twice" in refused(
        capsys, [*resume, "--model", "net.py:Net", "--loss", "net.py:twice"]
    )
    main([*map(str, resume), "--model", "net.py:Net", "--loss", "net.py:huber"])
    assert tensors(folder / "whole") == tensors(folder / "killed")


def test_weights_to_begin_with(folder, capsys):
    save_file({"0.weight": torch.ones(3, 1), "0.bias": torch.ones(3)}, "half.safetensors")
    base = ["train", *SINUSOID, "--model", "wrong.py:Good", "--out", "run", "--model-weights"]
    assert "2 missing, as 1.weight" in refused(capsys, [*base, "half.safetensors"])
    torch.save({}, "old.pth")
    assert "convert it once: import torch" in refused(capsys, [*base, "old.pth"])
    assert not (folder / "run").exists()
    start = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    save_file(dict(start.state_dict()), "start.safetensors")
    main([*base, "start.safetensors", "--meta-lr", "1e-9"])
    learner = rundir.load_run(folder / "run", model="wrong.py:Good")[1]
    torch.testing.assert_close(learner.model[0].weight, start[0].weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model nett.py:Net", "there is no file nett.py; there are net.py"),
        ("--model net.py:Nett", "net.py has no 'Nett'; the nearest names: Net"),
        ("--model syntax.py:f", "syntax.py could not be imported: SyntaxError: invalid syntax (syntax.py, line 2)"),
        ("--model needs.py:f", "No module named 'nothing_of_that_name' (needs.py, line 2)"),
        ("--model doubles.py:f", "doubles.py sets the default dtype to torch.float64 for all of torch"),
        ("--model net.py:huber", "net.py:huber needs forward, examples: give --model-options forward=VALUE"),
        ("--model wrong.py:Fails", "wrong.py:Fails could not be built: KeyError: 'no such size' (wrong.py, line 40)"),
        ("--model wrong.py:Lazy", "wrong.py:Lazy has the lazy parameter '0.weight' without a shape"),
        ("--model wrong.py:Several", "give --output, the name or the number"),
        ("--model wrong.py:Plain", "wrong.py:Plain is a class, but no nn.Module"),
        ("--model wrong.py:number", "wrong.py:number must give an nn.Module, not 3, of type int"),
        ("--model wrong.py:Empty", "wrong.py:Empty has no parameters that require gradients"),
        ("--model wrong.py:Listed", "keeps parameters where torch does not see them, in the list 'more'"),
        ("--model wrong.py:one", "wrong.py:one is a module already, whose weights no seed has drawn"),
        ("--model wrong.py:same", "wrong.py:same gives the same weights each time it is called"),
        ("--model wrong.py:unseeded", "wrong.py:unseeded draws '0.weight' anew each time, whatever the seed"),
        ("--model wrong.py:Flat", "wrong.py:Flat fails on inputs of the data's shape, (4, 1): RuntimeError"),
        ("--model wrong.py:Good --model-options widht=3", "wrong.py:Good takes no 'widht'; it takes width"),
        ("--model wrong.py:Good --model-options width", "--model-options takes KEY=VALUE, got 'width'"),
        ("--model wrong.py:Good --channels 3", "--channels is of the models by name, not of wrong.py:Good"),
        ("--model mlp --model-options a=1", "--model-options go to a model of your own"),
        ("--model nosuch", "unknown model 'nosuch'; there are: mlp, linear, conv4"),
        ("--loss wrong.py:vector", "the loss returns a tensor of shape (10, 1)"),
        ("--loss wrong.py:once", "the loss wrong.py:once fails: "),
        ("--loss wrong.py:crashes", "AttributeError: 'Examples' object has no attribute 'nothing' (wrong.py, line"),
        ("--metric wrong.py:sizes --metric-direction lower", "expected one number for each task"),
        ("--metric net.py:worst", "say whether more of it is better, --metric-direction higher or lower"),
        ("--metric accuracy", "accuracy of one output for each example needs targets of 0 and 1"),
        ("--metric nosuch", "unknown metric 'nosuch'"),
        ("--model timm:resnet10t", "timm:resnet10t needs --model-weights"),
        ("--algorithm anil --head nosuch", "the model has no layer 'nosuch' for --head; the nearest:"),
        ("--norm-policy frozen --model wrong.py:Good", "give --model-weights FILE"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_leaves_nothing(arguments, message, folder, capsys):
    if "timm" in arguments:
        pytest.importorskip("timm", reason="of the extra backbones")
    assert message in refused(capsys, ["train", *SINUSOID, *arguments.split(), "--out", "run"])
    assert not (folder / "run").exists() and torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("0.5", 0.5), ("1e-3", 1e-3), ("True", True), ("None", None), ("[1, 2]", [1, 2]), ("(1, 2)", [1, 2]),
        ("relu", "relu"), ("'a b'", "a b"), ("{'a': 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_options_are_literals_or_words(text, value):
    assert parsed([f"key={text}"]) == {"key": value}


@pytest.mark.parametrize("text", ["true", "nan", "[1", "1e999", "{1}", "b'x'", "f(x)", ""])
def test_what_only_looks_like_a_value_is_refused(text):
    with pytest.raises(InputError):
        parsed([f"key={text}"])


def test_check_takes_options_a_loss_and_metrics(folder, capsys):
    own = "--model-options width=3 drop=0.0 --loss net.py:huber --metric net.py:worst_of --metric-direction lower"
    own += " --ways 1"
    main(["check", "net.py:Net", "--input", "1", *own.split()])
    assert "the metric net.py:worst_of gives" in capsys.readouterr().out
