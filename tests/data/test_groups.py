import json

import numpy as np
import pytest
import torch

from fomaml import GroupEpisodes, GroupSource
from fomaml.data.scaling import Scaling
from fomaml.errors import InputError
from fomaml.metrics import LOSS, Metric
from tables import Counted, uneven


def source(kind="regression", order=True, **more):
    table = uneven()
    targets = table["label"] if kind == "classification" else table["value"]
    return GroupSource(table["x"], targets, table["key"], table["time"] if order else None, **more)


def test_groups_are_sorted_by_key_and_their_rows_by_order():
    table = uneven()
    found = source()
    assert found.names == [f"machine {number}" for number in range(6)]
    for number, name in enumerate(found.names):
        own = [row for row in range(len(table["key"])) if table["key"][row] == name]
        own.sort(key=lambda row: table["time"][row])
        begin = found.offsets[number]
        assert found.counts[number] == len(own)
        assert found.rows[begin : begin + len(own)].tolist() == own
        assert [part.tolist() for part in found.positions(number)] == [list(range(begin, begin + len(own)))]


def test_rows_of_equal_order_and_of_none_stay_as_they_are():
    keys = [2, 1, 2, 1, 2]
    for order in (None, [5, 5, 5, 5, 5]):
        found = GroupSource(np.zeros((5, 1)), np.arange(5.0), keys, order)
        assert found.names == ["1", "2"] and found.rows.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ([10, 9, 10], ["9", "10"]),
        ([10.0, 9.5, 10.0], ["9.5", "10"]),
        (["b", "a", "b"], ["a", "b"]),
        (torch.tensor([3, -1, 3]), ["-1", "3"]),
        (np.array(["b", "a", "b"], dtype=object), ["a", "b"]),
        ([True, False, True], ["False", "True"]),
    ],
)
def test_keys_are_text_or_numbers(keys, names):
    found = GroupSource(np.arange(3.0), np.arange(3.0), keys)
    assert found.names == names and found.counts.tolist() == [1, 2]


def test_labels_of_any_kind_become_the_same_numbers_in_all_tasks():
    table = uneven()
    words = np.array(["idle", "run", "stop"])[table["label"]]
    for labels, names in ((table["label"] * 7 - 1, ["-1", "6", "13"]), (words, ["idle", "run", "stop"])):
        found = GroupSource(table["x"], labels, table["key"])
        assert found.kind == "classification" and found.classes == names and found.outputs == 3
        for number, name in enumerate(found.names):
            for label, positions in enumerate(found.positions(number)):
                inputs, targets = found.take(positions)
                own = np.flatnonzero((table["key"] == name) & (table["label"] == label))
                assert inputs[:, 0].tolist() == own.tolist()
                assert targets.dtype == torch.int64 and targets.tolist() == [label] * len(own)
                assert found.class_counts[number, label] == len(own)


def test_classes_may_be_given_with_one_that_no_row_has():
    found = GroupSource(np.zeros((2, 1)), ["b", "a"], [0, 1], classes=["c", "b", "a"])
    assert found.classes == ["c", "b", "a"] and found.take(found.positions(0)[1])[1].tolist() == [1]
    with pytest.raises(InputError, match="'a' is none of the classes b, c"):
        GroupSource(np.zeros((2, 1)), ["b", "a"], [0, 1], classes=["b", "c"])


def test_whole_numbers_are_regressed_on_where_asked():
    found = GroupSource(np.zeros((4, 1)), [1, 2, 3, 4], [0, 0, 1, 1], kind="regression")
    assert found.classes is None and found.outputs == 1
    assert found.take(np.array([3, 0]))[1].tolist() == [[4], [1]]


def test_inputs_and_targets_may_be_nested():
    inputs = {"ids": np.arange(8).reshape(4, 2), "more": (np.arange(4.0), torch.arange(4.0).double())}
    found = GroupSource(inputs, {"a": np.arange(4.0), "b": np.arange(4)}, ["x", "y", "x", "y"])
    assert found.input_shapes == {"ids": (2,), "more": ((), ())} and found.outputs is None
    drawn, targets = found.take(np.array([0, 1, 3]))  # the rows 0, 2 and 3
    assert drawn["ids"].dtype == torch.int64 and drawn["ids"].tolist() == [[0, 1], [4, 5], [6, 7]]
    assert [(part.dtype, part.tolist()) for part in drawn["more"]] == [
        (torch.float32, [0, 2, 3]),
        (torch.float64, [0, 2, 3]),
    ]
    assert targets["a"].tolist() == [[0], [2], [3]] and targets["b"].tolist() == [[0], [2], [3]]


def test_floating_numbers_are_drawn_in_the_default_dtype_whole_ones_as_they_are():
    for dtype, expected in (
        (np.float16, torch.float32),
        (np.float64, torch.float32),
        (">f8", torch.float32),
        (np.uint8, torch.uint8),
        (np.uint16, torch.int32),
        (np.int32, torch.int32),
        (bool, torch.bool),
    ):
        found = GroupSource(np.array([[0], [1]], dtype=dtype), [0.5, 1.5], [0, 0])
        drawn, _ = found.take(np.array([1, 0, 1]))
        assert drawn.dtype == expected and drawn.flatten().tolist() == [1, 0, 1]


# --- only what is drawn is read -------------------------------------------------------------------


def test_only_the_rows_of_the_tasks_are_read():
    table = uneven()
    counted = Counted(table["x"])
    found = GroupSource(counted, table["label"], table["key"])
    assert counted.read == []
    episodes = GroupEpisodes(found, shots=1, query_shots=2)
    assert counted.read == []
    drawn = episodes.batch(4, 3)
    rows = [row for index in (4, 5, 6) for part in episodes.rows(index) for row in part.tolist()]
    assert sorted(counted.read) == sorted(set(rows)) and len(rows) == 3 * 9
    kept = torch.cat([drawn.support.inputs, drawn.query.inputs], dim=1)[..., 0].flatten()
    assert sorted(kept.tolist()) == sorted(rows)


def test_a_mapped_file_may_be_larger_than_the_memory(tmp_path):
    shape = 4096, 2**19  # 16 GiB, of which the disk holds what is written alone
    mapped = np.memmap(tmp_path / "x.bin", dtype=np.float64, mode="w+", shape=shape)
    mapped[7, 3] = 5.0
    found = GroupSource(mapped, np.arange(4096.0), np.arange(4096) // 8)
    assert found.input_shapes == (2**19,) and found.take(np.array([7, 9]))[0].sum(1).tolist() == [5.0, 0.0]


def test_numbers_that_are_not_finite_are_found_when_they_are_drawn(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1.0], [np.nan], [2.0], [3.0]]))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = GroupSource(mapped, np.arange(4.0), [0, 0, 1, 1])
    assert found.take(np.array([2, 3]))[0].tolist() == [[2.0], [3.0]]
    with pytest.raises(InputError, match=r"^row 1 of the inputs, counted from 0, holds nan or infinite"):
        found.take(np.array([3, 1]))


def test_decode_maps_what_is_drawn():
    found = GroupSource(
        np.arange(4, dtype=np.uint8)[:, None], np.arange(4.0), [0, 0, 1, 1], decode=lambda x: x / 2
    )
    assert found.take(np.array([3, 1]))[0].tolist() == [[1.5], [0.5]]


# --- parts ----------------------------------------------------------------------------------------


def test_select_takes_keys_of_either_kind_in_the_order_given():
    found = GroupSource(np.arange(6.0), np.arange(6.0), [1, 1, 2, 2, 10, 10])
    for keys in ([10, 1], ["10", "1"], [10.0, 1.0], np.array([10, 1])):
        chosen = found.select(keys)
        assert chosen.names == ["10", "1"] and chosen.rows.tolist() == [4, 5, 0, 1]
        assert chosen.counts.tolist() == [2, 2] and chosen.offsets.tolist() == [0, 2]
    assert found.names == ["1", "2", "10"]


def test_split_by_shares_deals_every_task_once_and_is_recorded():
    found = GroupSource(np.arange(40.0), np.arange(40.0), np.arange(40) // 2)
    seen = set()
    for seed in range(5):
        parts = found.split((0.5, 0.2, 0.3), seed=seed)
        record = json.loads(json.dumps(parts.record))
        assert [len(part) for part in parts[:3]] == [10, 4, 6]
        assert [part.names for part in parts[:3]] == [
            record[part] for part in ("train", "validation", "test")
        ]
        assert sorted((name for part in parts[:3] for name in part.names), key=int) == found.names
        assert record["shares"] == [0.5, 0.2, 0.3] and record["seed"] == seed
        again = found.split((0.5, 0.2, 0.3), seed=seed)
        assert again.record == parts.record
        seen.add(tuple(parts.test.names))
    assert len(seen) == 5
    assert found.split((0.7, 0, 0.3)).validation is None


def test_split_by_lists():
    found = GroupSource(np.arange(10.0), np.arange(10.0), np.arange(10) // 2)
    parts = found.split(test=[4], validation=["0"])
    assert parts.record == {"train": ["1", "2", "3"], "validation": ["0"], "test": ["4"]}
    assert found.split(test=[4], train=[1]).record == {"train": ["1"], "validation": [], "test": ["4"]}


# --- scaling --------------------------------------------------------------------------------------


def test_scaling_is_of_the_training_tasks_alone():
    table = uneven()
    parts = source().split(seed=1).scaled()
    own = np.isin(table["key"], parts.train.names)
    scaling = parts.train.scaling
    columns, values = table["x"][own], table["value"][own]
    np.testing.assert_allclose(scaling.inputs[""].mean, columns.mean(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.inputs[""].deviation, columns.std(0), rtol=1e-12)
    np.testing.assert_allclose(scaling.targets[""].mean, [values.mean()], rtol=1e-12)
    for part in parts[:3]:
        inputs, targets = part.take(np.arange(len(part.rows)))
        expected = (table["x"][part.rows] - columns.mean(0)) / columns.std(0)
        np.testing.assert_allclose(inputs.numpy(), expected, rtol=1e-5, atol=1e-6)
        expected = (table["value"][part.rows, None] - values.mean()) / values.std()
        np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scaling.unscaled(targets)[:, 0], table["value"][part.rows], rtol=1e-5)


def test_scaling_is_json_and_a_constant_column_is_not_divided_by():
    inputs = {"a": np.array([[0.1, 1.0]] * 7 + [[0.1, 2.0]]), "ids": np.arange(8)}
    found = GroupSource(inputs, np.arange(8), np.arange(8) // 4, kind="regression")
    scaling = found.fit_scaling()
    assert set(scaling.inputs) == {"['a']"} and scaling.targets == {}  # whole numbers are not scaled
    assert scaling.inputs["['a']"].deviation[0] == 0.0
    again = Scaling.from_dict(json.loads(json.dumps(scaling.to_dict())))
    assert again == scaling
    drawn = found.scaled(again).take(np.arange(8))[0]
    assert drawn["a"][:, 0].abs().max() < 1e-6 and drawn["ids"].tolist() == list(range(8))
    assert found.scaled(None).take(np.arange(8))[0]["a"][0, 0] == np.float32(0.1)


def test_a_channel_of_windows_is_scaled_as_a_whole():
    values = np.random.default_rng(0).normal(3.0, 2.0, (40, 2, 5))
    found = GroupSource(values, np.arange(40.0), np.arange(40) // 8)
    own = found.fit_scaling().inputs[""]
    np.testing.assert_allclose(own.mean, values.mean((0, 2)))
    np.testing.assert_allclose(own.deviation, values.std((0, 2)))


def test_many_parts_are_joined_exactly(monkeypatch):
    monkeypatch.setattr("fomaml.data.groups.AT_ONCE", 7)
    values = np.random.default_rng(0).normal(1e6, 1.0, (100, 3))
    own = GroupSource(values, values[:, 0], np.arange(100) // 8).fit_scaling()
    np.testing.assert_allclose(own.inputs[""].deviation, values.std(0), rtol=1e-9)


def test_scores_in_the_targets_own_unit():
    found = source().split(seed=1).scaled().test
    episodes = GroupEpisodes(found, shots=2, query_shots=3)
    own = GroupEpisodes(found.scaled(None), shots=2, query_shots=3).batch(0, 4).query.targets
    scaled = episodes.batch(0, 4).query.targets
    outputs = scaled + 0.1
    rmse = Metric("rmse", lambda o, t, _: (o - t).square().flatten(1).mean(1).sqrt(), -1, "")
    metric = found.scaling.in_own_unit(rmse)
    expected = (0.1 * found.scaling.targets[""].deviation[0]) * torch.ones(4)
    torch.testing.assert_close(metric.score(outputs, scaled, None), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scaling.unscaled(scaled, 2), own, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="scaled targets"):
        found.scaling.in_own_unit(LOSS)


# --- what is refused ------------------------------------------------------------------------------

ONES = np.ones((4, 1))
KEYS = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: GroupSource(ONES, np.arange(3.0), KEYS), "inputs 4, targets 3, groups 4"),
        (lambda: GroupSource(ONES, np.arange(4.0), KEYS[:2]), "inputs 4, targets 4, groups 2"),
        (lambda: GroupSource(ONES, np.arange(4.0), KEYS, [1]), "order 1"),
        (
            lambda: GroupSource({"a": ONES, "b": ONES[:2]}, np.arange(4.0), KEYS),
            r"inputs\['a'\] has 4 and inputs\['b'\] has 2 rows",
        ),
        (
            lambda: GroupSource(np.array([{}, 1, 2, 3], dtype=object), np.arange(4.0), KEYS),
            "the inputs are an object array",
        ),
        (lambda: GroupSource([[1], [2, 3], [4], [5]], np.arange(4.0), KEYS), "the inputs must be an array"),
        (lambda: GroupSource(["a", "b", "c", "d"], np.arange(4.0), KEYS), "the inputs are text"),
        (lambda: GroupSource(np.float64(3), np.arange(4.0), KEYS), "have no rows"),
        (lambda: GroupSource({}, np.arange(4.0), KEYS), "the inputs hold no arrays"),
        (lambda: GroupSource(ONES * np.inf, np.arange(4.0), KEYS), "row 0 of the inputs"),
        (lambda: GroupSource(ONES, [0, 1, 2, np.nan], KEYS), "row 3 of the targets"),
        (lambda: GroupSource(ONES, np.ones(4), KEYS), "all 4 rows of the targets are the same"),
        (lambda: GroupSource(ONES, np.ones(4, int), KEYS), "all 4 targets are the same class, '1'"),
        (lambda: GroupSource(ONES, np.arange(4), [0, 0, None, 1]), "the groups lack a value in row 2"),
        (lambda: GroupSource(ONES, np.arange(4), [0, 0, np.nan, 1]), "the groups lack 1 values, the first in row 2"),
        (lambda: GroupSource(ONES, np.arange(4), [[0], [0], [1], [1]]), "the groups must be one value for each row"),
        (lambda: GroupSource(ONES, np.arange(4), [0, 0, {}, 1]), "got an object array with {}"),
        (lambda: GroupSource(ONES, np.arange(4), ["1", "1", "2", "2"], ["b", "a", "d", "c"]), "order must be numbers"),
        (lambda: GroupSource(ONES, ONES, KEYS, kind="classification"), "one value for each row"),
        (lambda: GroupSource(ONES, {"a": ONES}, KEYS, kind="classification"), "a nesting of targets"),
        (lambda: GroupSource(ONES, np.arange(4.0), KEYS, classes=["a"]), "regression has no classes"),
        (lambda: GroupSource(ONES, np.arange(4.0), KEYS, kind="ranking"), "ranking"),
        (lambda: source().select([]), "no tasks selected"),
        (lambda: source().select(["machine 1", "machine 1"]), "selected twice"),
        (lambda: source().select(["machine1"]), "no task 'machine1' here; there are: machine 1, "),
        (lambda: source().split((0.5, 0.5)), "three numbers"),
        (lambda: source().split((0.9, 0.05, 0.05)), "6 tasks, .* split 5/1/0 into"),
        (lambda: source().split(train=["machine 1"]), "need one for the test"),
        (lambda: source().split(test=["x"]), "no task 'x'"),
        (lambda: source().split(test=["machine 1"], validation=["machine 1"]), "listed for validation and for test"),
        (lambda: source().split((0.6, 0.2, 0.2), test=["machine 1"]), "no shares are of use"),
        (lambda: source().split(test=[f"machine {n}" for n in range(6)]), "0/0/6"),
        (lambda: source().split(seed=0.5), "seed must be a whole number"),
        (lambda: Scaling.from_dict({"inputs": 3}), "Scaling.to_dict"),
        (
            lambda: GroupSource(ONES, np.array([1.0, 1.0, 2.0, 3.0]), KEYS).select([0]).fit_scaling(),
            "the target 'number 0' is 1 in all rows of the training tasks",
        ),
    ],
)  # fmt: skip
def test_refused_in_one_line(make, text):
    with pytest.raises(InputError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)
