"""Several algorithms with the same budget on the same tasks: one table, and what first order leaves out.

Each algorithm is trained in a fresh process of its own, so that the peak memory is that of its training.
A comparison's folder holds compare.json, compare.txt and a run directory per algorithm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.build import build_learner, judged_by, open_data, with_data
from fomaml.app.commands import CompareOptions, given
from fomaml.app.compare_resume import COMPARISON, begin, costs_file, costs_of
from fomaml.app.group_tasks import of_units
from fomaml.app.isolated import isolated
from fomaml.app.judge import protocol, told
from fomaml.app.launch import Launch, launched
from fomaml.app.networks import build_model
from fomaml.app.report import align
from fomaml.app.rundir import CONFIG, circumstances
from fomaml.app.scores import facts_of, headline, measured, metric_in
from fomaml.app.search import words_of
from fomaml.app.session import NO_LIMIT, session
from fomaml.app.settings import Settings
from fomaml.app.settle import settle
from fomaml.checkpoint import load_weights, save_weights
from fomaml.devices import forked_random
from fomaml.engines import meta_gradient, plan
from fomaml.errors import positive
from fomaml.evaluate import estimate
from fomaml.files import write_json, write_text
from fomaml.learning.algorithms import FOMAML, MAML
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import Implicit
from fomaml.measures import exact
from fomaml.metrics import Metric
from fomaml.tasks import Batch, Task, one


def expand(options: CompareOptions) -> list[Settings]:
    """The settings of each algorithm of a comparison, FOMAML's first.

    Raises:
        InputError: as `settle`.
    """
    if options.cosine_every is not None:
        positive("--cosine-every", options.cosine_every, integer=True)
    shared = given(options)
    for name in ("out", "algorithms", "cosine_every", "resume"):
        shared.pop(name, None)
    names = dict.fromkeys(("fomaml", *options.algorithms))  # each once
    return [settle(**{"baselines": False, **shared, "algorithm": name}) for name in names]


def compare(
    options: CompareOptions, out: Path, *, say: Callable[[str], None] = print, resume: bool = False
) -> dict:
    """Train and evaluate each algorithm, write the folder `out`; returns the result, as in compare.json.

    say: receives a line as each algorithm begins and ends. An algorithm that fails, say because its loss
    is no longer finite, has a row that says why. resume: `out` holds a comparison of these options that was
    interrupted; what is finished is kept, and a training goes on from its last checkpoint.

    Raises:
        InputError: bad settings, data or device, or `out` holds something, before anything is written.
    """
    launch = launched()
    with launch.checking():
        runs = [dataclasses.replace(each, out=out / each.algorithm) for each in expand(options)]
        first = dataclasses.replace(runs[0], device=launch.device(runs[0].device))
        data = open_data(first)
    with launch.checking():
        if launch.first and not resume:
            begin(options, out)
    if launch.many:
        say(f"{launch.size} processes for each algorithm")
    say(f"{data.name}: {data.origin}")
    if first.seconds:
        say(f"each algorithm trains for {first.seconds:g} s, which cannot be repeated bit for bit")
    shown = with_data(first, data)
    facts = protocol(shown, data, build_learner(shown, build_model(shown)), first.statistics)
    found = {}
    for number, settings in enumerate(runs, 1):
        name = settings.algorithm
        with launch.checking():
            row = costs_of(out / name) if resume else None
        if row is None:
            say(f"{ALGORITHMS[name].title} ({number}/{len(runs)}): training in a process of its own")
            row = isolated(run_one, settings, out / name, options.cosine_every)
        else:
            say(f"{ALGORITHMS[name].title} ({number}/{len(runs)}): finished before")
        found[name] = row
        say(f"  {row['failed']}" if "failed" in row else f"  {row['iterations']} iterations, {_pace(row)}")
    cosines = found["fomaml"].pop("cosines", [])
    result = {
        "command": shlex.join(["fomaml", "compare", *words_of(given(options), CompareOptions)]),
        "budget": {"seconds": first.seconds} if first.seconds else {"iterations": first.iterations},
        "protocol": facts,
        **facts_of(headline(first)),
        "measured": measured(first, headline(first)),
        "tasks": shown.test_tasks,
        "steps": first.test_steps[-1],
        "rows": _rows(found),
        "cosines": cosines,
        "seed": first.seed,
        "device": first.device,
        **circumstances(first.device),
    }
    if launch.first:
        write_json(out / COMPARISON, result)
        write_text(out / "compare.txt", describe(result))
    return result


def run_one(settings: Settings, out: Path, cosine_every: int | None, threads: int) -> dict:
    """Train one algorithm, evaluate it and write the run directory `out`.

    Returns its costs and `scores`: per number of inner steps the list of scores by task. Data, the first
    use of everything, the cosines and the evaluation are outside the measured time.

    Raises:
        InputError: the loss is no longer finite.
    """
    torch.set_num_threads(threads)
    launch = Launch(os.environ, settings.algorithm, hosts=False)
    going_on = launch.decided(lambda: "yes" if (out / CONFIG).exists() else "no") == "yes"
    with (
        launch.speaking(),
        session(
            settings, out, say=lambda line: None, allow_download=False, launch=launch, resume=going_on
        ) as run,  # the parent's data
    ):
        settings, learner, model = run.settings, run.learner, run.learner.model
        first = run.data.train.batch(0, 1)
        gradients, products = gradient_evaluations(learner, one(first, 0))
        with forked_random():
            meta_gradient(learner, first, engine=run.plan.engine)
        every = cosine_every or max(1, settings.iterations // 10)
        snapshots: dict[int, Path] = {}

        def keep(iteration: int) -> None:
            """On disk: a second-order gradient in between, or copies in memory, would be part of the peak."""
            if settings.algorithm == "fomaml" and iteration % every == 0 and launch.first:
                snapshots[iteration] = folder / f"{iteration}.safetensors"
                save_weights(snapshots[iteration], model)

        folder = out / SNAPSHOTS
        for path in folder.glob("*.safetensors") if launch.first else ():  # of a run that goes on
            snapshots[int(path.stem)] = path
        memory = Memory(next(model.parameters()).device)
        run.train(measure_every=NO_LIMIT, after=keep)
        peak = memory.peak()
        every = 1
        keep(run.done)
        cosines, probe = [], run.data.tuning.batch(0, settings.meta_batch_size)
        for number, path in sorted(snapshots.items()):  # the last one is what was trained
            load_weights(path, model)
            cosines.append({"iteration": number, "cosine": first_order_cosine(settings, model, probe)})
        spent, tasks = run.clock.training, run.done * settings.meta_batch_size
        found: dict = {
            "iterations": run.done,
            "seconds": spent,
            "tasks_per_second": tasks / spent,
            "engine": run.plan.engine,
            "peak_memory_mb": peak,
            "memory": memory.kind,
            "gradients_per_task": gradients,
            "hessian_products_per_task": products,
            "gradient_evaluations": tasks * gradients,
            "hessian_products": tasks * products,
            "settings": {name: getattr(settings, name) for name in SETTINGS},
            "cosines": cosines,
        }

        def scores() -> dict:
            return {steps: of_units(run.data.test, own).tolist() for steps, own in run.scores.items()}

        def judged() -> None:
            """Before the run is finished: one that is has its costs."""
            write_json(costs_file(out), found | {"scores": scores()})
            shutil.rmtree(folder, ignore_errors=True)

        run.finish(judged)
        return found | {"scores": scores()}


SNAPSHOTS = "snapshots"  # of FOMAML, in its run directory while it trains
SETTINGS = ("inner_lr", "inner_steps", "meta_lr", "meta_batch_size", "schedule", "choices")


def gradient_evaluations(learner: MetaLearner, task: Task) -> tuple[int, int]:
    """What one task costs in an outer step: gradients of the model's loss, and Hessian-vector products.

    The gradients are counted, as forward passes to be differentiated. Differentiating through an inner
    step takes one product (Finn et al. 2017, section 5.2), a conjugate gradient step of iMAML one too.
    """
    count = 0

    def forward(*_):
        nonlocal count
        count += torch.is_grad_enabled()

    one_task = task.map(lambda tensor: tensor[None])
    own = plan(learner, one_task, engine="loop")  # which tries the learner
    with learner.model.register_forward_pre_hook(forward):
        own(one_task)
    if isinstance(learner.objective, Implicit):
        return count, learner.objective.cg_steps
    choice = learner.first_order
    first_order = choice(learner.iteration) if callable(choice) else choice
    return count, 0 if first_order else learner.inner_steps


def first_order_cosine(settings: Settings, model: nn.Module, tasks: Batch) -> float:
    """The cosine between FOMAML's and MAML's meta-gradient of `model` on a batch of tasks."""
    like = dataclasses.replace(settings, algorithm="fomaml")
    judged = judged_by(like)
    first, second = (
        torch.cat([exact(g.flatten()) for g in meta_gradient(learner, tasks).gradients.values()])
        for learner in (
            preset(model, settings.inner_lr, settings.inner_steps, **judged) for preset in (FOMAML, MAML)
        )
    )
    return (first @ second / (first.norm() * second.norm())).item()


class Memory:
    """The peak memory from its making on, in MB of 10⁶ bytes; None where the system does not tell.

    kind: on CUDA the most that tensors held, the model's own included; elsewhere how much the peak
    resident memory of the process grew.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kind = "tensors on the device" if device.type == "cuda" else "growth of the process"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is held now
        self.before = high_water()

    def peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        after = high_water()
        if after is None or self.before is None:
            return None
        return max(0, after - self.before) / 1e6  # the system counts it to some pages


def high_water() -> int | None:
    """The peak resident memory of this process in bytes."""
    try:  # Linux's ru_maxrss starts at that of the parent process, VmHWM does not
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _rows(found: dict[str, dict]) -> list[dict]:
    """A row per algorithm: its scores summed up, the difference from FOMAML on the same tasks, its costs."""
    reference = found["fomaml"].get("scores")
    rows = []
    for algorithm, facts in found.items():
        row: dict = {"algorithm": algorithm, "name": ALGORITHMS[algorithm].title}
        if "failed" not in facts:
            scores = {steps: torch.tensor(s, dtype=torch.float64) for steps, s in facts["scores"].items()}
            last = max(scores)
            row |= _summed(scores[last])
            if reference and algorithm != "fomaml":
                row["difference"] = _summed(scores[last] - torch.tensor(reference[last], dtype=torch.float64))
            row["curve"] = {str(steps): _summed(s) for steps, s in scores.items()}
        row |= {name: value for name, value in facts.items() if name not in ("scores", "cosines")}
        rows.append(row)
    return rows


def _summed(scores: torch.Tensor) -> dict:
    """A mean and its interval; None where an error is no longer finite."""
    if not scores.isfinite().all():
        return {"mean": None, "interval": None}
    found = estimate(scores)
    return {"mean": found.mean, "interval": found.interval}


def cell(found: dict | None, metric: Metric, signed: bool = False) -> str:
    if found is None:
        return ""
    if found["mean"] is None or abs(found["mean"]) > 1000:
        return "diverges"
    return ("+" if signed and found["mean"] > 0 else "") + metric.text(found["mean"], found["interval"])


def introduced(result: dict) -> tuple[str, str]:
    """What was trained, and what of it was measured how, in words."""
    facts, budget, threads = result["protocol"], result["budget"], result["threads"]
    ways = f"{facts['ways']}-way " if facts["ways"] else ""
    each = f"{budget['seconds']:g} s" if "seconds" in budget else f"{budget['iterations']} iterations"
    seen = f" ({facts['overlap']})" if facts.get("overlap") else ""
    return (
        f"{', '.join(filter(None, (facts['data'], facts['question'])))}, {ways}{facts['shots']}-shot, "
        f"{facts['model']}: "
        f"{each} of training each on {result['device']}"
        + (f", {threads} thread{'s' * (threads > 1)}" if result["device"] == "cpu" else ""),
        f"{result['measured']} on the same {result['tasks']} unseen tasks{seen}, {told(facts)}, ± 95 % interval over "
        f"{'the groups' if 'groups' in facts else 'tasks'}; one training run "
        f"each (seed {result['seed']})",
    )


def describe(result: dict) -> str:
    """The result as text: what was measured, the tables, the cosines."""
    metric, what = metric_in(result), result["measured"]
    heading = ["", f"after {result['steps']} steps", "from FOMAML", "iterations", "seconds", "tasks/s"]
    lines = [[*heading, "peak MB", "gradients/task"]]
    good = [row for row in result["rows"] if "failed" not in row]
    for row in good:
        peak, products = row["peak_memory_mb"], row["hessian_products_per_task"]
        lines.append(
            [
                row["name"],
                cell(row, metric),
                cell(row.get("difference"), metric, signed=True),
                str(row["iterations"]),
                f"{row['seconds']:.0f}",
                f"{row['tasks_per_second']:.0f}",
                "?" if peak is None else f"{peak:.0f}",
                f"{row['gradients_per_task']}" + (f" + {products} Hv" if products else ""),
            ]
        )
    text = [*introduced(result), ""]
    if good:
        curves = [[f"{what} by inner steps", *good[0]["curve"]]]
        curves += [[row["name"], *(cell(e, metric) for e in row["curve"].values())] for row in good]
        text += [
            align(lines),
            "",
            f"Difference from FOMAML: paired. Peak MB: {good[0]['memory']} during training. Gradients/task: of an "
            "outer step;",
            "Hv: Hessian-vector products.",
            "",
            align(curves),
        ]
    text += [f"{row['name']} FAILED: {row['failed']}" for row in result["rows"] if "failed" in row]
    if result["cosines"]:
        pairs = [[str(c["iteration"]), f"{c['cosine']:.4f}"] for c in result["cosines"]]
        text += [
            "",
            "What does first order leave out? The cosine of FOMAML's and MAML's meta-gradient on "
            "the same tasks,",
            "along FOMAML's training",
            align([["iteration", "cosine"], *pairs]),
        ]
    return "\n".join(text) + "\n"


def _pace(row: dict) -> str:
    return f"{row['seconds']:.1f} s, {row['tasks_per_second']:.0f} tasks/s"
