"""A new damped oscillator by a residual loss, in few steps: the physics table and picture of docs/results.md.

python -m runs.physics
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from fomaml import FOMAML, MAML, Examples, Reptile, Task, train
from fomaml.app.parser import option, parse
from fomaml.draws import generator
from fomaml.engines import plan
from fomaml.learning.adapt import SGD, Adam
from fomaml.learning.learner import MetaLearner
from fomaml.train import cosine, linear
from runs.study import ROOT, Parts, best, estimate, keep, table, verdict

OUT, PICTURE = ROOT / "runs" / "physics", ROOT / "docs" / "results" / "physics.png"
END, POINTS, GRID = 3.0, 24, 61
TOGETHER = 40  # tasks in a batch, and for validation and test
STEPS, ADAM_STEPS = 4, 6  # inner steps in training
GIVEN = (0.1, 0.05)  # relative errors to reach
MOST = 500  # steps that are taken
LOOKED = [*range(31), *range(35, MOST + 1, 5)]  # steps after which the error is measured
AFTER = (0, 1, 5, 20, 100)
SEEDS = range(3)
TRAINING, VALIDATION, TEST = 0, 1, 2  # seeds of the equations
# 16 trials for each: a learner has 4 step sizes in training times 4 ways to take steps, the pooled start 2 meta step
# sizes times 8 ways, and a random start 16 ways
INNER_LRS, ADAM_LRS = (0.01, 0.03, 0.1, 0.2), (0.003, 0.01, 0.03, 0.06)
EIGHT = [("GD", lr) for lr in (0.03, 0.1, 0.2)] + [("Adam", lr) for lr in (0.003, 0.01, 0.03, 0.06, 0.1)]
WAYS = {
    "learner": [("GD", 0.1), ("Adam", 0.01), ("Adam", 0.03), ("Adam", 0.06)],
    "pooled": EIGHT,
    "random": EIGHT
    + [("GD", lr) for lr in (0.01, 0.06, 0.15)]
    + [("Adam", lr) for lr in (0.001, 0.02, 0.045, 0.08, 0.15)],
}


@dataclass(frozen=True)
class Options:
    """u'' + 2ζω u' + ω² u = 0 with u(0) and u'(0): steps to a given error from FOMAML's, MAML's and Reptile's start."""

    iterations: int = option("outer steps of each training", 1500)


class Solution(nn.Module):
    """u at times (points, 1) in [0, END]. conditioned: the coefficients (points, 4) are inputs too."""

    def __init__(self, conditioned: bool = False):
        super().__init__()
        self.conditioned = conditioned
        self.body = nn.Sequential(
            *(nn.Linear(1 + 4 * conditioned, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        )
        self.head = nn.Linear(32, 1)

    def forward(self, time: Tensor, equation: Tensor) -> Tensor:
        inputs = 2 * time / END - 1
        if self.conditioned:
            inputs = torch.cat([inputs, equation], -1)
        return self.head(self.body(inputs))


def residual(forward: Callable, examples: Examples) -> Tensor:
    """The mean square of (u'' + 2ζω u' + ω² u) / ω² at the points, and those of both initial conditions."""
    inputs = examples.inputs
    damping, frequency, position, speed = inputs["equation"].T[..., None]
    time = torch.cat([torch.zeros_like(inputs["time"][:1]), inputs["time"]])
    equation = torch.cat([inputs["equation"][:1], inputs["equation"]])
    one = torch.ones_like(time)

    def with_slope(time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda t: forward(t, equation), (time,), (one,))

    (u, slope), (_, bend) = torch.func.jvp(with_slope, (time,), (one,))
    of_points = bend[1:] / frequency**2 + 2 * damping * slope[1:] / frequency + u[1:]
    at_start = (u[0] - position[0]).square() + ((slope[0] - speed[0]) / frequency[0]).square()
    return of_points.square().mean() + at_start.sum()


def solution(time: np.ndarray, equation: np.ndarray) -> np.ndarray:
    """u in closed form, which no training sees. equation: ζ < 1, ω, u(0), u'(0)."""
    damping, frequency, position, speed = equation
    own = frequency * np.sqrt(1 - damping**2)
    waves = position * np.cos(own * time) + (speed + damping * frequency * position) / own * np.sin(
        own * time
    )
    return np.exp(-damping * frequency * time) * waves


class Oscillators:
    """Equations as tasks: random points of support and query set. The targets are none."""

    def __init__(self, seed: int):
        self.seed = seed

    def equation(self, random: np.random.Generator) -> np.ndarray:
        damping, frequency = random.uniform(0.05, 0.5), random.uniform(1, 3)
        angle = random.uniform(0, 2 * np.pi)  # so that no solution is near zero
        return np.array([damping, frequency, np.cos(angle), frequency * np.sin(angle)])

    def batch(self, start: int, tasks: int) -> Task:
        times, equations = np.empty((tasks, 2 * POINTS, 1), np.float32), np.empty((tasks, 1, 4), np.float32)
        for row in range(tasks):
            random = generator(self.seed, start + row)
            equations[row], times[row] = self.equation(random), random.uniform(0, END, (2 * POINTS, 1))
        own = torch.from_numpy(equations).expand(tasks, POINTS, 4)
        sets = torch.from_numpy(times).split(POINTS, dim=1)
        return Task(*(Examples({"time": time, "equation": own}, ()) for time in sets))


class FineTuning:
    """Steps on the support sets of a batch of equations, all at once, and the errors on the way.

    The gradient is compiled once for a network, and also that of the pooled training.
    """

    def __init__(self, net: nn.Module):
        self.net = net

        def loss(parameters: dict[str, Tensor], examples: Examples) -> Tensor:
            return residual(lambda *inputs: functional_call(net, parameters, inputs), examples)

        def gradient(parameters: dict[str, Tensor], inputs: dict[str, Tensor]):
            return grad_and_value(lambda p: loss(p, Examples(inputs, ())))(parameters)

        self.gradient = torch.compile(vmap(gradient), dynamic=False)
        self.outputs = vmap(lambda parameters, *inputs: functional_call(net, parameters, inputs))

    def stacked(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.expand(TOGETHER, *value.shape).clone() for name, value in state.items()}

    def run(
        self, state: dict[str, Tensor], tasks: Task, kind: str, lr: float, most: int
    ) -> tuple[Tensor, Tensor]:
        """(looks, tasks) relative errors after each number of steps in LOOKED, and (looks, tasks, GRID) solutions."""
        own = self.stacked(state)
        optimizer = (torch.optim.Adam if kind == "Adam" else torch.optim.SGD)(own.values(), lr)
        equation = tasks.support.inputs["equation"]
        grid = np.linspace(0, END, GRID)
        exact = torch.tensor(
            np.stack([solution(grid, each) for each in equation[:, 0].double().numpy()]), dtype=torch.float32
        )
        times = torch.tensor(grid, dtype=torch.float32)[:, None].expand(TOGETHER, GRID, 1)
        conditions = equation[:, :1].expand(TOGETHER, GRID, 4)
        found = []
        for step in range(most + 1):
            if step in LOOKED:
                found.append(self.outputs(own, times, conditions).squeeze(-1))
            gradients, _ = self.gradient(own, tasks.support.inputs)
            for name, value in own.items():
                value.grad = gradients[name]
            optimizer.step()
        solutions = torch.stack(found)
        errors = (solutions - exact).norm(dim=-1) / exact.norm(dim=-1)
        return errors.nan_to_num(nan=9.0), solutions


def steps_to(errors: Tensor, given: float) -> Tensor:
    """(tasks,) the first step with an error of at most `given`; of those that never get there the steps taken."""
    reached = errors <= given
    steps = torch.tensor(LOOKED, dtype=torch.float64)
    return torch.where(reached.any(0), steps[reached.float().argmax(0)], steps[len(errors) - 1])


def fresh(conditioned: bool, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: value.detach().clone() for name, value in Solution(conditioned).named_parameters()}


class Start:
    """A way to a start: `learned(lr, seed, iterations)` gives the parameters."""

    def __init__(self, tuner: FineTuning, conditioned: bool, kind: str):
        self.tuner, self.conditioned, self.kind = tuner, conditioned, kind

    lrs: tuple[float, ...] = (0.0,)

    def learned(self, lr: float, seed: int, iterations: int) -> dict[str, Tensor]:
        return fresh(self.conditioned, seed)


class Pooled(Start):
    """One network trained on the losses of all training equations at once."""

    lrs = (1e-3, 3e-3)

    def learned(self, lr: float, seed: int, iterations: int) -> dict[str, Tensor]:
        state = fresh(self.conditioned, seed)
        optimizer = torch.optim.Adam(state.values(), lr)
        equations = Oscillators(100 + seed)
        for iteration in range(iterations):
            optimizer.param_groups[0]["lr"] = lr * cosine(iterations)(iteration)
            inputs = equations.batch(iteration * TOGETHER, TOGETHER).support.inputs
            gradients, _ = self.tuner.gradient(self.tuner.stacked(state), inputs)
            for name, value in state.items():
                value.grad = gradients[name].mean(0)
            optimizer.step()
        return {name: value.detach() for name, value in state.items()}


class Learned(Start):
    """A start that is meta-learned. One plan, compiled once, serves all step sizes and seeds: the step sizes are
    tensors of the learner ("per-step"), which the optimiser does not hold, and so stay as they are.
    """

    def __init__(self, tuner: FineTuning, make: Callable[..., MetaLearner], adam: bool = False):
        super().__init__(tuner, False, "learner")
        self.reptile = make is Reptile
        self.lrs = ADAM_LRS if adam else INNER_LRS
        steps, optimizer = (ADAM_STEPS, Adam()) if adam else (STEPS, SGD())
        own = {"loss": residual, "learn_rates": "per-step", "optimizer": optimizer}
        self.learner = make(Solution(), 0.1, steps, **own)
        self.plan = None

    def learned(self, lr: float, seed: int, iterations: int) -> dict[str, Tensor]:
        model = self.learner.model
        model.load_state_dict(fresh(self.conditioned, seed))
        with torch.no_grad():
            for rate in self.learner.inner_lr.parameters():
                rate.fill_(lr)
        equations = Oscillators(100 + seed)
        self.plan = self.plan or plan(
            self.learner, equations.batch(0, TOGETHER), engine="batched", compile=True
        )
        if self.reptile:
            optimizer, schedule = torch.optim.SGD(model.parameters(), 1.0), linear(iterations)
        else:
            optimizer, schedule = torch.optim.Adam(model.parameters(), 3e-3), cosine(iterations)
        arguments = {"iterations": iterations, "meta_batch_size": TOGETHER, "plan": self.plan}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the optimiser does not hold")
            records = train(
                self.learner, equations, optimizer, schedule=schedule, measure_every=iterations, **arguments
            )
        for _ in records:
            pass
        return {name: value.detach().clone() for name, value in model.named_parameters()}


def study(name: str, start: Start, parts: Parts, iterations: int) -> dict[str, Tensor]:
    """Per given error the (seeds, test equations) steps to it, the errors after some steps, and "shown" solutions."""
    validation, test = (Oscillators(seed).batch(0, TOGETHER) for seed in (VALIDATION, TEST))
    ways = {f"{kind} {lr}": (kind, lr) for kind, lr in WAYS[start.kind]}

    def trial(lr: float) -> dict[str, float]:
        state = start.learned(lr, 0, iterations // 4)
        found = {}
        for way, (kind, rate) in ways.items():
            errors, _ = start.tuner.run(state, validation, kind, rate, 200)
            # the area under log error: who has not got there within 200 steps counts too
            found[way] = steps_to(errors, GIVEN[-1]).mean().item() + errors.clamp(1e-3, 9).log().mean().item()
        return found

    tried = {
        f"{lr} {way}": worth
        for lr in start.lrs
        for way, worth in parts.get(f"{name} trial {lr}", lambda lr=lr: trial(lr)).items()
    }
    chosen = best(tried, -1)
    own, way = chosen.split(" ", 1)
    kind, rate = ways[way]

    def run(seed: int) -> dict:
        state = start.learned(float(own), seed, iterations)
        errors, solutions = start.tuner.run(state, test, kind, rate, MOST)
        return {
            **{f"steps to {given}": steps_to(errors, given).tolist() for given in GIVEN},
            **{f"error after {steps}": errors[LOOKED.index(steps)].tolist() for steps in AFTER},
            "shown": solutions[[0, 1, 5, 20], :3].tolist(),
        }

    runs = [parts.get(f"{name} {chosen} seed {seed}", lambda seed=seed: run(seed)) for seed in SEEDS]
    return {"chosen": chosen, **{key: torch.tensor([each[key] for each in runs]) for key in runs[0]}}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    parts = Parts(ROOT / "out" / "physics-parts.json")
    plain, conditioned = FineTuning(Solution()), FineTuning(Solution(True))
    starts = {
        "random start": Start(plain, False, "random"),
        "pooled start": Pooled(plain, False, "pooled"),
        "pooled, coefficients as inputs": Pooled(conditioned, True, "pooled"),
        "FOMAML": Learned(plain, FOMAML),
        "MAML": Learned(plain, MAML),
        "FOMAML, Adam inside": Learned(plain, FOMAML, adam=True),
        "Reptile, Adam inside": Learned(plain, Reptile, adam=True),
    }
    found = {name: study(name, start, parts, options.iterations) for name, start in starts.items()}
    report(found)
    picture({name: each["shown"][0] for name, each in found.items()})


def report(found: dict[str, dict]) -> None:
    units = {
        name: {key: value.double().mean(0) for key, value in each.items() if key not in ("chosen", "shown")}
        for name, each in found.items()
    }
    rows, differences = [], []
    for name, own in units.items():
        row = [name, *(estimate(100 * own[f"error after {steps}"]).text(0) for steps in AFTER)]
        row += [estimate(own[f"steps to {given}"]).text(0) for given in GIVEN]
        rows.append([*row, found[name]["chosen"].removeprefix("0.0 ")])
        for baseline in (each for each in units if is_baseline(each) and not is_baseline(name)):
            row = [f"{name} against {baseline}"]
            for key, scale in (("error after 5", 100), ("error after 20", 100), (f"steps to {GIVEN[-1]}", 1)):
                difference = estimate(scale * (own[key] - units[baseline][key]))
                row.append(f"{difference.text(0, '+')} {verdict(difference, -1)}")
            differences.append(row)
    heads = ["", *(f"error in % after {steps}" for steps in AFTER)]
    heads += [*(f"steps to {100 * given:.0f} %" for given in GIVEN), "chosen"]
    paired = ["difference", "of the error after 5", "after 20", f"of the steps to {100 * GIVEN[-1]:.0f} %"]
    result = {
        "seeds": len(SEEDS),
        "equations": TOGETHER,
        "chosen": {name: each["chosen"] for name, each in found.items()},
        "by equation": {
            name: {key: value.tolist() for key, value in own.items()} for name, own in units.items()
        },
    }
    keep(OUT, table(heads, rows) + "\n\n" + table(paired, differences), result)


def is_baseline(name: str) -> bool:
    return name.startswith(("random", "pooled"))


def picture(shown: dict[str, Tensor]) -> None:
    """Three test equations in rows, the starts in columns, after 0, 1, 5 and 20 steps."""
    import matplotlib.pyplot as plots

    grid = np.linspace(0, END, GRID)
    equations = Oscillators(TEST).batch(0, 3).support.inputs["equation"][:, 0].double().numpy()
    names = [name for name in shown if "coefficients" not in name]
    figure, axes = plots.subplots(3, len(names), figsize=(13, 5.4), sharex=True, sharey="row")
    for row, equation in enumerate(equations):
        for column, name in enumerate(names):
            own = axes[row, column]
            own.plot(grid, solution(grid, equation), color="black", linewidth=2.5, alpha=0.3, label="exact")
            for number, steps in enumerate((0, 1, 5, 20)):
                color = plots.cm.viridis(0.9 - 0.28 * number)
                own.plot(grid, shown[name][number, row], color=color, linewidth=1, label=f"{steps} steps")
            own.set_ylim(-1.3, 1.3)
            if not row:
                own.set_title(name, fontsize=10)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("time", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=80)
    print(f"saved {PICTURE}")


if __name__ == "__main__":
    main(parse(Options))
