"""What has to hold on a device and cannot be seen on a CPU that plays it: each check a function of the device.

A check returns what it has seen, in words, or raises. `python -m benchmarks.gpu` runs all of them.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.workloads import transformer
from fomaml.app.device import reproducible
from fomaml.checkpoint import load_state, save_state
from fomaml.data.source import ClassSource
from fomaml.engines import curve, meta_gradient, plan
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.evaluate import evaluate
from fomaml.learning.algorithms import FOMAML, ProtoMAML
from fomaml.models import Conv4Strided
from fomaml.tasks import Examples, Task
from fomaml.train import train


def episodes(device: torch.device, **more) -> Episodes:
    random = torch.Generator().manual_seed(1)
    images, labels = torch.randn(80, 1, 16, 16, generator=random), torch.arange(8).repeat_interleave(10)
    own = {"ways": 5, "shots": 1, "query_shots": 3, "turns": True, "jitter": 0.1, **more}
    return Episodes(ClassSource(images, labels).to(device), **own)


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = Conv4Strided(5, channels=8)
    return nn.Sequential(model, nn.Dropout(dropout)) if dropout else model


def trained(
    device: torch.device, start: int = 0, stop: int = 6, state: Path | None = None, **told
) -> list[Tensor]:
    """The parameters after the iterations start … stop - 1 of 6. state: is read to go on, and written by who began."""
    learner = FOMAML(network(0.2).to(device), 0.1, 2)
    optimizer = torch.optim.Adam(learner.parameters(), 0.01)
    torch.manual_seed(7)
    if start and state is not None:
        load_state(state, learner, optimizer)
    for record in train(
        learner, episodes(device), optimizer, iterations=6, meta_batch_size=4, start=start, **told
    ):
        if record.iteration == stop:
            break
    if state is not None and not start:
        save_state(state, learner, optimizer, stop)
    return [parameter.detach().cpu() for parameter in learner.parameters()]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest ‖difference‖ / ‖expected‖ of any tensor beside the norm of all."""
    whole = torch.stack([each.double().norm() for each in expected]).norm()
    return max(float((a.double() - b.double()).norm() / whole) for a, b in zip(found, expected, strict=True))


def near(difference: float, bound: float, what: str) -> str:
    if not difference <= bound:
        raise AssertionError(f"{what} differs by {difference:.2g}, more than {bound:g}")
    return f"{what} differs by {difference:.1g}"


def gradients_of(model: nn.Module, tasks: Task, device: torch.device, make=FOMAML, **told) -> list[Tensor]:
    found = meta_gradient(make(model.to(device), 0.05, 2), tasks.to(device), **told)
    return [gradient.cpu() for gradient in found.gradients.values()]


def of_transformer(dtype: torch.dtype) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    labels = (torch.arange(5) % 5).expand(4, 5)
    return transformer().to(dtype), Task(
        *(Examples(torch.randn(4, 5, 16, 64).to(dtype), labels) for _ in "ab")
    )


# --- the checks -----------------------------------------------------------------------------------


def evaluation_as_on_a_cpu(device: torch.device) -> str:
    found, expected = (
        evaluate(
            FOMAML(network().to(where), 0.1, 2), episodes(where), tasks=20, at_steps=[0, 2], metric="loss"
        )
        for where in (device, torch.device("cpu"))
    )
    return near(apart([*found.values()], [*expected.values()]), 1e-2, "the loss after evaluation")


def stacked_attention(device: torch.device) -> str:
    """First order, float32, under vmap: beside the loop in float64 on a CPU."""
    model, tasks = of_transformer(torch.float64)
    expected = gradients_of(model, tasks, torch.device("cpu"), engine="loop")
    model, tasks = of_transformer(torch.float32)
    worst = max(
        apart(gradients_of(copy.deepcopy(model), tasks, device, engine=engine), expected)
        for engine in ("batched", "loop")
    )
    return near(worst, 1e-3, "the gradient of a transformer")


def heads_under_autocast(device: torch.device) -> str:
    tasks = episodes(torch.device("cpu")).batch(0, 4)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU()))
    model.add_module("head", nn.Linear(16, 5))
    found = [
        gradients_of(model, tasks, device, ProtoMAML, engine=engine, autocast=torch.bfloat16)
        for engine in ("loop", "batched")
    ]
    return near(apart(*found), 0.1, "ProtoMAML in bfloat16 by loop and batched")


def steps_that_do_not_wait(device: torch.device) -> str:
    if device.type != "cuda":
        return "not on this device"
    learner = FOMAML(network().to(device), 0.1, 2)
    optimizer = torch.optim.SGD(learner.parameters(), 0.01)
    records = train(learner, episodes(device), optimizer, iterations=5, meta_batch_size=4, measure_every=5)
    next(records)
    try:
        torch.cuda.set_sync_debug_mode("error")
        next(records), next(records)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "two outer steps"


def masks_of_a_resumed_run(device: torch.device) -> str:
    with reproducible(str(device)), tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        whole = trained(device)
        trained(device, 0, 3, state)
        again = trained(device, 3, 6, state)
    return near(apart(again, whole), 0.0, "a run with dropout that went on")


def the_same_bits_again(device: torch.device) -> str:
    with reproducible(str(device)):
        return near(apart(trained(device), trained(device)), 0.0, "a run made twice")


def compiled_and_replayed(device: torch.device) -> str:
    """Several chunks, twice: what one replay writes outlives the next."""
    tasks = episodes(torch.device("cpu")).batch(0, 6)
    expected = gradients_of(network(), tasks, torch.device("cpu"), engine="loop")
    own = plan(
        FOMAML(network().to(device), 0.05, 2),
        tasks.to(device),
        engine="batched",
        tasks_at_once=2,
        compile=True,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True")
        results = [own(tasks.to(device)) for _ in range(3)]
    worst = max(apart([g.cpu() for g in each.gradients.values()], expected) for each in results)
    return near(worst, 0.1, "a compiled meta-gradient")


def traced_and_replayed(device: torch.device) -> str:
    """Inner steps whose launches were recorded, as torch's compiler is not asked, before and after the parameters have
    moved.
    """
    tasks = episodes(torch.device("cpu")).batch(0, 6)
    learners = {where: FOMAML(network().to(where), 0.05, 2) for where in ("cpu", device)}
    worst = 0.0
    for _ in range(3):
        found, expected = (
            [outputs.cpu() for _, outputs in curve(own, tasks.to(where), [0, 2], compile=where == device)]
            for where, own in reversed(learners.items())
        )
        worst = max(worst, apart(found, expected))
        with torch.no_grad():
            for own in learners.values():
                for parameter in own.parameters():
                    parameter.mul_(1.1)
    return near(worst, 0.1, "outputs of recorded inner steps")


def labels_beyond_the_outputs(device: torch.device) -> str:
    tasks = episodes(torch.device("cpu")).batch(0, 3)
    tasks.query.targets[-1, -1] = 7
    with contextlib.suppress(InputError):
        gradients_of(network(), tasks, device)
        raise AssertionError("labels beyond the outputs were taken")
    torch.ones(1, device=device).sum().item()  # the device can still be used
    return "refused, and the device goes on"


def halves_where_memory_runs_out(device: torch.device) -> str:
    if device.type != "cuda":
        return "not on this device"
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 5))
    tasks = episodes(torch.device("cpu"), turns=False, jitter=0.0).batch(0, 64).to(device)
    learner = FOMAML(model.to(device), 0.05, 2)
    own = plan(learner, tasks, engine="batched", tasks_at_once=64)
    expected = own(tasks)
    torch.cuda.empty_cache()
    held, there = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[1]
    try:
        # so much that 64 tasks do not fit, of 2 MB in weights each, several times over
        torch.cuda.set_per_process_memory_fraction((held + 500e6) / there, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = own(tasks)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    if own.tasks_at_once == 64:
        raise AssertionError("64 tasks at once fitted after all: nothing was seen")
    pairs = [[g.cpu() for g in each.gradients.values()] for each in (found, expected)]
    return near(apart(*pairs), 1e-4, f"the gradient with {own.tasks_at_once} tasks at once")


def half_precision(device: torch.device) -> str:
    with contextlib.suppress(InputError):
        gradients_of(network(), episodes(torch.device("cpu")).batch(0, 2), device, autocast=torch.float16)
        raise AssertionError("float16 was taken")
    return "float16 is refused"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    check.__name__.replace("_", " "): check
    for check in (
        evaluation_as_on_a_cpu,
        stacked_attention,
        heads_under_autocast,
        steps_that_do_not_wait,
        masks_of_a_resumed_run,
        the_same_bits_again,
        compiled_and_replayed,
        traced_and_replayed,
        labels_beyond_the_outputs,
        half_precision,
        halves_where_memory_runs_out,
    )
}


def checked(device: torch.device, names: list[str] | None = None) -> dict[str, dict]:
    """Of each check whether it passed, and what it saw."""
    found = {}
    for name in names or CHECKS:
        try:
            found[name] = {"passed": True, "saw": CHECKS[name](device)}
        except Exception as error:  # a failure is what is recorded
            found[name] = {
                "passed": False,
                "saw": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}",
            }
    return found
