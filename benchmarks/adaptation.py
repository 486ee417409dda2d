"""`python -m benchmarks.adaptation [NETWORK ...]`: adaptation without a meta-gradient, beside what users write by hand.

Two workloads, each on three networks, 10 inner steps: *evaluation*, the accuracy on the query sets of many tasks, and
*serving*, one task adapted to and one example predicted. Outputs are compared in float64 first; then all contestants
take turns in one process, and a ratio is the median over rounds of the two times in the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks import report
from benchmarks.__main__ import CORES, _commit, _processor
from benchmarks.process import ROOT
from benchmarks.ranks import Fixed
from benchmarks.workloads import WORKLOADS, Setup, Workload, build
from fomaml import FOMAML, evaluate
from fomaml.engines import adapter, curve
from fomaml.tasks import Task, count, one

RESULTS = ROOT / "benchmarks" / "results" / "adaptation.json"
PAGE = ROOT / "docs" / "benchmarks.md"
STEPS = 10
SLOW = 6.0  # so many times slower than the fastest: two rounds only
NETWORKS: dict[str, Workload] = {
    "MLP 784-256-10": replace(WORKLOADS["A"], steps=STEPS),
    "Conv4Strided": replace(WORKLOADS["D"], steps=STEPS, query=75),
    "Conv4": replace(WORKLOADS["C"], steps=STEPS),
}
GOALS = {"MLP 784-256-10": 3.0, "Conv4Strided": 3.0, "Conv4": 1.8}  # of evaluation; of serving 1.5
Run = Callable[[], Tensor]  # → outputs, or a score


# --- by hand ----------------------------------------------------------------------------------------


def by_hand(setup: Setup, task: Task) -> torch.nn.Module:
    """`deepcopy` and `torch.optim.SGD`."""
    adapted = copy.deepcopy(setup.model)
    inner = torch.optim.SGD(adapted.parameters(), lr=setup.workload.inner_lr)
    for _ in range(setup.workload.steps):
        inner.zero_grad()
        setup.criterion(adapted(task.support.inputs), task.support.targets).backward()
        inner.step()
    return adapted


def functionally(setup: Setup, task: Task) -> dict[str, Tensor]:
    """`functional_call` on a dict of parameters, `torch.func.grad`."""

    def loss(parameters, inputs, targets):
        return setup.criterion(functional_call(setup.model, parameters, (inputs,)), targets)

    parameters = {name: p.detach() for name, p in setup.model.named_parameters()}
    for _ in range(setup.workload.steps):
        slope = grad(loss)(parameters, *task.support)
        parameters = {name: p - setup.workload.inner_lr * slope[name] for name, p in parameters.items()}
    return parameters


# --- the contestants: each computes the outputs (tasks, examples, classes) --------------------------


def evaluations(setup: Setup) -> dict[str, Run]:
    tasks = [one(setup.tasks, number) for number in range(count(setup.tasks))]
    learner = FOMAML(setup.model, setup.workload.inner_lr, STEPS, setup.criterion)

    @torch.no_grad()
    def outputs(adapted, task):
        return adapted(task.query.inputs)

    @torch.no_grad()
    def called(parameters, task):
        return functional_call(setup.model, parameters, (task.query.inputs,))

    def stacked():
        def alone(support, query):
            task = Task(type(setup.tasks.support)(*support), type(setup.tasks.query)(*query))
            return called(functionally(setup, task), task)

        return vmap(alone)(tuple(setup.tasks.support), tuple(setup.tasks.query))

    def ours(compile: bool):
        [(_, found)] = curve(learner, setup.tasks, [STEPS], compile=compile)
        return found

    return {
        "plain loop": lambda: torch.stack([outputs(by_hand(setup, task), task) for task in tasks]),
        "functional loop": lambda: torch.stack([called(functionally(setup, task), task) for task in tasks]),
        "vmap": stacked,
        "fomaml": lambda: ours(False),
        "fomaml compiled": lambda: ours(True),
    }


def scored(setup: Setup) -> dict[str, Run]:
    """What is timed of evaluation: the mean accuracy, and `fomaml.evaluate` as it is called."""
    runs = evaluations(setup)
    targets = setup.tasks.query.targets
    learner = FOMAML(setup.model, setup.workload.inner_lr, STEPS, setup.criterion)
    episodes: dict = {"episodes": Fixed(setup.tasks), "tasks": count(setup.tasks), "at_steps": STEPS}

    def accuracy(run: Run) -> Run:
        return lambda: (run().argmax(-1) == targets).double().mean()

    peers = {name: accuracy(run) for name, run in runs.items() if not name.startswith("fomaml")}
    return peers | {
        "fomaml": lambda: evaluate(learner, **episodes, compile=False)[STEPS].mean(),
        "fomaml compiled": lambda: evaluate(learner, **episodes, compile=True)[STEPS].mean(),
    }


def servings(setup: Setup) -> dict[str, Run]:
    """One task, one example predicted."""
    task = one(setup.tasks, 0)
    example = task.query.inputs[:1]
    learner = FOMAML(setup.model, setup.workload.inner_lr, STEPS, setup.criterion)
    own = adapter(learner, task.support)

    @torch.no_grad()
    def predict(model):
        return model(example)

    @torch.no_grad()
    def called(parameters):
        return functional_call(setup.model, parameters, (example,))

    return {
        "plain loop": lambda: predict(by_hand(setup, task)),
        "functional loop": lambda: called(functionally(setup, task)),
        "fomaml": lambda: predict(learner.adapt(task.support)),
        "fomaml compiled": lambda: predict(own(task.support)),
    }


# --- the race ---------------------------------------------------------------------------------------


def race(name: str, rounds: int, seed: int) -> dict:
    """The record of a network: by workload and contestant the error in float64, ms, and times faster."""
    found: dict = {}
    for kind, contestants in (("evaluation", evaluations), ("serving", servings)):
        exact = contestants(build(NETWORKS[name], torch.float64, seed))
        answers = {key: run() for key, run in exact.items()}
        expected = answers["plain loop"]
        errors = {key: ((own - expected).norm() / expected.norm()).item() for key, own in answers.items()}
        wrong = [key for key, error in errors.items() if not error <= 1e-8]
        if wrong:
            raise RuntimeError(f"{name}, {kind}: {wrong[0]} is {errors[wrong[0]]:.1e} off the plain loop")
        setup = build(NETWORKS[name], torch.float32, seed)
        began = time.perf_counter()
        runs = servings(setup) if kind == "serving" else scored(setup)
        first = time.perf_counter() - began
        for key, run in runs.items():
            began = time.perf_counter()
            run()
            if key == "fomaml compiled" and kind == "evaluation":
                first = time.perf_counter() - began
        found[kind] = _timed(runs, rounds, seed, 1 if kind == "evaluation" else 10)
        for key, row in found[kind].items():
            row["error_float64"] = errors[key]
        found[kind]["fomaml compiled"]["first_seconds"] = first
    return found


def _timed(runs: dict[str, Run], rounds: int, seed: int, times: int) -> dict[str, dict]:
    shuffle = random.Random(seed).shuffle
    milliseconds: dict[str, list[float]] = {key: [] for key in runs}
    order = [*runs]
    for number in range(rounds):
        shuffle(order)
        fastest = min(map(median, milliseconds.values())) if number else 0.0
        for key in order:
            if number >= 2 and key != "plain loop" and median(milliseconds[key]) > SLOW * fastest:
                continue
            seconds = []
            for _ in range(times):
                began = time.perf_counter()
                runs[key]()
                seconds.append(time.perf_counter() - began)
            milliseconds[key].append(1e3 * median(seconds))
    plain = milliseconds["plain loop"]
    return {
        key: {
            "milliseconds": median(own),
            "rounds": own,
            "faster": median(a / b for a, b in zip(plain, own, strict=False)),
        }
        for key, own in milliseconds.items()
    }


def tables(results: dict) -> str:
    """For the page."""
    runs = {json.dumps(each["run"]): each["run"] for each in results["networks"].values()}
    lines = [f"{report.origin(run, run['seed'])}, {run['rounds']} rounds." for run in runs.values()]
    lines += ["Times faster than the plain loop, and milliseconds.", ""]
    for kind, title in (
        ("evaluation", "Evaluation: 32 tasks, 5 support and 75 query examples, 10 inner steps"),
        ("serving", "Serving: one task adapted to in 10 inner steps, one example predicted"),
    ):
        names = [*dict.fromkeys(key for each in results["networks"].values() for key in each[kind])]
        lines += [
            f"**{title}**",
            "",
            f"| | {' | '.join(names)} | first call, s |",
            "|---" * (len(names) + 2) + "|",
        ]
        for name, each in results["networks"].items():
            rows = each[kind]
            cells = [f"{rows[key]['faster']:.2f} ({rows[key]['milliseconds']:.3g})" for key in names]
            lines.append(f"| {name} | {' | '.join(cells)} | {rows['fomaml compiled']['first_seconds']:.1f} |")
        lines.append("")
    return "\n".join(lines[:-1])


def render(results: dict, page: Path = PAGE) -> None:
    report.put(tables(results), page, "adaptation")


def circumstances(options: argparse.Namespace) -> dict:
    """Where, when and with what a network was run."""
    return {
        "machine": _processor(),
        "cores": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
        "seed": options.seed,
        "rounds": options.rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adaptation", description=__doc__)
    add = parser.add_argument
    add("network", nargs="*", help=f"{', '.join(map(repr, NETWORKS))} (default: all)")
    add("--rounds", type=int, default=9, help="interleaved rounds of timing")
    add("--seed", type=int, default=0, help="of weights, tasks and the order of turns")
    add("--threads", type=int, default=CORES, help="default: all cores")
    add("--out", type=Path, default=RESULTS, help="the JSON; a network that is run replaces its old record")
    add(
        "--render",
        action="store_true",
        help="write the tables of docs/benchmarks.md from the JSON, run nothing",
    )
    options = parser.parse_args()
    for unknown in set(options.network) - {*NETWORKS}:
        raise SystemExit(f"unknown network {unknown!r}; there are: {', '.join(NETWORKS)}")
    torch.set_num_threads(options.threads)
    results = json.loads(options.out.read_text()) if options.out.exists() else {"networks": {}}
    if options.render:
        return render(results)
    for name in options.network or NETWORKS:
        run = circumstances(options)
        results["networks"][name] = race(name, options.rounds, options.seed) | {"run": run}
    results["networks"] = {
        name: results["networks"][name] for name in NETWORKS if name in results["networks"]
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
