"""Where a file is to be written: a missing folder is made, ~ is the user's, and what cannot be is one line."""

import os
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fomaml.checkpoint import load_progress, load_state, load_weights, save_state, save_weights
from fomaml.errors import InputError
from fomaml.files import load_tensors, save_tensors, write_text
from fomaml.models import MLP

MODEL = MLP(3, 2)
WRITERS = {
    "weights": partial(save_weights, module=MODEL),
    "state": partial(save_state, module=MODEL, optimizer=torch.optim.Adam(MODEL.parameters()), iteration=1),
    "tensors": partial(save_tensors, tensors={"a": torch.ones(2)}),
    "text": partial(write_text, text="a\n"),
}
READERS = {
    "weights": lambda path: load_weights(path, MLP(3, 2)),
    "state": lambda path: load_state(path, m := MLP(3, 2), torch.optim.Adam(m.parameters())),
    "progress": load_progress,
    "tensors": load_tensors,
}
each_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@each_writer
@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_a_missing_folder_is_made(write, kind, tmp_path):
    path = tmp_path / "of" / "two" / "file.safetensors"
    write(kind(path))
    write(kind(path))
    assert path.is_file() and os.listdir(path.parent) == [path.name]


@each_writer
def test_a_file_in_the_folder_at_hand(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("file")
    assert os.listdir() == ["file"]


@each_writer
def test_the_users_folder(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("~/models/file")
    assert os.listdir(tmp_path / "models") == ["file"]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_is_in_the_users_folder_is_read(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    WRITERS["state" if read is not READERS["weights"] else "weights"]("~/models/file")
    read("~/models/file")


def refused(write, path):
    with pytest.raises(InputError) as error:
        write(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@each_writer
def test_a_folder_is_no_file(write, tmp_path):
    assert refused(write, tmp_path) == f"{tmp_path} is a folder, expected a file; add the file's name"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_folder_is_not_read_as_a_file(read, tmp_path):
    assert refused(read, tmp_path) == f"{tmp_path} is a folder, expected a file; add the file's name"


@each_writer
def test_a_file_is_no_folder(write, tmp_path):
    (tmp_path / "file").write_text("a")
    path = tmp_path / "file" / "weights"
    assert refused(write, path).startswith(f"the folder of {path} cannot be made (")
    path = tmp_path / "file" / "more" / "weights"
    assert refused(write, path).startswith(f"the folder of {path} cannot be made (")


@each_writer
def test_a_folder_that_may_not_be_written_to(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert refused(write, tmp_path / "a") == f"the folder {tmp_path} cannot be written to; give another"


class Odd(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def test_state_that_is_no_tensor_is_named(tmp_path):
    message = "'_extra_state' is a dict; only tensors can be saved"
    assert refused(partial(save_weights, module=Odd(2, 2)), tmp_path / "a") == message


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": torch.tensor(0.25)}),
        (torch.optim.SGD, {"lr": np.float32(0.25), "momentum": np.float64(0.5)}),
        (torch.optim.Adam, {"lr": torch.tensor(0.25), "betas": (np.float64(0.5), np.float64(0.75))}),
    ],
)
def test_a_state_holds_options_of_every_kind(kind, options, tmp_path):
    models = [MLP(3, 2), MLP(3, 2)]
    one, other = (kind(model.parameters(), **options) for model in models)
    models[0](torch.randn(4, 3)).sum().backward()
    one.step()
    save_state(tmp_path / "a", models[0], one, np.int64(3))
    other.param_groups[0]["lr"] = other.param_groups[0]["lr"] * 2
    assert load_state(tmp_path / "a", models[1], other) == 3
    assert isinstance(other.param_groups[0]["lr"], torch.Tensor) == isinstance(options["lr"], torch.Tensor)
    for model, optimizer in zip(models, (one, other)):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
    assert torch.equal(models[0][1].weight, models[1][1].weight)
