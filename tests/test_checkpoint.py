import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import fomaml.files as files
from fomaml.checkpoint import load_progress, load_state, load_weights, save_state, save_weights
from fomaml.errors import InputError
from fomaml.files import load_tensors, save_tensors, write_text
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


# --- digests --------------------------------------------------------------------------------------


FACTS = {"iteration": 7, "names": ["é", None]}
EVERY_KIND = {
    "images": torch.arange(24.0).view(1, 2, 3, 4),
    "half": torch.tensor([1.5, -2.0]).bfloat16(),
    "complex": torch.tensor([1 + 2j]),
    "empty": torch.zeros(0, 5),
    "flag": torch.tensor(True),
}


def digest(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fomaml"])["digest"]


def reread(path):
    """What a file holds, or None where it is refused as damaged."""
    try:
        return load_tensors(path, settings={"shots": 1})
    except InputError as error:
        assert "is damaged" in str(error) and str(path) in str(error) and "\n" not in str(error)
        return None


def test_a_changed_bit_is_noticed_wherever_it_is(path):
    """Or it changes nothing, as in the padding of the header."""
    save_tensors(path, EVERY_KIND, FACTS, {"shots": 1})
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if (found := reread(path)) is None:
            refused.append(place)
        else:
            assert same(found[0], EVERY_KIND) and found[1] == FACTS
    assert len(refused) > 0.95 * len(whole)
    assert set(range(header, len(whole))) <= set(refused)
    path.write_bytes(whole)
    assert reread(path)[1] == FACTS


def rewritten(path, change):
    """The file with another header or other tensors, and the digest as it was."""
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    entry = json.loads(header["fomaml"])
    change(header, entry, tensors)
    save_file(tensors, path, {**header, "fomaml": json.dumps(entry)} if "fomaml" in header else header)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, entry, tensors: entry["facts"].update(iteration=8),
        lambda header, entry, tensors: entry.update(settings=files.settings_digest({"shots": 5})),
        lambda header, entry, tensors: entry.pop("settings"),
        lambda header, entry, tensors: entry.pop("facts"),
        lambda header, entry, tensors: entry.pop("digest"),
        lambda header, entry, tensors: entry.update(more=1),
        lambda header, entry, tensors: header.update(more="1"),
        lambda header, entry, tensors: header.update(fomamm=header.pop("fomaml")),
        lambda header, entry, tensors: tensors.update(a=tensors["a"].view(3, 2)),
        lambda header, entry, tensors: tensors.update(a=tensors["a"].int()),
        lambda header, entry, tensors: tensors.update(a=tensors["a"].view(torch.int32)),
        lambda header, entry, tensors: tensors.update(c=tensors.pop("b")),
        lambda header, entry, tensors: tensors.update(a=tensors["b"], b=tensors["a"]),
        lambda header, entry, tensors: tensors.pop("b"),
        lambda header, entry, tensors: tensors.update(c=torch.zeros(0)),
    ],
)
def test_another_fact_name_shape_dtype_or_number_of_tensors_is_noticed(path, change):
    save_tensors(path, {"a": torch.zeros(2, 3), "b": torch.ones(2, 3)}, FACTS, {"shots": 1})
    rewritten(path, lambda header, entry, tensors: None)
    assert load_tensors(path)[1] == FACTS
    rewritten(path, change)
    with pytest.raises(InputError, match="is damaged: "):
        load_tensors(path)


def test_the_same_content_gives_the_same_bytes(path):
    written = set()
    for _ in range(20):
        save_tensors(path, EVERY_KIND, FACTS, {"shots": 1})
        written.add(path.read_bytes())
    assert len(written) == 1


def test_the_digest_is_that_of_the_values_in_any_memory_format(path):
    images = torch.randn(2, 3, 4, 5)
    found = set()
    for other in (
        images,
        images.contiguous(memory_format=torch.channels_last),
        images.mT.contiguous().mT,
        nn.Parameter(images.clone()),
        torch.stack([images, images], -1)[..., 0],
    ):
        save_tensors(path, {"b": other, "a": torch.ones(1)}, FACTS)
        found.add(digest(path))
        save_tensors(path, {"a": torch.ones(1), "b": other}, FACTS)
        found.add(digest(path))
    assert len(found) == 1
    save_tensors(path, {"a": torch.ones(1), "b": images + 1}, FACTS)
    assert digest(path) not in found


@pytest.mark.parametrize("header", [{"fomaml": '{"iteration": 4}'}, {"format": "pt"}, None])
def test_files_without_a_digest_are_read(path, header):
    """Those of earlier runs, whose header has the facts alone, and those that others wrote."""
    model = MLP(3, 2)
    save_file(model.state_dict(), path, header)
    assert same(load_weights(path, MLP(3, 2)).state_dict(), model.state_dict())
    assert same(load_weights(path, MLP(3, 2), {"shots": 1}).state_dict(), model.state_dict())
    assert load_tensors(path)[1] == ({"iteration": 4} if header == {"fomaml": '{"iteration": 4}'} else {})


def test_files_of_other_settings_are_refused(path):
    model = MLP(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    settings = {"shots": 1, "betas": (0.9, 0.1 + 0.2), "name": "é", "inner": {"lr": 0.1, "steps": None}}
    again = {"name": "é", "inner": {"steps": None, "lr": 0.1}, "betas": [0.9, 0.1 + 0.2], "shots": 1}
    message = "was written for other settings than those given"
    save_weights(path, model, settings)
    for known in (None, settings, again):
        load_weights(path, model, known)
    for other in ({}, settings | {"shots": 2}, settings | {"more": 1}):
        with pytest.raises(InputError, match=message):
            load_weights(path, model, other)
    save_state(path, model, optimizer, 3, {"best": 1}, settings)
    assert load_state(path, model, optimizer, again) == 3 and load_progress(path) == {"best": 1}
    with pytest.raises(InputError, match=message):
        load_state(path, model, optimizer, settings | {"shots": 2})
    save_state(path, model, optimizer, 3)
    assert load_state(path, model, optimizer, settings) == 3


# --- whole or not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(path, monkeypatch, error):
    save_tensors(path, {"a": torch.ones(3)})
    before = path.read_bytes()

    def half(tensors, file, facts):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(type(error)):
        save_tensors(path, {"a": torch.zeros(3)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


KILLED = """
import os, sys, torch
import fomaml.files as files
def half(tensors, file, facts):
    open(file, "wb").write(b"half")
    os._exit(9)
files.save_file = half
files.save_tensors(sys.argv[1], {"a": torch.zeros(3)})
"""


def test_a_killed_run_leaves_the_old_file_whole(path):
    save_tensors(path, {"a": torch.ones(3)}, {"iteration": 4})
    source = str(Path(files.__file__).parents[1])
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
    source = str(Path(files.__file__).parents[1])
    subprocess.run([sys.executable, "-c", KILLED, path], env=os.environ | {"PYTHONPATH": source})
    with pytest.raises(InputError, match="no file"):
        load_tensors(path)


def test_text_is_written_whole_in_utf8(tmp_path):
    path = tmp_path / "result.txt"
    write_text(path, "98.1 ± 0.3 %\n")
    write_text(path, "φ\n")
    assert path.read_bytes() == "φ\n".encode()
    assert os.listdir(tmp_path) == ["result.txt"]
