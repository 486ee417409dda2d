"""`fomaml check`: how the module is named, what is printed, how it exits."""

import json
import sys

import pytest
from torch import nn

from fomaml.app.cli import main
from fomaml.app.modules import load_module

FILE = """
import torch
from torch import nn
from wide import WIDTH

class Net(nn.Sequential):
    def __init__(self, width=WIDTH):
        super().__init__(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5))

class Needs(nn.Module):
    def __init__(self, width):
        super().__init__()

def leaky():
    print("building")
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))

def number():
    return 3

def fails():
    raise RuntimeError("no weights here\\nmore")

net = Net()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with a package and a file of modules; the imports are undone afterwards."""
    (tmp_path / "nets.py").write_text(FILE)
    (tmp_path / "wide.py").write_text("WIDTH = 8\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "two.py").write_text(
        "from torch import nn\nclass A(nn.Module): pass\nclass B(nn.Module): pass\n"
        "def build(): return nn.Linear(6, 5)\n"
    )
    (tmp_path / "none.py").write_text("from torch import nn\n")
    (tmp_path / "made.py").write_text(
        "from torch import nn\ndef main(): raise SystemExit(3)\ndef build(): return nn.Linear(6, 5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def run(*arguments):
    main(["check", *arguments, "--input", "6"])


@pytest.mark.parametrize("name", ["nets:Net", "nets.py:Net", "nets.py:net", "nets.py", "nets", "made.py"])
def test_the_module_by_name(folder, name):
    assert isinstance(load_module(name), (nn.Sequential, nn.Linear))


def test_a_file_elsewhere_imports_its_neighbours(folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(load_module(str(folder / "nets.py:Net")), nn.Sequential)


def test_the_command_prints_the_report(folder, capsys):
    run("nets:Net")
    printed = capsys.readouterr().out
    heading = (
        "nets:Net in train mode, inputs (6,), 5-way 2-shot, 3 inner steps of 0.01\n\nok       101 parameters"
    )
    assert printed.startswith(heading)
    assert printed.endswith("\nNothing would be silently wrong (0 notes, 0 refused).\n")


def test_the_command_exits_with_1_when_something_is_wrong(folder, capsys):
    with pytest.raises(SystemExit) as raised:
        run("nets.py:leaky")
    assert raised.value.code == 1
    printed = capsys.readouterr()
    assert "\nWRONG    batch norms with running statistics" in printed.out
    assert "\n         → fomaml.convert_batch_norm(model" in printed.out
    assert "building" in printed.err and "building" not in printed.out


def test_the_command_as_json(folder, capsys):
    with pytest.raises(SystemExit):
        run("nets.py:leaky", "--json", "--inner-steps", "1", "--ways", "4")
    found = json.loads(capsys.readouterr().out)
    assert found["exit_status"] == 1
    assert found["subject"].endswith("4-way 2-shot, 1 inner step of 0.01")
    assert {"level", "what", "cure"} == set(found["findings"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "there is no file absent.py"),
        (["absent_module:f"], "could not be imported: ModuleNotFoundError: No module named 'absent_module'"),
        (
            ["broken.py:f"],
            "broken.py could not be imported: ModuleNotFoundError: No module named 'nothing_of",
        ),
        (["nets:Nett"], "nets has no 'Nett'; the nearest names: Net"),
        (["nets:number"], "nets:number must give an nn.Module, not 3, of type int"),
        (["nets:fails"], "nets:fails could not be built: RuntimeError: no weights here"),
        (["nets:Needs"], "nets:Needs needs width: give --model-options width=VALUE"),
        (["two.py"], "which one of two.py? Name one, two.py:NAME; there are: A, B, build"),
        (
            ["none.py"],
            "which one of none.py? Name one, none.py:NAME; there are: none that needs no arguments",
        ),
        (["nets:Net", "--input-dtype", "int64"], "--input-dtype int64 and --vocabulary N go together"),
        (["nets:Net", "--vocabulary", "3"], "--input-dtype int64 and --vocabulary N go together"),
        (
            ["nets:Net", "--input-dtype", "int8"],
            "unknown input dtype 'int8', did you mean int64? There are: float32",
        ),
        (["nets:Net", "--ways", "0"], "--ways must be a whole number of 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("fomaml: error: ") and printed.err.count("\n") == 1


OBJECTS = """
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Found:
    logits: torch.Tensor
    count: int


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, inputs):
        return Found(self.layer(inputs), 1)


def loss(forward, examples):
    return nn.functional.cross_entropy(forward(examples.inputs).logits, examples.targets)


def largest(forward, examples):
    return forward(examples.inputs).logits.max()
"""


def test_an_object_of_ones_own_goes_to_the_loss_as_it_is(folder, capsys):
    (folder / "objects.py").write_text(OBJECTS)
    given = ["objects.py:Net", "--inner-steps", "1", "--loss", "objects.py:loss"]
    run(*given, "--metric", "objects.py:largest", "--metric-direction", "lower")
    told = capsys.readouterr().out
    assert "first order, batched: equals the plain reference" in told
    assert "the metric objects.py:largest gives" in told
    with pytest.raises(SystemExit):
        run("objects.py:Net")
    told = capsys.readouterr().err
    assert "not a Found with 'logits', 'count': give --output, the part that is judged" in told
