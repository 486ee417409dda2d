"""Tasks that are drawn before they are asked for are the tasks that would have been drawn then."""

import sys
import threading

import numpy as np
import pytest
import torch

import fomaml
from fomaml.ahead import Ahead
from fomaml.blocks import LARGE, Memory, empty, kept_in
from fomaml.data.source import pixels
from fomaml.data.synthetic import Sinusoids
from fomaml.draws import generator, uniforms
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.threads import alone, in_parts, pool_of, spread

LABELS = torch.arange(6).repeat_interleave(8)


def source(side=4, decode=None):
    images = torch.randint(0, 256, (48, 1, side, side), generator=torch.Generator().manual_seed(0))
    return fomaml.ClassSource(images.to(torch.uint8), LABELS, decode=decode)


def drawn_from(inputs, **choices):
    return Episodes(inputs, ways=3, shots=1, query_shots=2, seed=5, **choices)


class Family:
    """As `Sinusoids`, drawn one function after the other."""

    inputs = (-5.0, 5.0)

    def draw(self, random):
        return Sinusoids().draw(random)


def equal(found, expected):
    return all(torch.equal(a, b) for own, other in zip(found, expected) for a, b in zip(own, other))


SEQUENCES = {
    "small": lambda: drawn_from(source()),
    "gathered": lambda: drawn_from(source(64)),
    "large": lambda: drawn_from(source(64, pixels())),
    "turned": lambda: drawn_from(source(64, pixels()), turns=True, jitter=1.0),
    "augmented": lambda: drawn_from(source(64), augment=lambda inputs, random: inputs),
    "functions": lambda: RegressionEpisodes(Sinusoids(), shots=3, query_shots=4, seed=2),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_same_tasks_as_without(name):
    own, ahead = SEQUENCES[name](), Ahead(SEQUENCES[name](), 2, 60)
    for start in (*range(0, 60, 2), 60, 8, 10, 11):
        assert equal(ahead.batch(start, 2), own.batch(start, 2)), start
    parts = Ahead(own, 6, 30)
    for start in (0, 6, 12):
        assert equal(parts.batch(start, 4), own.batch(start, 4))
        assert equal(parts.batch(start + 4, 2), own.batch(start + 4, 2))


def test_the_numbers_of_many_batches_are_drawn_at_once_and_none_beyond_the_end():
    own, asked = SEQUENCES["turned"](), []
    numbers = own.numbers
    own.numbers = lambda start, tasks: asked.append((start, tasks)) or numbers(start, tasks)
    ahead = Ahead(own, 2, 39)
    for start in range(0, 38, 2):
        ahead.batch(start, 2)
    assert asked == [(0, 2), (2, 32), (34, 5)]


def test_a_held_batch_stays_as_it_is():
    ahead = Ahead(SEQUENCES["large"](), 2, 10**6)
    kept = [ahead.batch(start, 2) for start in range(0, 20, 2)]
    assert all(equal(batch, SEQUENCES["large"]().batch(2 * n, 2)) for n, batch in enumerate(kept))


def test_nothing_of_the_users_runs_aside_and_nothing_beyond_the_end():
    threads, asked = set(), []

    def decode(inputs):
        threads.add(threading.get_ident())
        return inputs.float()

    for own in (drawn_from(source(64, decode)), SEQUENCES["large"]()):
        taken = own.taken
        own.taken = lambda numbers, start, taken=taken: (
            asked.append((start, len(numbers.rows))) or taken(numbers, start)
        )
        ahead = Ahead(own, 2, 6)
        for start in (0, 2, 4):
            ahead.batch(start, 2)
    assert threads == {threading.get_ident()}
    assert sorted(asked) == sorted([(0, 2), (2, 2), (4, 2)] * 2)


def test_an_error_comes_when_its_batch_is_asked_for():
    own = SEQUENCES["large"]()
    taken = own.taken

    def failing(numbers, start):
        if start == 2:
            raise InputError("no")
        return taken(numbers, start)

    own.taken = failing
    ahead = Ahead(own, 2, 10)
    ahead.batch(0, 2)
    with pytest.raises(InputError, match="no"):
        ahead.batch(2, 2)


def test_training_draws_as_without(monkeypatch):
    def weights(ahead):
        torch.manual_seed(0)
        if not ahead:
            monkeypatch.setattr(sys.modules["fomaml.train"], "Ahead", lambda episodes, *_: episodes)
        learner = fomaml.FOMAML(fomaml.MLP(64 * 64, 4, 3), 0.1, 2)
        optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
        for _ in fomaml.train(learner, SEQUENCES["large"](), optimizer, iterations=4, meta_batch_size=3):
            pass
        return [*learner.parameters()]

    assert all(map(torch.equal, weights(True), weights(False)))


@pytest.fixture
def gathering(monkeypatch):
    """The threads that gather examples, three of torch's; small batches count as large ones."""
    monkeypatch.setattr("fomaml.data.source.LARGE", 1)
    threads, gather = set(), torch.index_select

    def noted(*given, **out):
        threads.add(threading.get_ident())
        return gather(*given, **out)

    monkeypatch.setattr(torch, "index_select", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield threads
    torch.set_num_threads(before)


def test_large_batches_are_gathered_by_several_threads(gathering):
    own = drawn_from(source(64))
    ahead = Ahead(own, 2, 12)
    found = [ahead.batch(start, 2) for start in range(0, 12, 2)]
    assert len(gathering) > 1 and threading.get_ident() in gathering
    with torch.inference_mode():  # which is of this thread
        assert equal(ahead.batch(12, 2), own.batch(12, 2))
    expected = [own.batch(start, 2) for start in range(0, 12, 2)]
    assert all(map(equal, found, expected))


def test_what_is_drawn_aside_is_gathered_there(gathering):
    """The other threads are at work for as long as the present tasks are computed with."""
    ahead = Ahead(SEQUENCES["turned"](), 2, 12)
    for start in range(0, 12, 2):
        ahead.batch(start, 2)
    assert len(gathering) == 2 and threading.get_ident() in gathering


def test_an_error_of_one_thread_is_raised_when_all_have_ended():
    done = []

    def work(part):
        if part.start == 0:
            raise InputError("no")
        done.append(part)

    with spread(2), pytest.raises(InputError, match="no"):
        in_parts(work, 5)
    assert done == [slice(2, 5)]  # by this thread, after which it has waited for the other
    in_parts(done.append, 4)
    assert done[1:] == [slice(4)]


def test_functions_at_once_are_those_one_by_one():
    both = [RegressionEpisodes(family, shots=3, query_shots=4, seed=2) for family in (Sinusoids(), Family())]
    assert equal(both[0].batch(5, 7), both[1].batch(5, 7))
    expected = np.stack([generator(3, 10 + row).random(9) for row in range(4)])
    assert (uniforms(3, 10, 4, 9) == expected).all() and uniforms(3, 10, 0, 9).shape == (0, 9)


def test_memory_is_lent_again_once_nobody_holds_it():
    memory, shape = Memory(), (LARGE,)
    with kept_in(memory):
        first = empty(shape, torch.uint8, torch.device("cpu"))
        place, view = first.data_ptr(), first[1:]
        assert empty(shape, torch.uint8, torch.device("cpu")).data_ptr() != place
        del first
        assert empty(shape, torch.uint8, torch.device("cpu")).data_ptr() != place
        del view
        places = [empty(shape, torch.uint8, torch.device("cpu")) for _ in range(2)]
        assert place in [each.data_ptr() for each in places]


def test_threads_are_as_before():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with alone():
            assert torch.get_num_threads() == 1
            assert pool_of(1).submit(torch.get_num_threads).result() == 1
        with alone(False):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
