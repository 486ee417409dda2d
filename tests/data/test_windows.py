import numpy as np
import pytest
import torch

from fomaml import GroupEpisodes, GroupSource
from fomaml.errors import InputError

LENGTHS = [40, 17, 33, 9, 60, 25]
SUBJECTS = ["ann", "bob", "ann", "bob", "ann", "bob"]
MOTIONS = [0, 0, 1, 1, 0, 1]
SAMPLES = np.stack([np.arange(sum(LENGTHS)), -np.arange(sum(LENGTHS))], axis=1).astype(np.float64)
BEGINS = np.cumsum([0, *LENGTHS])


def cut(window, hop, **more):
    return GroupSource.from_windows(SAMPLES, LENGTHS, SUBJECTS, MOTIONS, window=window, hop=hop, **more)


@pytest.mark.parametrize(("window", "hop"), [(9, 9), (8, 3), (9, 2), (3, 5), (1, 1)])
def test_windows_are_those_of_a_plain_loop(window, hop):
    expected = [
        (subject, motion, list(range(begin + start, begin + start + window)))
        for begin, length, subject, motion in zip(BEGINS, LENGTHS, SUBJECTS, MOTIONS)
        for start in range(0, length - window + 1, hop)
    ]
    found = cut(window, hop)
    assert found.names == ["ann", "bob"] and found.classes == ["0", "1"]
    assert found.input_shapes == (2, window)
    for group, subject in enumerate(found.names):
        for motion, positions in enumerate(found.positions(group)):
            inputs, _ = found.take(positions)
            own = [samples for name, label, samples in expected if (name, label) == (subject, motion)]
            assert inputs[:, 0].tolist() == own and (inputs[:, 1] == -inputs[:, 0]).all()


@pytest.mark.parametrize("draw", ["first", "anytime"])
@pytest.mark.parametrize("queries", [1, 2, None])
@pytest.mark.parametrize(("window", "hop"), [(4, 4), (4, 1), (5, 2), (7, 3), (4, 6)])
def test_support_and_query_share_no_sample(window, hop, queries, draw):
    found = cut(window, hop, leave_out_short=True).select(["ann"])
    episodes = GroupEpisodes(found, shots=1, query_shots=queries, draw=draw)
    for index in range(20):
        task = episodes[index]
        support, query = (set(part.inputs[:, 0].flatten().tolist()) for part in task)
        assert support and query and not support & query
        for label in (0, 1):  # per class, in time
            first, later = (part.inputs[part.targets == label, 0] for part in task)
            assert len(first) == 1 and later.min() > first.max()


def test_the_first_windows_of_each_class_are_the_default():
    episodes = GroupEpisodes(cut(8, 4, leave_out_short=True), shots=2, query_shots=1, small="leave out")
    assert episodes.draw == "first" and episodes.gap == 1 and episodes.left_out == [("bob", 9)]
    support = episodes[0].support
    assert support.targets.tolist() == [0, 0, 1, 1]
    assert support.inputs[:, 0, 0].tolist() == [0, 4, BEGINS[2], BEGINS[2] + 4]


@pytest.mark.parametrize("more", [{"draw": "random"}, {"gap": 0}, {"draw": "first", "gap": 0}])
def test_draws_that_share_samples_are_refused(more):
    with pytest.raises(InputError, match=r"share samples .* gap of 1 or more, or a longer hop"):
        GroupEpisodes(cut(8, 4), shots=1, query_shots=1, **more)


def test_windows_that_do_not_overlap_may_be_random():
    episodes = GroupEpisodes(cut(4, 4), shots=1, query_shots=1, draw="random")
    assert not set(episodes.rows(0)[0]) & set(episodes.rows(0)[1])


def test_samples_are_a_view_of_the_file(tmp_path):
    np.save(tmp_path / "samples.npy", SAMPLES)
    mapped = np.load(tmp_path / "samples.npy", mmap_mode="r")
    found = GroupSource.from_windows(mapped, LENGTHS, SUBJECTS, MOTIONS, window=8, hop=4)
    windows = found._inputs.tree
    assert windows.samples is mapped and np.shares_memory(windows._view, mapped)
    assert found.take(found.positions(0)[0][:1])[0][0, 0].tolist() == list(range(8))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.bool_, np.float32])
def test_samples_of_any_numbers_are_drawn_floating_and_scaled(dtype):
    samples = (np.abs(SAMPLES) % 100).astype(dtype)
    found = GroupSource.from_windows(samples, LENGTHS, SUBJECTS, MOTIONS, window=8, hop=4)
    expected = GroupSource.from_windows(
        samples.astype(np.float64), LENGTHS, SUBJECTS, MOTIONS, window=8, hop=4
    )
    scaling = found.fit_scaling()
    assert scaling == expected.fit_scaling() and scaling.inputs
    positions = np.arange(10)
    inputs, _ = found.scaled(scaling).take(positions)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, expected.scaled(scaling).take(positions)[0])


def test_one_channel_and_targets_to_regress_on():
    found = GroupSource.from_windows(
        SAMPLES[:, 0], LENGTHS, SUBJECTS, np.array(MOTIONS) + 0.5, window=8, hop=4
    )
    assert found.kind == "regression" and found.input_shapes == (1, 8)
    inputs, targets = found.take(np.array([0, 1]))
    assert inputs[1, 0].tolist() == list(range(4, 12)) and targets.tolist() == [[0.5], [0.5]]


def test_short_recordings_are_left_out_where_asked():
    assert cut(9, 3).left_out == ""
    assert cut(10, 3, leave_out_short=True).left_out == "1 of 6 recordings, shorter than a window"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lengths": [1, 2]}, "the lengths of 2 recordings add up to 3, but there are 184 samples .*shape"),
        ({"samples": SAMPLES.T}, r"add up to 184, but there are 2 samples .*, got shape \(2, 184\)"),
        ({"samples": np.where(SAMPLES == 30, np.nan, SAMPLES)}, "row 30 of the samples, .* holds nan"),
        ({"lengths": [184.0]}, "lengths must be whole numbers .* got dtype float64"),
        ({"lengths": [-1, *LENGTHS[1:]]}, "lengths must be whole numbers of 1 or more, .* got -1"),
        ({"groups": SUBJECTS[:2]}, r"6 recordings, but groups of shape \(2,\)"),
        ({"targets": MOTIONS * 2}, r"6 recordings, but targets of shape \(12,\)"),
        ({"window": 10}, "1 of 6 recordings are shorter than a window of 10 samples, the shortest is number 3,.* of 9: "
         r"take a shorter window, or leave them out \(leave_out_short=True\)"),
        ({"window": 100, "leave_out_short": True}, "6 of 6 recordings are shorter.* window$"),
        ({"window": 100}, "6 of 6 recordings are shorter.* window$"),
        ({"window": 0}, "window must be a whole number of 1 or more"),
        ({"hop": 0}, "hop must be a whole number of 1 or more"),
        ({"samples": np.zeros((184, 2, 2))}, "samples, channels"),
        ({"samples": np.array([None] * 184)}, "object array"),
        ({"targets": [1] * 6}, "the same class, '1'"),
    ],
)  # fmt: skip
def test_refused_in_one_line(change, text):
    given = {
        **{"samples": SAMPLES, "lengths": LENGTHS, "groups": SUBJECTS, "targets": MOTIONS},
        **{"window": 8, "hop": 4},
    }
    with pytest.raises(InputError, match=text) as caught:
        GroupSource.from_windows(**{**given, **change})
    assert "\n" not in str(caught.value)
