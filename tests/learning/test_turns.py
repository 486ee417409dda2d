"""Threads that share a model: each call gives what it gives alone."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import fomaml
from fomaml.learning import turns
from zoo import draw

THREADS, TIMES = 4, 6


def learner_of(make):
    torch.manual_seed(0)
    return make(fomaml.MLP(5, 7, 4).double(), 0.1, 3)


@pytest.mark.parametrize("make", [fomaml.FOMAML, fomaml.MAML], ids=["first order", "second order"])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_threads_that_share_a_model_take_turns(make, engine):
    batches = [draw((5,), F.cross_entropy, tasks=3).map(lambda t, k=k: t * (k + 1) if t.is_floating_point() else t)
               for k in range(THREADS)]  # fmt: skip
    shared = learner_of(make)
    before = {name: value.clone() for name, value in shared.model.state_dict().items()}
    supports = [fomaml.tasks.one(batch, 0).support for batch in batches]

    def asked(number, learner=shared):
        found = []
        for _ in range(TIMES):
            found += fomaml.meta_gradient(learner, batches[number], engine=engine).gradients.values()
            found += learner.adapt(supports[number], 2).state_dict().values()
            with torch.no_grad():
                found.append(learner(batches[number]))
        return found

    alone = [asked(number, learner_of(make)) for number in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(asked, range(THREADS)))
    for one, other in zip(alone, together):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in shared.model.state_dict().items())


def test_a_model_has_one_lock_as_long_as_it_lives():
    model = torch.nn.Linear(1, 1)
    assert turns.turn_of(model) is turns.turn_of(model) is not turns.turn_of(torch.nn.Linear(1, 1))
    gc.collect()
    number = len(turns._locks)
    del model
    gc.collect()
    assert len(turns._locks) == number - 1


def test_arguments_go_by_name_too():
    learner, tasks = learner_of(fomaml.FOMAML), draw((5,), F.cross_entropy, tasks=2)
    by_name = fomaml.meta_gradient(learner=learner, tasks=tasks).gradients
    assert all(torch.equal(by_name[n], g) for n, g in fomaml.meta_gradient(learner, tasks).gradients.items())
