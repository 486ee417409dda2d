"""Trainings and evaluations on the processes of a group, against those of one process."""

import pytest
import torch
from torch import nn

import ranked
from clusters import episodes, learner
from fomaml.engines.compiled.cache import too_old
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML
from fomaml.ranks import Ranks, digest_of
from fomaml.train import train

QUICK = ("maml++", "reptile", "uneven", "dropout")
REST = tuple(name for name in ranked.CASES if name not in QUICK)


@pytest.fixture(
    scope="module", params=[QUICK, pytest.param(REST, marks=pytest.mark.long)], ids=["quick", "rest"]
)
def table(request, tmp_path_factory):
    folder = ranked.joined_and_then(ranked.train_table, 3, tmp_path_factory.mktemp("table"), request.param)
    return request.param, [ranked.read(folder, rank) for rank in range(3)]


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[key].shape == expected[key].shape for key in expected)
    return max((found[key].double() - expected[key].double()).abs().max().item() for key in expected)


def test_the_processes_of_a_group_find_what_one_process_does(table):
    names, [first, *others] = table
    for name in names:
        alone = ranked.trained(name)
        for ranks in ("2", "3"):
            found = first[f"{name}:{ranks}"]
            apart = largest_difference(found, alone)
            assert (apart < 1e-6) == ranked.CASES[name].exact, (name, ranks, apart)
            for other in others[: int(ranks) - 1]:
                assert largest_difference(other[f"{name}:{ranks}"], found) == 0, (name, ranks)
        assert largest_difference(first[f"{name}:3 again"], first[f"{name}:3"]) == 0, name


def test_the_same_bits_for_any_number_of_processes(table):
    names, found = table
    for name in names:
        alone = ranked.trained(name, Ranks(same_bits=True))
        for ranks in (2, 3):
            for own in found[:ranks]:
                assert largest_difference(own[f"{name}:{ranks} bits"], alone) == 0, (name, ranks)


# --- what goes wrong on one rank ------------------------------------------------------------------


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return ranked.joined_and_then(ranked.fail_in_turn, 3, tmp_path_factory.mktemp("faults"))


WEIGHT = "the weight of a task must be a finite number of 0 or more, got -1.0"
CLIP = "clip must be a positive finite number, got 0"
DIVIDED = "ZeroDivisionError: division by zero"
THERE, ELSEWHERE = "task 10 is not there", "task 10 is not there (rank {} of 3)"
# what each rank is told
EXPECTED = {
    "a task": [ELSEWHERE.format(1), THERE, ELSEWHERE.format(1)],
    "a weight": [f"{WEIGHT} (rank 2 of 3)", f"{WEIGHT} (rank 2 of 3)", WEIGHT],
    "no fault of the input": [*[f"RankError: {DIVIDED} (rank 2 of 3)"] * 2, DIVIDED],
    "an argument": [f"{CLIP} (rank 1 of 3)", CLIP, f"{CLIP} (rank 1 of 3)"],
    "other arguments": ["what train is told of rank 1 is not that of rank 0: give all 3 ranks the same"] * 3,
    "another optimiser": ["the optimiser of rank 2 is not that of rank 0: give all 3 ranks the same"] * 3,
    "no task counts": ["the weights of all 7 tasks of a meta-batch are 0"] * 3,
    "an evaluation": [*[ELSEWHERE.format(2)] * 2, THERE],
    "a stream": ["3 processes would each take the tasks of their own iterable: use Episodes"] * 3,
    "no member": ["this process is none of the group: call it in the processes that are"],
}


@pytest.mark.parametrize("fault", EXPECTED)
def test_what_fails_on_one_rank_is_an_error_on_all_of_them(faults, fault):
    files = [faults / f"{fault} {rank}" for rank in range(3)]
    assert [file.read_text() for file in files if file.exists()] == EXPECTED[fault]


def test_memory_that_runs_out_on_one_rank_halves_the_tasks_of_all(faults):
    assert [(faults / f"halved {rank}").read_text() for rank in range(3)] == ["1"] * 3


@pytest.mark.parametrize("case", ranked.UNCOMPILED)
def test_what_one_rank_cannot_compile_none_does(faults, case):
    found = {(faults / f"{case} {rank}").read_text() for rank in range(3)}
    if case == "none fails" and not too_old():
        assert found <= {"compiled, the same bits", "compiled, other bits"} and len(found) == 1
    elif case == "no compiler":  # its plan is made by train
        assert {text.partition(", ")[2] for text in found} == {"the same bits"}
    else:
        assert found == {"uncompiled, the same bits"}


def test_what_each_rank_notes_is_added_up(faults):
    assert [(faults / f"notes {rank}").read_text() for rank in range(3)] == ["[[3.0, 2.0], [6.0, 2.0]]"] * 3


def test_the_parameters_are_those_of_the_first_rank(faults):
    texts = {(faults / f"begun {rank}").read_text() for rank in range(3)}
    assert len(texts) == 1


# --- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 7, 8, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
def test_each_task_is_taken_once(number, size):
    ranks = Ranks()
    ranks.size = size
    shares = [ranks.share(number, rank) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert 0 in shares[0]
    for same_bits in (False, True):
        ranks.same_bits = same_bits
        for pieces in (ranks.pieces(number), ranks.portions(number, 3)):
            assert [index for piece in pieces for index in piece] == list(range(number))
            assert all(pieces)


def test_the_pieces_of_the_same_bits_know_nothing_of_the_ranks():
    cut = []
    for size in (1, 2, 5):
        ranks = Ranks(same_bits=True)
        ranks.size = size
        cut.append((ranks.pieces(50), ranks.portions(1000, 100)))
    assert cut[0] == cut[1] == cut[2]
    assert len(Ranks(same_bits=True, piece=2).pieces(50)) == 25


def test_threads_are_those_of_the_same_bits_while_it_computes_alone(monkeypatch):
    meta, seen = learner(), []
    meta.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        options = {"iterations": 1, "meta_batch_size": 2, "engine": "loop"}
        optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
        for _ in train(meta, episodes(), optimizer, group=Ranks(same_bits=True), **options):
            assert torch.get_num_threads() == 2
        assert set(seen[-4:]) == {1}
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("group", ["world", 3, True])
def test_a_group_is_one_of_torch(group):
    meta = learner()
    message = "group is one of torch.distributed, such as torch.distributed.group.WORLD, got a "
    with pytest.raises(InputError, match=message + type(group).__name__):
        train(
            meta, episodes(), torch.optim.SGD(meta.parameters()), iterations=1, meta_batch_size=2, group=group
        )
    with pytest.raises(InputError, match=message + type(group).__name__):
        evaluate(meta, episodes(), tasks=2, group=group)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: nn.Sequential(nn.DataParallel(model))])
def test_a_wrapped_module_is_refused_with_the_cure(wrap):
    with pytest.raises(
        InputError, match=r"its \.module; for many processes, train\(\.\.\., group=.*torchrun"
    ):
        FOMAML(wrap(nn.Linear(3, 2)), 0.1, 1)


def test_a_digest_is_of_all_that_is_in_it():
    state = {"a": [torch.ones(2), 1], "b": {"c": torch.zeros(3)}}
    others = [
        {"a": [torch.ones(2), 2], "b": {"c": torch.zeros(3)}},
        {"a": [torch.ones(2), 1], "b": {"c": torch.zeros(3, 1)}},
        {"a": [torch.ones(2).double(), 1], "b": {"c": torch.zeros(3)}},
        {"a": [torch.ones(2), 1], "b": {"d": torch.zeros(3)}},
    ]
    assert digest_of(state) == digest_of({"a": [torch.ones(2), 1], "b": {"c": torch.zeros(3)}})
    assert len({digest_of(state), *map(digest_of, others)}) == 5
