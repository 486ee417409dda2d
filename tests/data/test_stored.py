"""Inputs that are not in memory: the same bits as those that are, and nothing is read but what is drawn."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from fomaml.baselines.networks import pretrain
from fomaml.data.augment import rotated, warped
from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource, pixels
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.features import embed
from fomaml.group_episodes import GroupEpisodes
from fomaml.models import MLP
from fomaml.trees import leaves

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)
LABELS = RANDOM.permutation(np.arange(60) % 6) + 3


class Counting:
    """An array that notes which of its rows are asked for."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.asked = array, array.shape, array.dtype, []

    def __getitem__(self, rows):
        self.asked.append(list(rows))
        return self.array[rows]


def mapped(folder, array):
    np.save(folder / "inputs.npy", array)
    return np.load(folder / "inputs.npy", mmap_mode="r")


MADE = {
    "as they are": lambda source: source,
    "selected": lambda source: source.select([4, 0, 2, 1]),
    "rotated": rotated,
    "warped": lambda source: warped(source, 40, examples=12),
    "selected, rotated and selected": lambda source: rotated(source.select(["5", "3", "8"])).select(range(8, 2, -1)),
}  # fmt: skip


@pytest.mark.parametrize("made", MADE)
def test_the_same_bits_as_in_memory(made, tmp_path):
    whole = MADE[made](ClassSource(IMAGES, LABELS, decode=pixels()))
    found = MADE[made](ClassSource(mapped(tmp_path, IMAGES), LABELS, decode=pixels()))
    assert found.names == whole.names and len(found.inputs) == len(whole.inputs)
    assert found.inputs.shape == whole.inputs.shape and found.inputs.dtype == whole.inputs.dtype
    for own in ("counts", "offsets"):
        assert torch.equal(getattr(found, own), getattr(whole, own))
    assert torch.equal(found.labels(), whole.labels()) and torch.equal(found.inputs[:], whole.inputs)
    for options in ({}, {"turns": True, "jitter": 0.1, "copies": 2}):
        options |= {"ways": 3, "shots": 2, "query_shots": 4, "seed": 1}
        for mine, theirs in zip(*(Episodes(source, **options).batch(7, 5) for source in (found, whole))):
            assert torch.equal(mine.inputs, theirs.inputs) and torch.equal(mine.targets, theirs.targets)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", "u1", ">u2", "i4", "c8", "?"])
def test_every_dtype_is_drawn_as_it_is(kind, tmp_path):
    values = RANDOM.integers(0, 200, (9, 3)).astype(kind)
    found = ClassSource(mapped(tmp_path, values), np.arange(9) // 3)
    expected = torch.from_numpy(values.astype(np.dtype(kind).newbyteorder("=")))
    assert found.inputs.dtype == expected.dtype
    assert np.array_equal(found.take(torch.arange(9)).numpy(), values)


def test_indices_of_any_kind(tmp_path):
    found = ClassSource(mapped(tmp_path, np.arange(6.0).reshape(6, 1)), [1, 0, 1, 0, 1, 0]).inputs
    expected = torch.tensor([1.0, 3, 5, 0, 2, 4])[:, None]
    for index in (2, slice(1, 4), torch.tensor([[5, 0], [0, 0]]), torch.tensor(3), np.array([4, 1])):
        assert torch.equal(found[index], expected[index])
    assert torch.equal(torch.cat(list(found.split(4))), expected)
    assert found[:0].shape == (0, 1)


def test_a_batch_reads_its_rows_alone_and_once():
    values = Counting(np.arange(600.0).reshape(300, 2))
    source = ClassSource(values, np.arange(300) % 10)
    episodes = Episodes(source, ways=3, shots=2, query_shots=3, seed=0)
    joined = source.select(range(8)).joined([("twice", lambda inputs: 2 * inputs)])
    assert values.asked == []
    tasks = episodes.batch(5, 4)
    drawn = {int(row) // 2 for part in tasks for row in part.inputs[..., 0].flatten()}
    [asked] = values.asked
    assert sorted(drawn) == asked and len(asked) <= 4 * 15
    values.asked.clear()
    assert joined.take(torch.tensor([0, 240])).tolist() == [[0, 1], [0, 2]]
    assert sorted(row for rows in values.asked for row in rows) == [0, 0]


def test_a_file_that_is_larger_than_what_is_held(tmp_path):
    """64 MiB on disk; a few thousand numbers of it are ever in memory."""
    file = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.float32, (4096, 4096))
    file[::512] = 7
    file.flush()
    inputs = np.load(tmp_path / "large.npy", mmap_mode="r")
    tracemalloc.start()
    try:
        source = rotated_rows(ClassSource(inputs, np.arange(4096) % 8).select(range(4)))
        task = Episodes(source, ways=4, shots=1, query_shots=2)[0]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert task.query.inputs.shape == (8, 4096)
    assert most < 4 * 2**20


def rotated_rows(source):
    return source.joined([("flipped", lambda inputs: inputs.flip(-1))])


def test_what_runs_on_a_source_runs_on_this_one(tmp_path):
    """Embedding, its file for both, and pretraining: the same bits."""
    whole = ClassSource(IMAGES, LABELS, decode=pixels())
    found = ClassSource(mapped(tmp_path, IMAGES), LABELS, decode=pixels())
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    kept = embed(model, whole, path=tmp_path / "vectors.safetensors")
    assert torch.equal(embed(model, found, path=tmp_path / "vectors.safetensors").inputs, kept.inputs)
    assert torch.equal(embed(model, found, batch_size=7).inputs, embed(model, whole, batch_size=7).inputs)
    weights = []
    for source in (found, whole):
        torch.manual_seed(0)
        net = MLP(64, 8, 6)
        pretrain(net, source, iterations=3, batch_size=8)
        weights.append(nn.utils.parameters_to_vector(net.parameters()))
    assert torch.equal(*weights)


def test_drawn_inputs_are_on_the_device_asked_for(tmp_path):
    moved = ClassSource(mapped(tmp_path, IMAGES), LABELS).to("meta")
    assert moved.take(torch.arange(4)).device.type == "meta"
    assert rotated(moved.select([0, 1])).inputs[:3].device.type == "meta"
    if torch.cuda.is_available():
        task = Episodes(moved.to("cuda"), ways=2, shots=1, query_shots=1)[0]
        assert {tensor.device.type for part in task for tensor in part} == {"cuda"}


def test_a_number_that_is_not_finite_is_found_when_it_is_drawn(tmp_path):
    values = np.zeros((20, 2))
    values[13, 1] = np.nan
    source = ClassSource(mapped(tmp_path, values), np.arange(20) // 10)
    source.take(torch.arange(10))
    message = "row 13 of the inputs, counted from 0, holds nan or infinite numbers; mend it or leave it out"
    with pytest.raises(InputError, match=f"^{message}$"):
        source.take(torch.arange(10, 20))


@pytest.mark.parametrize(
    ("values", "targets", "message"),
    [
        (np.zeros((3, 1)), [0, 1], "3 inputs but 2 targets"),
        (np.zeros((2, 1), np.longdouble), [0, 1],
         "the inputs are of dtype float128, which torch has no numbers of; convert them to float32 or float64"),
        (np.array(["a", "b"]), [0, 1], "the inputs are text, expected numbers: give each text a whole number"),
    ],
)  # fmt: skip
def test_refused(values, targets, message, tmp_path):
    with pytest.raises(InputError) as error:
        ClassSource(mapped(tmp_path, values), targets)
    assert str(error.value) == message.replace("float128", np.dtype(np.longdouble).name)


@pytest.mark.parametrize("stored", [False, True])
def test_a_transform_that_gives_something_else_is_refused(stored, tmp_path):
    source = ClassSource(mapped(tmp_path, IMAGES) if stored else IMAGES, LABELS)
    for change in (lambda inputs: inputs.float(), lambda inputs: inputs[..., :4], lambda inputs: None):
        with pytest.raises(InputError, match="must give as many inputs of the same shape and dtype, got"):
            source.joined([("changed", change)]).inputs[-2:]


def test_mapped_labels_are_taken_too(tmp_path):
    inputs = mapped(tmp_path, IMAGES)
    np.save(tmp_path / "labels.npy", LABELS)
    found = ClassSource(inputs, np.load(tmp_path / "labels.npy", mmap_mode="r"))
    assert torch.equal(found.labels(), ClassSource(IMAGES, LABELS).labels())


def noisy(inputs, random):
    return inputs + torch.from_numpy(random.normal(size=inputs.shape)).to(inputs)


def of_windows(samples):
    numbers = np.arange(12)
    source = GroupSource.from_windows(samples, [100] * 12, numbers // 2, numbers % 2, window=20, hop=10)
    return GroupEpisodes(source, shots=1, query_shots=2, augment=noisy)


def of_groups(images):
    source = GroupSource({"of": (images, LABELS)}, LABELS % 2, np.arange(60) // 20)
    return GroupEpisodes(source, shots=1, query_shots=2)


SAMPLES = RANDOM.normal(size=(1200, 3)).astype(np.float32)
PICKLED = {  # the array, and episodes of it
    **{
        made: (IMAGES, lambda array, made=made: Episodes(
            MADE[made](ClassSource(array, LABELS, decode=pixels())), ways=3, shots=1, query_shots=2, augment=noisy
        ))
        for made in MADE
    },
    "a column-major array": (np.asfortranarray(SAMPLES[:60]), lambda array: Episodes(
        ClassSource(array, LABELS), ways=3, shots=1, query_shots=2
    )),
    "windows": (SAMPLES, of_windows),
    "windows of one channel": (SAMPLES[:, 0].copy(), of_windows),
    "groups": (IMAGES, of_groups),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLED)
def test_a_pickle_has_the_same_tasks_and_no_numbers_of_a_file(case, tmp_path):
    """As a worker process gets them that is spawned."""
    array, made = PICKLED[case]
    expected = made(array)
    for kept in (array, mapped(tmp_path, array)):
        written = pickle.dumps(made(kept))
        assert kept is array or array.tobytes()[:64] not in written
        assert len(written) < 3 * array.nbytes + 20_000  # each window on its own would be twice the samples
        for mine, theirs in zip(leaves(pickle.loads(written).batch(3, 4)), leaves(expected.batch(3, 4))):
            assert torch.equal(mine, theirs)


def test_a_part_of_a_mapped_array_is_pickled_as_it_is(tmp_path):
    parts = {"rows": np.s_[10:50], "every other row": np.s_[::2], "turned": np.s_[::-1]}
    whole = mapped(tmp_path, IMAGES)
    for rows in parts.values():
        source = ClassSource(whole[rows], LABELS[rows])
        assert torch.equal(pickle.loads(pickle.dumps(source)).inputs[:], source.inputs[:])


def test_a_pickle_of_a_file_that_is_gone_is_refused(tmp_path):
    written = pickle.dumps(ClassSource(mapped(tmp_path, IMAGES), LABELS))
    (tmp_path / "inputs.npy").write_bytes(b"short")
    with pytest.raises(InputError, match=r"is no longer in .*inputs\.npy \(.*make the source anew"):
        pickle.loads(written)
    (tmp_path / "inputs.npy").unlink()
    with pytest.raises(InputError, match=r"is no longer in .*inputs\.npy \(.*make the source anew"):
        pickle.loads(written)
