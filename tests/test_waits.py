"""What an outer step asks of its device: one copy of what is drawn, and nothing that waits for it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from elsewhere import Elsewhere, classes, network
from family import ALGORITHMS
from fomaml import ahead
from fomaml.data.groups import GroupSource
from fomaml.devices import sent
from fomaml.draws import first
from fomaml.group_episodes import GroupEpisodes
from fomaml.train import train


def same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor
        torch.testing.assert_close(one, other)


TRANSFORMS = {
    "plain": {},
    "turned": {"turns": True},
    "jittered": {"jitter": 0.1},
    "both, and copies": {"turns": True, "jitter": 0.1, "copies": 2},
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_episodes_are_drawn_with_one_copy_and_without_waiting(transform):
    expected = classes("cpu", **TRANSFORMS[transform]).batch(3, 4)
    with Elsewhere() as machine:
        episodes = classes(machine.device, **TRANSFORMS[transform])
        machine.copies.clear()
        machine.waits.clear()
        found = episodes.batch(3, 4)
        assert machine.copies.total() == 1 and not machine.waits
        found = found.to("cpu")
    same([*found.support, *found.query], [*expected.support, *expected.query])


@pytest.mark.parametrize("classification", [False, True])
def test_groups_of_rows_are_drawn_with_one_copy(classification):
    rows = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    kind = {"kind": "classification"} if classification else {}
    targets = torch.arange(60) % 3 if classification else rows.sum(1, keepdim=True)
    source = GroupSource(rows, targets, torch.arange(60) // 12, **kind)
    told = {"shots": 1, "query_shots": 2, **({"ways": 2} if classification else {})}
    expected = GroupEpisodes(source, **told).batch(1, 3)
    with Elsewhere() as machine:
        found = GroupEpisodes(source, **told, device=machine.device).batch(1, 3)
        assert machine.copies.total() == 1 and not machine.waits
        found = found.to("cpu")
    same([*found.support, *found.query], [*expected.support, *expected.query])


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize(
    "algorithm", ["fomaml", "maml", "reptile", "fomaml-adam", "meta-sgd", "proto-maml", "zero-head"]
)
def test_an_outer_step_does_not_wait(algorithm, engine, monkeypatch):
    """Nor does it copy anything but the episodes: what is measured apart, and what is done once."""
    # in this thread, each batch by itself: the device that is played is that of one thread
    monkeypatch.setattr(ahead, "SMALL", 0)
    monkeypatch.setattr(ahead, "LARGE", 0)
    with Elsewhere() as machine:
        learner = ALGORITHMS[algorithm].learner(network(), F.cross_entropy).to(machine.device)
        optimizer = torch.optim.SGD(learner.parameters(), 0.01)
        told = {"iterations": 9, "meta_batch_size": 3, "engine": engine, "measure_every": 9, "clip": 1.0}
        seen = []
        for record in train(learner, classes(machine.device, turns=True, jitter=0.1), optimizer, **told):
            seen.append((dict(machine.waits), dict(machine.copies)))
            machine.waits.clear()
            machine.copies.clear()
            if record.iteration == 3:
                break
    assert seen[1] == seen[2] == ({}, {"copy": 1})


@pytest.mark.parametrize("ways", [1, 2, 5, 40, 41])
def test_the_first_classes_are_those_of_a_full_sort(ways):
    randoms = np.random.default_rng(ways).random((200, 41))
    randoms[7, 3] = randoms[7, 30] = randoms[8].min() / 2  # equal ones too
    randoms[9] = 0.5
    assert (first(randoms, ways) == randoms.argsort(axis=1)[:, :ways]).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.int64, torch.bool])
def test_what_is_sent_arrives(dtype):
    given = [
        torch.arange(7).to(dtype),
        torch.ones(0, 2).to(dtype),
        (torch.arange(12).view(3, 4).T > 2).to(dtype),
    ]
    assert all(one is other for one, other in zip(sent(given, None), given))
    if dtype != torch.float64:
        with Elsewhere() as machine:
            found = [each.cpu() for each in sent(given, machine.device)]
            assert machine.copies.total() == 1
        same(found, given)
