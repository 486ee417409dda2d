import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fomaml.checkpoint as checkpoint
from fomaml.checkpoint import (
    load_state,
    load_tensors,
    load_weights,
    save_state,
    save_tensors,
    save_weights,
)
from fomaml.errors import InputError
from fomaml.files import write_text
from fomaml.models import MLP
from zoo import User


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.safetensors"


def trained(optimizer=torch.optim.Adam, **options):
    """A model and its optimiser after two steps."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = optimizer(model.parameters(), **({"lr": 0.1} | options))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


# --- round trips ----------------------------------------------------------------------------------


def test_tensors_and_facts_come_back(path):
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "half": torch.randn(2).half(),
        "empty": torch.zeros(0, 5),
        "number": torch.tensor(3),
        "flag": torch.tensor([True, False]),
        "learned": nn.Parameter(torch.randn(2)),
    }
    tensors["shared"] = tensors["half"]
    facts = {"iteration": 7, "lr": 0.1 + 0.2, "names": ["é", None], "nested": {"deep": True}}
    save_tensors(path, tensors, facts)
    found, read = load_tensors(path)
    assert same(found, {n: t.detach() for n, t in tensors.items()})
    assert read == facts
    save_tensors(path, {"a": torch.ones(1)})
    assert load_tensors(path)[1] == {}


def test_weights_come_back_with_buffers_and_ties(path):
    model = User()
    model(torch.randn(2, 6))  # its buffer counts
    save_weights(path, model)
    other = load_weights(path, User())
    assert same(other.state_dict(), model.state_dict())
    assert other.calls == 1 and other.first.weight is other.second.weight


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"amsgrad": True, "betas": (0.5, 0.6)}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_a_state_comes_back_and_goes_on_with_the_same_bits(path, kind, options):
    model, optimizer = trained(kind, **options)
    save_state(path, model, optimizer, 12)
    torch.manual_seed(8)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    restored = kind(other.parameters(), lr=9.0)
    assert load_state(path, other, restored) == 12
    assert restored.param_groups[0]["lr"] == 0.1
    for module, inner in ((model, optimizer), (other, restored)):
        torch.manual_seed(1)
        inner.zero_grad()
        module(torch.randn(5, 3)).square().sum().backward()
        inner.step()
    assert same(other.state_dict(), model.state_dict())


def test_a_state_without_a_step_yet_comes_back(path):
    model = MLP(3, 2)
    save_state(path, model, torch.optim.Adam(model.parameters()), 0)
    other = MLP(3, 2)
    assert load_state(path, other, torch.optim.Adam(other.parameters())) == 0
    assert same(other.state_dict(), model.state_dict())


# --- what is wrong with a file --------------------------------------------------------------------


def loaders(path):
    model = MLP(3, 2)
    yield lambda: load_tensors(path)
    yield lambda: load_weights(path, model)
    yield lambda: load_state(path, model, torch.optim.Adam(model.parameters()))


def test_a_file_that_is_not_there(path):
    for load in loaders(path):
        with pytest.raises(InputError) as raised:
            load()
        assert str(raised.value) == f"no file {path}: was the run finished?"


def test_a_file_cut_short_anywhere(path):
    model, optimizer = trained()
    save_state(path, model, optimizer, 3)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for load in loaders(path):
            with pytest.raises(InputError, match="is damaged or not a safetensors file"):
                load()


@pytest.mark.parametrize("content", [b"PK\x03\x04 not this", b"\xff" * 64, b"{}" * 20])
def test_a_file_of_another_kind(path, content):
    path.write_bytes(content)
    for load in loaders(path):
        with pytest.raises(InputError, match="damaged"):
            load()


def test_a_folder_in_its_place(path):
    path.mkdir()
    for load in loaders(path):
        with pytest.raises(InputError, match=r"state\.safetensors"):
            load()


def test_messages_are_one_line_and_name_the_file(path):
    save_weights(path, MLP(3, 2))
    with pytest.raises(InputError) as raised:
        load_weights(path, MLP(4, 2, 2))
    message = str(raised.value)
    assert message.startswith(f"{path} does not fit the model: ") and "\n" not in message
    assert "1.weight" in message and "3.weight" in message


@pytest.mark.parametrize("other", [MLP(4, 2), MLP(3, 2, 2), nn.Linear(3, 2)])
def test_a_state_of_another_module(path, other):
    model = MLP(3, 2)
    save_state(path, model, torch.optim.Adam(model.parameters()), 3)
    with pytest.raises(InputError, match="is no state of this run"):
        load_state(path, other, torch.optim.Adam(other.parameters()))
    save_weights(path, model)
    with pytest.raises(InputError, match="is no state of this run"):
        load_state(path, model, torch.optim.Adam(model.parameters()))


def test_a_state_of_another_optimiser(path):
    model, optimizer = trained(torch.optim.Adam)
    save_state(path, model, optimizer, 3)
    with pytest.raises(InputError, match="is no state of this run"):
        load_state(path, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def test_a_state_of_an_optimiser_of_other_groups(path):
    model, optimizer = trained()
    save_state(path, model, optimizer, 3)
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(InputError, match="is no state of this run"):
        load_state(path, model, torch.optim.Adam(groups))


# --- whole or not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(path, monkeypatch, error):
    save_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def half(tensors, file, facts):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(type(error)):
        save_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


KILLED = """
import os, sys, torch
import fomaml.checkpoint as checkpoint
def half(tensors, file, facts):
    open(file, "wb").write(b"half")
    os._exit(9)
checkpoint.save_file = half
checkpoint.save_tensors(sys.argv[1], {"a": torch.zeros(3)})
"""


def test_a_killed_run_leaves_the_old_file_whole(path):
    save_tensors(path, {"a": torch.ones(3)}, {"iteration": 4})
    source = str(Path(checkpoint.__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", KILLED, path], env=os.environ | {"PYTHONPATH": source})
    assert killed.returncode == 9
    tensors, facts = load_tensors(path)
    assert tensors["a"].tolist() == [1, 1, 1] and facts == {"iteration": 4}
    left = [name for name in os.listdir(path.parent) if name != path.name]
    assert all(name.startswith(".") and not name.endswith(".safetensors") for name in left)
    assert len(left) == 1  # and the next save is not in its way
    save_tensors(path, {"a": torch.zeros(3)})
    assert load_tensors(path)[0]["a"].tolist() == [0, 0, 0]


def test_a_killed_first_save_leaves_no_file(path):
    source = str(Path(checkpoint.__file__).parents[1])
    subprocess.run([sys.executable, "-c", KILLED, path], env=os.environ | {"PYTHONPATH": source})
    with pytest.raises(InputError, match="no file"):
        load_tensors(path)


def test_text_is_written_whole_in_utf8(tmp_path):
    path = tmp_path / "result.txt"
    write_text(path, "98.1 ± 0.3 %\n")
    write_text(path, "φ\n")
    assert path.read_bytes() == "φ\n".encode()
    assert os.listdir(tmp_path) == ["result.txt"]


def test_no_source_file_reads_pickles():
    root = Path(checkpoint.__file__).parent
    for file in root.rglob("*.py"):
        code = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith('"""')]
        for word in ("torch.load(", "torch.save(", "import pickle", "allow_pickle", "joblib", "dill"):
            assert not any(word in line for line in code), (file.name, word)
