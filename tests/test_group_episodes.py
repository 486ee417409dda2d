import numpy as np
import pytest
import torch

from fomaml import FOMAML, MLP, GroupEpisodes, GroupSource, evaluate
from fomaml.errors import InputError
from tables import uneven

TABLE = uneven(least=6)


def source(kind="classification"):
    return GroupSource(
        TABLE["x"], TABLE["label" if kind == "classification" else "value"], TABLE["key"], TABLE["time"]
    )


def parts_of(kind, rows):
    """The rows of one group by class, or all together, each sorted in time: an oracle of plain loops."""
    [key] = {TABLE["key"][row] for row in rows}
    own = sorted(np.flatnonzero(TABLE["key"] == key).tolist(), key=lambda row: TABLE["time"][row])
    if kind == "regression":
        return [own]
    return [[row for row in own if TABLE["label"][row] == label] for label in range(3)]


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("queries", [1, 2, None])
@pytest.mark.parametrize(
    ("draw", "gap"), [("random", None), ("first", 0), ("first", 1), ("anytime", 0), ("anytime", 1)]
)
def test_support_and_query_are_other_rows_of_one_group(kind, queries, draw, gap):
    episodes = GroupEpisodes(source(kind), shots=2, query_shots=queries, draw=draw, gap=gap, seed=3)
    begins = set()
    for index in range(40):
        support, query = (part.tolist() for part in episodes.rows(index))
        assert not set(support) & set(query) and len(set(support + query)) == len(support + query)
        for own in parts_of(kind, support + query):
            first = [own.index(row) for row in support if row in own]
            later = [own.index(row) for row in query if row in own]
            assert len(first) == 2
            begins.add(first[0])
            if draw == "random":
                assert len(later) == (len(own) - 2 if queries is None else queries)
                continue
            assert first == [first[0], first[0] + 1]
            assert later == sorted(later) and later[0] >= first[-1] + 1 + gap
            assert draw != "first" or first[0] == 0
            left = len(own) - first[-1] - 1 - gap
            assert len(later) == (left if queries is None else queries)
    assert (len(begins) > 1) == (draw != "first")


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_tasks_hold_what_their_rows_hold(kind):
    episodes = GroupEpisodes(source(kind), shots=2, query_shots=2, seed=1)
    batch = episodes.batch(5, 3)
    for number in range(3):
        for part, single, rows in zip(batch, episodes[5 + number], episodes.rows(5 + number)):
            expected = torch.from_numpy(TABLE["x"][rows]).float()
            assert torch.equal(part.inputs[number], expected) and torch.equal(single.inputs, expected)
            if kind == "classification":
                expected = torch.from_numpy(TABLE["label"][rows])
                assert rows.size == 6 and expected.tolist() == [0, 0, 1, 1, 2, 2]  # ordered by class
            else:
                expected = torch.from_numpy(TABLE["value"][rows, None]).float()
            assert torch.equal(part.targets[number], expected) and torch.equal(single.targets, expected)
    assert episodes.ways == (3 if kind == "classification" else None)


def test_tasks_are_functions_of_seed_and_index():
    def rows(seed, indices):
        episodes = GroupEpisodes(source(), shots=1, query_shots=1, seed=seed)
        return {index: tuple(np.concatenate(episodes.rows(index))) for index in indices}

    forward, backward = rows(0, range(20)), rows(0, reversed(range(20)))
    assert forward == backward and len(set(forward.values())) > 10
    assert rows(1, range(20)) != forward
    batch = GroupEpisodes(source(), shots=1, query_shots=1, seed=0).batch(7, 4)
    again = GroupEpisodes(source(), shots=1, query_shots=1, seed=0).batch(9, 1)
    assert torch.equal(batch.query.inputs[2], again.query.inputs[0])


def test_each_group_as_often_as_any_other_in_turn():
    episodes = GroupEpisodes(source(), shots=1, query_shots=1, in_turn=True)
    assert [episodes.group(index) for index in range(12)] == 2 * episodes.source.names
    assert len(episodes) == 6
    rows = [tuple(np.concatenate(episodes.rows(index))) for index in (0, 6, 12)]
    assert len(set(rows)) > 1  # other rows in another round
    drawn = {
        GroupEpisodes(source(), shots=1, query_shots=1, seed=seed).group(index)
        for seed in range(3)
        for index in range(12)
    }
    assert drawn == set(episodes.source.names)


def test_unequal_tasks_are_a_list():
    episodes = GroupEpisodes(source("regression"), shots=3, query_shots=None, draw="first", in_turn=True)
    batch = episodes.batch(0, 6)
    assert isinstance(batch, list)
    for task, name, count in zip(batch, episodes.source.names, episodes.source.counts):
        assert len(task.query.targets) == count - 3 == np.sum(TABLE["key"] == name) - 3
    alone = episodes.batch(2, 1)  # one size
    assert torch.equal(alone.query.inputs[0], batch[2].query.inputs)


def test_nested_inputs_are_stacked_and_split():
    inputs = {"a": TABLE["x"], "b": (TABLE["time"], TABLE["label"])}
    nested = GroupSource(inputs, {"y": TABLE["value"], "z": (TABLE["x"],)}, TABLE["key"])
    episodes = GroupEpisodes(nested, shots=2, query_shots=3)
    task = episodes.batch(0, 4)
    assert task.query.inputs["a"].shape == (4, 3, 2) and task.support.inputs["b"][1].shape == (4, 2)
    assert task.query.targets["y"].shape == (4, 3, 1) and task.query.targets["z"][0].shape == (4, 3, 2)
    expected = [TABLE["label"][episodes.rows(index)[1]].tolist() for index in range(4)]
    assert task.query.inputs["b"][1].tolist() == expected


# --- groups that are too small --------------------------------------------------------------------


def small(**more):
    """The groups a (5 rows of class 0, 2 of 1), b (4 and 4), c (1 and 9)."""
    keys = ["a"] * 7 + ["b"] * 8 + ["c"] * 10
    labels = [0] * 5 + [1] * 2 + [0] * 4 + [1] * 4 + [0] * 1 + [1] * 9
    targets = np.arange(25.0) if more.pop("regression", False) else labels
    return GroupEpisodes(GroupSource(np.arange(25.0), targets, keys), **more)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"shots": 1, "query_shots": 2}, "'c' has 1 rows of class '0', but 1 shots . 2 query rows per class need 3"),
        ({"shots": 4, "query_shots": 4, "regression": True}, "1 of 3 .*: 'a' has 7 rows, but 4 shots . 4 query rows"),
        ({"shots": 3, "query_shots": None, "gap": 6, "draw": "first"}, "a gap of 6 . 1 query row or more per class"),
        ({"shots": 4, "query_shots": 9, "regression": True}, "3 of 3 tasks .* need 13; take fewer"),
        ({"shots": 4, "query_shots": 9, "small": "leave out", "regression": True}, "3 of 3 tasks"),
        ({"shots": 4, "query_shots": 9, "fewer_classes": True}, "3 of 3 tasks have too few classes"),
        ({"shots": 1, "query_shots": 2, "ways": 2}, "2 of 3 tasks have too few classes: 'a' has 1 with the 3 rows"),
        ({"shots": 1, "query_shots": 2, "ways": 3}, "3 of 3 tasks have too few classes.* take fewer of them"),
        ({"shots": 1, "query_shots": 1, "ways": 2, "fewer_classes": True}, "give no fewer_classes"),
        ({"shots": 1, "query_shots": 1, "ways": 2, "regression": True}, "ways is for classification"),
        ({"shots": 1, "query_shots": 1, "ways": 0}, "ways must be a whole number of 1 or more"),
        ({"shots": 0, "query_shots": 1}, "shots must be a whole number of 1 or more"),
        ({"shots": 1, "query_shots": 0}, "query_shots"),
        ({"shots": 1, "query_shots": 1, "draw": "last"}, "last"),
        ({"shots": 1, "query_shots": 1, "small": "ignore"}, "ignore"),
        ({"shots": 1, "query_shots": 1, "gap": -1, "draw": "first"}, "gap must be a whole number"),
        ({"shots": 1, "query_shots": 1, "gap": 2, "draw": "random"}, "random rows have no gap"),
        ({"shots": 1, "query_shots": 1, "fewer_classes": True, "regression": True}, "fewer_classes is for"),
        ({"shots": 1, "query_shots": 1, "seed": -1}, "seed"),
    ],
)  # fmt: skip
def test_refused(more, text):
    with pytest.raises(InputError, match=text) as caught:
        small(**more)
    assert "\n" not in str(caught.value)


def test_tasks_that_lack_a_class_are_refused_with_the_cure():
    labels = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2]
    lacking = GroupSource(np.arange(10.0), labels, ["a"] * 4 + ["b"] * 6)
    with pytest.raises(
        InputError, match=r"'a' has 0 rows of class '2'.* it lacks \(fewer_classes=True\), leave"
    ):
        GroupEpisodes(lacking, shots=1, query_shots=1)
    assert GroupEpisodes(lacking, shots=1, query_shots=1, fewer_classes=True).left_out == []


def test_small_groups_are_left_out_and_counted():
    episodes = small(shots=1, query_shots=2, small="leave out")
    assert episodes.left_out == [("a", 7), ("c", 10)] and episodes.source.names == ["b"]
    assert {episodes.group(index) for index in range(20)} == {"b"}
    assert small(shots=1, query_shots=1, small="leave out").left_out == [("c", 10)]


def test_tasks_may_lack_classes():
    keys = ["a"] * 6 + ["b"] * 5
    labels = [0, 0, 1, 1, 2, 2, 0, 0, 2, 2, 1]
    found = GroupSource(np.arange(11.0), labels, keys)
    episodes = GroupEpisodes(found, shots=1, query_shots=1, fewer_classes=True, in_turn=True)
    first, second = episodes.batch(0, 2)
    assert first.support.targets.tolist() == [0, 1, 2] and second.query.targets.tolist() == [0, 2]
    assert episodes.ways == 3


def test_a_task_has_all_classes_where_none_are_drawn():
    assert GroupEpisodes(source(), shots=1, query_shots=1).classes_of(3) == source().classes
    assert GroupEpisodes(source("regression"), shots=1, query_shots=1).classes_of(3) is None


def test_classes_may_be_drawn_and_numbered_anew():
    keys = np.repeat(["x", "y"], [20, 16])
    labels = np.repeat(np.arange(9), 4)  # five classes of x, four of y
    found = GroupSource(np.arange(36.0), labels, keys)
    episodes = GroupEpisodes(found, ways=3, shots=1, query_shots=2, seed=2)
    assert episodes.ways == 3
    seen = set()
    for index in range(60):
        support, query = episodes.rows(index)
        task, kinds = episodes[index], labels[support]
        assert len({keys[row] for row in [*support, *query]}) == 1
        assert task.support.targets.tolist() == [0, 1, 2] and len(set(kinds)) == 3
        assert task.query.targets.tolist() == [0, 0, 1, 1, 2, 2]
        assert labels[query].tolist() == np.repeat(kinds, 2).tolist()
        assert episodes.classes_of(index) == [str(kind) for kind in kinds]
        seen |= {(number, kind) for number, kind in enumerate(kinds.tolist())}
    assert len(seen) == 27  # every class under every number


# --- on the way to a model ------------------------------------------------------------------------


def test_tensors_are_put_where_asked_or_where_the_inputs_are():
    def devices(inputs, **more):
        found = GroupSource(inputs, TABLE["label"], TABLE["key"])
        task = GroupEpisodes(found, shots=1, query_shots=2, **more)[0]
        return {tensor.device.type for part in task for tensor in part}

    assert devices(TABLE["x"]) == devices(torch.from_numpy(TABLE["x"])) == {"cpu"}
    assert devices(TABLE["x"], device="meta") == {"meta"}
    if torch.cuda.is_available():
        assert devices(torch.from_numpy(TABLE["x"]).cuda()) == {"cuda"}


def test_a_learner_trains_on_groups():
    torch.manual_seed(0)
    learner = FOMAML(MLP(2, 8, 3), inner_lr=0.01, inner_steps=1)
    scores = evaluate(
        learner, GroupEpisodes(source(), shots=1, query_shots=2, in_turn=True), tasks=6, at_steps=1
    )
    assert scores[1].shape == (6,)
