"""Trainings on the processes of a group: a table of them, and what runs all of it in one start of processes."""

import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, multiprocessing, nn

from clusters import episodes, learner
from compiling import inductor
from fomaml import (
    ANIL,
    CAVIA,
    FOMAML,
    MAML,
    MLP,
    Adam,
    BatchNorm,
    MAMLPlusPlus,
    MetaSGD,
    ProtoMAML,
    Reptile,
    iMAML,
)
from fomaml.engines import ENGINES, plan
from fomaml.engines.pays import Cost
from fomaml.episodes import TaskSequence
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.models import WithContext
from fomaml.ranks import Ranks
from fomaml.train import train

META_BATCH = 7  # which neither two nor three processes divide
ITERATIONS = 2


class Uneven(TaskSequence):
    """Tasks of two shapes, the query sets of every third one smaller."""

    def batch(self, start, tasks):
        own = [
            episodes().batch(index, 1).map(lambda tensor: tensor[0]) for index in range(start, start + tasks)
        ]
        for place, task in enumerate(own):
            if (start + place) % 3 == 0:
                own[place] = task._replace(
                    query=type(task.query)(task.query.inputs[:5], task.query.targets[:5])
                )
        return own


class Case(NamedTuple):
    """learner: a new one. options: of `train`. exact: whether one process has the same numbers, up to rounding."""

    learner: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})
    tasks: Callable[[], Any] = episodes
    exact: bool = True


def normed(policy, **facts):
    # a bias before it would have a gradient of rounding errors alone, which Adam makes a whole step of
    first = nn.Linear(6, 16, bias=False)
    return nn.Sequential(first, BatchNorm(16, policy=policy, **facts), nn.ReLU(), nn.Linear(16, 3))


def headed():
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(6, 16), nn.ReLU()))
    model.add_module("head", nn.Linear(16, 3))
    return model


def dropping():
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3))


def by_size(task):
    return 1.0 + float(task.query.inputs.abs().mean())


CASES = {
    "fomaml": Case(lambda: FOMAML(MLP(6, 16, 3), 0.1, 2), {"clip": 0.5}),
    "maml": Case(lambda: MAML(MLP(6, 16, 3), 0.1, 2), {"engine": "loop"}),
    "reptile": Case(lambda: Reptile(MLP(6, 16, 3), 0.1, 3, optimizer=Adam(carried=True)), {"engine": "loop"}),
    "maml++": Case(lambda: MAMLPlusPlus(normed("per-step", steps=2), 0.1, 2, multi_step_iterations=5)),
    "anil": Case(lambda: ANIL(headed(), 0.1, 2), {"measure_every": 2}),
    "meta-sgd": Case(lambda: MetaSGD(MLP(6, 16, 3), 0.1, 1), {"tasks_at_once": 2}),
    "imaml": Case(lambda: iMAML(MLP(6, 16, 3), 0.05, 4, strength=2.0, damping=2.0)),
    "proto-maml": Case(lambda: ProtoMAML(headed(), 0.05, 2)),
    "cavia": Case(lambda: CAVIA(WithContext(MLP(8, 16, 3), 2), 0.5, 2)),
    "running": Case(lambda: FOMAML(normed("running"), 0.1, 2)),
    "weights": Case(lambda: FOMAML(MLP(6, 16, 3), 0.1, 2), {"task_weights": by_size}),
    "uneven": Case(lambda: FOMAML(MLP(6, 16, 3), 0.1, 2), {"task_weights": "examples"}, Uneven),
    "factored": Case(lambda: FOMAML(MLP(6, 80, 3), 0.1, 2), {"engine": "factored"}),
    "dropout": Case(lambda: FOMAML(dropping(), 0.1, 2), exact=False),
}


def trained(name: str, group: Any = None) -> dict[str, torch.Tensor]:
    """What a training of the table gives: its records, its state at the end and scores of its evaluation."""
    case = CASES[name]
    torch.manual_seed(5)
    learner = case.learner()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    options = {"iterations": ITERATIONS, "meta_batch_size": META_BATCH, "measure_every": 1, **case.options}
    found = {}
    for record in train(learner, case.tasks(), optimizer, group=group, **options):
        for field, value in zip(record._fields[1:4], record[1:4]):
            if value is not None:
                found[f"{record.iteration}/{field}"] = value.clone()
    found |= {f"state/{key}": value.clone() for key, value in learner.state_dict().items()}
    scores = evaluate(
        learner, case.tasks(), tasks=11, at_steps=[0, 2], metric="loss", tasks_at_once=4, group=group
    )
    return found | {f"scores/{steps}": own for steps, own in scores.items()}


def joined_and_then(work: Callable, ranks: int, folder: Path, *arguments: Any) -> Path:
    """Run `work(rank, folder, *arguments)` in so many processes of one group; the folder, which they write to."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no start of processes that is quick and safe here")
    # what takes seconds to import is imported once, by the process that these ones are forked from
    multiprocessing.set_forkserver_preload(["torch._dynamo", "fomaml.train"])
    given = (work, ranks, folder, arguments)
    multiprocessing.start_processes(_joined, given, ranks, start_method="forkserver")
    return folder


def _joined(rank: int, work: Callable, ranks: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=600),
    )
    try:
        work(rank, folder, *arguments)
    finally:
        distributed.destroy_process_group()


def train_table(rank: int, folder: Path, names: tuple[str, ...]) -> None:
    """Of each case: what three ranks find, twice; what two do; and the same bits of both, and of each rank alone."""
    two = distributed.new_group([0, 1])
    groups = {"3": distributed.group.WORLD, "2": two}
    found = {}
    for name in names:
        for ranks, group in groups.items():
            if rank >= int(ranks):
                continue
            found |= _named(f"{name}:{ranks}", trained(name, group))
            found |= _named(f"{name}:{ranks} bits", trained(name, Ranks(group, same_bits=True)))
        found |= _named(f"{name}:3 again", trained(name, groups["3"]))
    save_file(found, folder / f"{rank}.safetensors")


def _named(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}:{name}": tensor.contiguous().clone() for name, tensor in tensors.items()}


def read(folder: Path, rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """By case and ranks, what `train_table` has written."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(os.fspath(folder / f"{rank}.safetensors")).items():
        *first, last = key.split(":")
        found.setdefault(":".join(first), {})[last] = tensor
    return found


# --- what goes wrong on one rank ------------------------------------------------------------------


class Missing(TaskSequence):
    """Tasks of which one cannot be had."""

    def batch(self, start, tasks):
        if start <= 10 < start + tasks and tasks < META_BATCH:  # but to look at a whole meta-batch
            raise InputError("task 10 is not there")
        return episodes().batch(start, tasks)


def fail_in_turn(rank: int, folder: Path) -> None:
    """Write what each of several trainings that cannot go well says on this rank, and what others are told."""
    world = distributed.group.WORLD
    two = distributed.new_group([0, 1])

    def tell(what: str, work: Callable[[], Any]) -> None:
        try:
            found = str(work())
        except InputError as error:
            found = str(error)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        (folder / f"{what} {rank}").write_text(found)

    def run(tasks=None, lr=0.1, **options):
        torch.manual_seed(rank)
        meta = learner()
        optimizer = torch.optim.SGD(meta.parameters(), lr=lr)
        given = {
            "iterations": 2,
            "meta_batch_size": META_BATCH,
            "group": world,
            "engine": "batched",
            **options,
        }
        list(train(meta, tasks or episodes(), optimizer, **given))
        return [parameter.sum().item() for parameter in meta.parameters()]

    def fault(of, value):
        return lambda task: value() if rank == of else 1.0

    tell("a task", lambda: run(Missing()))
    tell("a weight", lambda: run(task_weights=fault(2, lambda: -1.0)))
    tell("no fault of the input", lambda: run(task_weights=fault(2, lambda: 1 / 0)))
    tell("an argument", lambda: run(clip=0 if rank == 1 else 1))
    tell("other arguments", lambda: run(iterations=4 if rank == 1 else 3))
    tell("another optimiser", lambda: run(lr=0.2 if rank == 2 else 0.1))
    tell("no task counts", lambda: run(task_weights=lambda task: 0.0))
    tell("an evaluation", lambda: evaluate(learner(), Missing(), tasks=11, group=world))
    tell("a stream", lambda: run([(task.support, task.query) for task in Uneven().batch(0, 3)]))
    if rank == 2:
        tell("no member", lambda: run(group=two))
    tell("begun", run)
    tell("halved", lambda: halved(rank))
    tell("notes", lambda: noted(rank))
    for case in UNCOMPILED:
        tell(case, lambda case=case: uncompiled(rank, case))


def halved(rank: int) -> int:
    """The tasks at once of a plan, when those of a third are too many for the memory of rank 1 alone."""
    own, problem = learner(), ENGINES["batched"]

    def guarded(learner, chunk, **facts):
        if rank == 1 and len(chunk.support.targets) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return problem(learner, chunk, **facts)

    made = plan(own, episodes().batch(0, META_BATCH), engine="batched")
    ENGINES["batched"] = guarded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
            options = {"iterations": 1, "meta_batch_size": META_BATCH, "plan": made}
            list(train(own, episodes(), optimizer, group=distributed.group.WORLD, **options))
    finally:
        ENGINES["batched"] = problem
    return made.tasks_at_once


UNCOMPILED = ("no compiler", "no compiler, a plan", "fails", "fails, as asked", "none fails")


def uncompiled(rank: int, case: str) -> str:
    """Whether a training is compiled that rank 1 cannot compile, and whether it ends as one that never was to be."""
    world = distributed.group.WORLD

    def run(compile):
        own = learner()
        made = plan(own, episodes().batch(0, META_BATCH), compile=compile, iterations=10**9)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        given = {"compile": compile} if case == "no compiler" else {"plan": made}
        list(
            train(own, episodes(), optimizer, iterations=3, meta_batch_size=META_BATCH, group=world, **given)
        )
        return made.compile, own

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if case == "fails, as asked":
            warnings.simplefilter("ignore")
        patch.setattr("fomaml.engines.pays.cost", lambda *_: Cost(1.0, 1.0, 1.0))  # pays from 2 on
        inductor(patch, lambda graph, *arguments: graph)
        if rank == 1 and case.startswith("no compiler"):
            patch.setattr("fomaml.engines.cpu.build.compiler", list)
        if rank == 1 and case.startswith("fails"):
            inductor(patch, lambda *arguments: 1 / 0)
        compiled, found = run(True if case.endswith("as asked") else "auto")
        _, expected = run(False)
    same = all(map(torch.equal, found.parameters(), expected.parameters()))
    return f"{'compiled' if compiled else 'uncompiled'}, {'the same' if same else 'other'} bits"


def noted(rank: int) -> list[list[float]]:
    calls = 0

    def notes() -> list[float]:
        nonlocal calls
        calls += 1
        return [calls * (rank == 1) * 3, float(rank > 0)]

    meta, found = learner(), []
    ranks = Ranks(distributed.group.WORLD, notes=notes)
    optimizer = torch.optim.SGD(meta.parameters(), lr=0.1)
    for _ in train(meta, episodes(), optimizer, iterations=2, meta_batch_size=META_BATCH, group=ranks):
        found.append(ranks.noted)
    return found
