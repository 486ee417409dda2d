"""Embeddings: what the model gives, once; kept on disk, and never taken for those of another model or other data."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from family import assert_agrees
from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource, pixels
from fomaml.engines import meta_gradient
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.features import embed
from fomaml.learning.algorithms import ANIL, FOMAML
from fomaml.models import BatchNorm
from fomaml.tasks import Examples, Task


def images(seed=0, classes=4, number=5):
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randint(256, (classes * number, 1, 6, 6), dtype=torch.uint8, generator=drawn)
    labels = torch.arange(classes * number) % classes
    return ClassSource(inputs, labels, [f"class {c}" for c in range(classes)], pixels())


class Net(nn.Module):
    """A body, dropout, a head; it counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 3, 3, 2), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten())
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(12, 7)
        self.passes = 0

    def forward(self, inputs):
        self.passes += 1
        return self.head(self.dropout(self.body(inputs)))


@pytest.fixture
def model():
    return Net()


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("layer", [None, "body", "body.1"])
def test_what_the_model_gives_in_evaluation_mode(model, layer, batch_size):
    source = images()
    found = embed(model, source, layer=layer, batch_size=batch_size)
    assert model.training and model.dropout.training
    model.eval()
    inner = model if layer is None else model.body if layer == "body" else model.body[:2]
    expected = inner(source.take(torch.arange(20)))
    torch.testing.assert_close(found.inputs, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not found.inputs.requires_grad and found.names == source.names
    assert torch.equal(found.counts, source.counts) and torch.equal(found.labels(), source.labels())


def test_what_a_layer_behind_changes_in_place_is_taken_before():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(inplace=True))
    source = images()
    found = embed(model, source, layer="1").inputs
    torch.testing.assert_close(found, model[:2](source.take(torch.arange(20))).detach())
    assert (found < 0).any()


def test_episodes_of_the_vectors_are_those_of_the_images(model):
    """The head's meta-gradient on vectors is that of ANIL on the whole, frozen, network."""
    source = images()
    model.eval()
    kwargs = {"ways": 3, "shots": 1, "query_shots": 2, "seed": 3}
    whole, vectors = (Episodes(s, **kwargs).batch(0, 4) for s in (source, embed(model, source, layer="body")))
    of_body = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    expected = meta_gradient(ANIL(model, 0.1, 2, frozen=of_body), whole, engine="loop")
    found = meta_gradient(FOMAML(model.head, 0.1, 2), vectors, engine="loop")
    renamed = {f"head.{n}": g for n, g in found.gradients.items()}
    own = {n: g for n, g in expected.gradients.items() if n not in of_body}
    assert_agrees(found._replace(gradients=renamed), expected._replace(gradients=own), 1e-5)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_second_time_it_is_read_from_disk(model, kind, tmp_path):
    path = tmp_path / "made" / ("kept.safetensors" if kind == "file" else "kept")
    source = images()
    first = embed(model, source, path=path, batch_size=4)
    assert model.passes == 5 + 3  # of the examples by themselves
    model.passes = 0
    again = embed(model, source, path=path)
    assert torch.equal(again.inputs, first.inputs) and again.names == first.names
    assert model.passes == 3
    assert len([*tmp_path.rglob("*.safetensors")]) == 1 and not [*tmp_path.rglob(".*")]


def spoilt(what, model, source, path):
    """Another model or other data than the file was made of."""
    if what == "weights":
        with torch.no_grad():
            model.head.bias[0] += 1e-3
    elif what == "structure":
        model.body[2] = nn.GELU()
    elif what == "data":
        source = images(seed=1)
    elif what == "one pixel":
        source.inputs[7, 0, 0, 0] ^= 1
    elif what == "names":
        source = ClassSource(source.inputs, source.labels(), [*"abcd"], source.decode)
    elif what == "layer":
        return model, source, {"layer": "head"}
    elif what == "decoder":
        source.decode = pixels(0.4, 0.6)
    elif what == "code":
        model.forward = lambda inputs: 2 * model.head(model.body(inputs))
    else:
        tensors = load_file(path)
        tensors["vectors"][3] += 1
        save_file(tensors, path, {"format": "pt"} if what == "vectors without a digest" else header(path))
    return model, source, {}


def header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "was made of other weights: delete it, or give a folder"),
        ("structure", "was made of other weights"),
        ("layer", "was made of other weights"),
        ("data", "was made of other data"),
        ("one pixel", "was made of other data"),
        ("names", "was made of other data"),
        ("decoder", "holds other vectors than the model gives now: delete it"),
        ("code", "holds other vectors than the model gives now"),
        ("vectors", "is damaged: what it holds has another digest"),
        ("vectors without a digest", "was made of other weights"),
    ],
)
def test_a_file_of_something_else_is_refused(what, message, model, tmp_path):
    path, source = tmp_path / "kept.safetensors", images()
    embed(model, source, path=path)
    kept = path.read_bytes()
    model, source, options = spoilt(what, model, source, path)
    with pytest.raises(InputError, match=f"kept.safetensors {message}"):
        embed(model, source, path=path, **options)
    if "vectors" not in what:
        assert path.read_bytes() == kept
        if what not in ("decoder", "code"):  # a folder has a file for each
            embed(model, source, path=tmp_path, **options)


def test_a_failed_embedding_leaves_no_file(model, tmp_path):
    model.head = nn.Linear(5, 2)
    with pytest.raises(InputError, match=r"the model does not take inputs torch.float32 .20, 1, 6, 6.: Runt"):
        embed(model, images(), path=tmp_path / "kept.safetensors")
    assert not [*tmp_path.iterdir()]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.flat, self.act, self.unused = nn.Flatten(), nn.ReLU(), nn.ReLU()

    def forward(self, inputs):
        return self.act(self.act(self.flat(inputs)))


REFUSED = {
    "batch statistics": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), BatchNorm(3), nn.Flatten()), {},
        "what the model makes of an example depends on the others of its batch",
    ),
    "batch statistics of torch's": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()), {},
        "what the model makes of an example depends on the others of its batch",
    ),
    "no tensor": (
        lambda: type("Pair", (nn.Module,), {"forward": lambda self, x: (x, x)})(), {},
        "the model gives a tuple for 20 examples, expected a tensor with one row for each",
    ),
    "one row": (
        lambda: type("Mean", (nn.Module,), {"forward": lambda self, x: x.mean(0, keepdim=True)})(), {},
        r"the model gives \(1, 1, 6, 6\) for 20 examples",
    ),
    "no layer": (Twice, {"layer": "head"}, "the model has no layer 'head'; it has flat, act, unused"),
    "a layer that runs twice": (Twice, {"layer": "act"}, "the layer 'act' runs 2 times in a forward pass"),
    "a layer that never runs": (Twice, {"layer": "unused"}, "the layer 'unused' runs 0 times in a forward pass"),
    "no batch": (Twice, {"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        embed(make(), images(), **options)


# --- groups of rows -------------------------------------------------------------------------------


class Encoder(nn.Module):
    """In the manner of a text encoder: keywords in, an object with several outputs."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, ids, mask):
        states = self.mix(self.table(ids)) * mask.unsqueeze(-1)
        return SimpleNamespace(states=states, pooled=states.sum(1))


def sentences():
    """Rows of 5 tokens in three groups, in no order."""
    drawn = torch.Generator().manual_seed(2)
    ids = torch.randint(9, (30, 5), generator=drawn)
    mask = (torch.rand(30, 5, generator=drawn) < 0.8).float()
    groups = np.array([*"abc"])[torch.randperm(30, generator=drawn).numpy() % 3]
    return GroupSource({"ids": ids, "mask": mask}, np.arange(30) % 2, groups, order=np.arange(30)[::-1])


@pytest.mark.parametrize("output", ["pooled", lambda found: found.states.mean(1)], ids=["name", "function"])
def test_rows_of_groups_keep_their_tasks(output, tmp_path):
    source, model = sentences().select(["c", "a"]), Encoder()
    found = embed(model, source, output=output, batch_size=4, path=tmp_path)
    assert found.names == ["c", "a"] and found.classes == source.classes
    for group in range(2):
        for own, of_source in zip(found.positions(group), source.positions(group), strict=True):
            (vectors, targets), (inputs, expected) = found.take(own), source.take(of_source)
            returned = model(**inputs)
            outputs = returned.pooled if output == "pooled" else returned.states.mean(1)
            torch.testing.assert_close(vectors, outputs.detach())
            assert torch.equal(targets, expected)
    assert found.input_shapes == (4,)
    again = embed(model, source, output=output, path=tmp_path)
    assert torch.equal(again.take(np.arange(7))[0], found.take(np.arange(7))[0])
    assert len([*tmp_path.iterdir()]) == 1
    embed(model, sentences(), output=output, path=tmp_path)  # other rows, another file
    assert len([*tmp_path.iterdir()]) == 2


def test_targets_stay_scaled_and_vectors_are_not():
    inputs, targets = np.random.default_rng(0).normal(5, 3, (12, 3)), np.arange(12.0)
    source = GroupSource(inputs, targets, np.arange(12) % 3)
    source = source.scaled(source.fit_scaling())
    model = nn.Linear(3, 2)
    found = embed(model, source)
    rows = np.arange(12)
    torch.testing.assert_close(found.take(rows)[0], model(source.take(rows)[0]).detach())
    assert torch.equal(found.take(rows)[1], source.take(rows)[1])


def test_a_source_of_another_kind_is_refused(model):
    with pytest.raises(InputError, match="embed takes a ClassSource or a GroupSource, got a list"):
        embed(model, [1, 2])


def test_statistics_that_nothing_has_moved_are_warned_of():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36))
    with pytest.warns(RuntimeWarning, match="with statistics that nothing has moved"):
        embed(model, images())


def test_a_model_in_half_precision_on_its_own_data(model):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).to(torch.bfloat16)
    source = images()
    source.decode = lambda inputs: inputs.to(torch.bfloat16) / 255
    found = embed(model, source, batch_size=3)
    assert found.inputs.dtype == torch.bfloat16
    task = Episodes(found, ways=2, shots=1, query_shots=1, seed=0).batch(0, 1)
    assert isinstance(task, Task) and isinstance(task.support, Examples)
    assert F.linear(task.support.inputs, torch.ones(2, 5, dtype=torch.bfloat16)).isfinite().all()
