"""What cannot fit into memory is refused from its settings, with both numbers, before anything is allocated."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from commands import refused
from fomaml import ClassSource, Episodes, InputError, RegressionEpisodes, Sinusoids
from fomaml import memory as of_machine
from fomaml.app import fits
from fomaml.app.cli import main
from fomaml.app.networks import build_model
from fomaml.app.settle import settle

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 16 GB, whichever this one is."""
    monkeypatch.setattr(of_machine, "total", lambda device: 16 * GB)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(10):
        (root / f"class{number}").mkdir()
        for image in range(3):
            Image.fromarray(np.zeros((16, 16), np.uint8)).save(root / f"class{number}" / f"{image}.png")
    return root


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sinusoid --shots 2147483648",
            "a training task of 2147483658 examples would take 34.4 GB of memory at least",
        ),
        ("sinusoid --query-shots 999999999999", "a training task of 1000000000009 examples would take 16 TB"),
        ("sinusoid --meta-batch-size 1000000000000", "a meta-batch of 1000000000000 tasks would take 320 TB"),
        ("sinusoid --test-query-shots 99999999999", "a test task of 100000000009 examples would take 1.6 TB"),
        ("sinusoid --test-tasks 1000000000000", "the scores of 1000000000000 tasks would take 20 TB"),
        ("sinusoid --validation-tasks 1000000000000", "the scores of 1000000000000 tasks would take 20 TB"),
        ("FOLDER --ways 99999999999", "a training task of 299999999997 examples"),
        ("FOLDER --test-copies 99999999999 --jitter 0.1", "a test task of 599999999994 examples"),
        ("FOLDER --image-size 100000 100000", "a training task of 6 examples would take 60 GB"),
        ("FOLDER --image-size 1000000 1000000 --rgb", "an image of 1000000 x 1000000 would take 3 TB"),
        ("FOLDER --channels 1000000", "the network conv4 of 27000023000002 weights would take 108 TB"),
        (
            "FOLDER --channels 100000000000000",
            "the network conv4 has more weights than can be counted: give a smaller",
        ),
        ("FOLDER --norm-policy per-step --inner-steps 1000000 --channels 9999", "the network conv4 of "),
        (
            "FOLDER --algorithm maml --inner-steps 1000000",
            "1000000 inner steps of second order would take 44",
        ),
    ],
)
def test_a_run_that_cannot_fit(text, message, images, tmp_path, capsys):
    text = text.replace("FOLDER", f"folder:{images} --query-shots 2 --ways 2", 1)
    said = refused(capsys, ["train", *text.split(), "--iterations", 1, "--out", tmp_path / "run"])
    assert said.startswith(message) and not (tmp_path / "run").exists()
    assert "counted" in said or re.search(r"and this machine has 16 GB: give (fewer|a smaller) ", said)


def test_the_sizes_of_an_evaluation(tmp_path, capsys):
    quick = "--iterations 1 --meta-batch-size 1 --test-tasks 2 --test-steps 0 1 --no-baselines"
    main(["train", "sinusoid", *quick.split(), "--out", str(tmp_path / "run")])
    said = refused(capsys, ["evaluate", tmp_path / "run", "--shots", 99999999999])
    assert said.startswith("a test task of 100000000009 examples would take 1.6 TB")


def test_what_the_library_draws():
    sinusoids = RegressionEpisodes(Sinusoids(), shots=10**10, query_shots=1)
    with pytest.raises(
        InputError, match=r"1 tasks of 10000000001 examples would take 160 GB of memory at least"
    ):
        sinusoids[0]
    source = ClassSource(torch.zeros(8, 1), torch.arange(8) // 4)
    with pytest.raises(InputError, match="tasks of 6 examples would take 96 TB"):
        Episodes(source, ways=2, shots=1, query_shots=2).batch(0, 10**12)


@pytest.mark.parametrize("name", ["mlp", "conv4", "conv4-strided", "conv4-strided-flat"])
def test_an_estimate_is_what_is_there(name, monkeypatch):
    """Of the network: the bytes of its weights, to the last one."""
    told = []
    monkeypatch.setattr(fits, "check_fits", lambda what, needed, cure, device=None: told.append(needed))
    found = build_model(settle(source="mnist", model=name))
    assert sum(each.numel() * each.element_size() for each in (*found.parameters(), *found.buffers())) in told


def test_an_estimate_is_below_what_a_batch_takes(monkeypatch):
    """Of tasks: no more than their tensors and random numbers, so that what fits is never refused."""
    told = []
    monkeypatch.setattr(fits, "check_fits", lambda what, needed, cure, device=None: told.append(needed))
    settings = settle(source="sinusoid", shots=100, query_shots=200, meta_batch_size=7)
    batch = RegressionEpisodes(Sinusoids(), shots=100, query_shots=200).batch(0, 7)
    held = sum(part.nbytes for examples in batch for part in examples)
    fits.check_training_fits(settings)
    assert max(told) <= held + 7 * 300 * 2 * 8  # numpy draws inputs and targets in float64


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (25.3e9, "25.3 GB"), (1e24, "1e+06 EB")],
)
def test_bytes_in_words(number, words):
    assert of_machine.in_units(number) == words


def test_this_machine_tells_its_memory(monkeypatch):
    monkeypatch.undo()
    found = of_machine.total("cpu")
    assert found is None or found > 10**8
    assert of_machine.total("cuda:999") is None
