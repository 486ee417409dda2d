"""Does a module of one's own go with this library? Tries it; says in plain words what would go wrong, and the cure."""

from __future__ import annotations

import copy
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fomaml.algorithms import FOMAML
from fomaml.engines import ENGINES, meta_gradient
from fomaml.engines.choose import choose
from fomaml.errors import InputError, positive
from fomaml.load import short
from fomaml.models import BatchNorm, normalising
from fomaml.tasks import Examples, Task, chunks, count, one

TASKS, DIRECTIONS = 2, 3
# Of a step in a random direction of length 1. At 1e-5 a third of all directions crossed a kink of Conv4's max-pools,
# where φ jumps, at 1e-6 none of 40; at 1e-7 rounding shows in the fourth digit.
EPS = 1e-7
# The largest relative error of a gradient that counts as rounding; a float64 module may compute parts in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
LOOP, INPLACE = "engine='loop'", "compute a new tensor in forward, and use that"
READ = "read parameters in forward, as self.weight, not from a list or cache; keep no state on self"
SDPA = "with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH): around it, or first order"
CUDNN = "with torch.backends.cudnn.flags(enabled=False): around it, or first order"
DOUBLE = "first order; torch.autograd.gradgradcheck finds the layer whose double backward is wrong"
# part of torch's message: (the reason in plain words, the cure)
REASONS = {
    "data-dependent": ("its forward branches on the values of a tensor", f"{LOOP}, or torch.where"),
    ".item()": ("its forward takes a number out of a tensor", f"{LOOP}, or keep it a tensor"),
    "scaled_dot_product": ("the fused attention kernel has no double backward", SDPA),
    "rnn_backward": ("the fused recurrent kernel has no double backward", CUDNN),
    "Batching rule not": ("vmap has no rule for one of its operations; recurrent layers have none", LOOP),
    "setup_context": ("vmap does not take its autograd.Function", f"{LOOP}, or write setup_context"),
    "inplace arithmetic": (
        "its forward writes in place into what all tasks share",
        f"{LOOP}, or torch.stack",
    ),
    "modified by an inplace": ("its forward changes in place what the backward needs", INPLACE),
}
# kind: (level, what, cure), for findings that end in a list of names
KINDS = {
    "frozen": ("note", "frozen, neither adapted nor meta-learned", "requires_grad_(True), if they should learn"),
    "tied": ("note", "tied, adapted and meta-learned as one tensor", ""),
    "leaking": ("wrong",
        "batch norms with running statistics that meta-training never updates (in train mode they use the batch's, "
        "so query examples inform each other; in eval mode, statistics that were never learned)",
        "fomaml.convert_batch_norm(model, statistics=...) with 'batch', 'support', 'running', 'per-step' or 'frozen'; "
        "then learner.adapt(support, inductive=True) serves single examples"),
    "eval": ("note", "in eval mode, running statistics are used as they are, by", ""),
    "batch": ("note", "statistics of the batch, so query examples inform each other, in",
        "fomaml.convert_batch_norm(model, 'support') or learner.adapt(support, inductive=True), if unwanted"),
    "recurrent": ("note", "on CUDA, cuDNN has no double backward for", CUDNN),
    "moved": ("wrong", "forward changes parameters in place, and so the meta-model in every task", INPLACE),
    "buffers": ("note", "buffers that forward changes; each task starts from the meta-model's, which stay", ""),
    "assigned": ("note", "buffers that forward assigns, so that their change is lost after each inner step",
        "change them in place, self.name.copy_(...)"),
    "dropout": ("note", "dropout is active, a mask of its own in each task and step, in evaluation too (compared "
        "without it)", "model.eval() before evaluate and adapt"),
    "stale": ("wrong", "computed from parameters before forward, so adapted ones do not reach it", READ),
    "bypassed": ("wrong", "used, but no gradient reaches, so never learned",
        "no .data, .detach(), rounding or torch.no_grad on the way; or requires_grad_(False), if meant so"),
    "cached": ("wrong", "never read, but the module holds a copy, which never learns", READ),
    "unused": ("note", "unused, no output depends on", "delete them, or freeze them"),
    "strange": ("wrong", "learnable tensors that are no parameters of the module, so never learned, of shape",
        "nn.Parameter; nn.ModuleList or nn.ParameterList in place of a list"),
}  # fmt: skip


class Finding(NamedTuple):
    """level: "ok", "note", "wrong" (it would be silent) or "refused" (an error says so). cure: may be empty."""

    level: str
    what: str
    cure: str = ""


@dataclass(frozen=True)
class Report:
    """What `check` found about its subject; exit_status is 1 if something would be silently wrong, else 0."""

    subject: str
    findings: list[Finding]

    @property
    def exit_status(self) -> int:
        return int(any(finding.level == "wrong" for finding in self.findings))

    def facts(self) -> dict:
        """The same as JSON-able facts."""
        findings = [finding._asdict() for finding in self.findings]
        return {"subject": self.subject, "findings": findings, "exit_status": self.exit_status}

    def text(self) -> str:
        """A heading, a marked line per finding with the cure beneath it, the conclusion."""
        lines = [self.subject, ""]
        for level, what, cure in self.findings:
            lines += _wrap(what, f"{'WRONG' if level == 'wrong' else level:9}")
            lines += _wrap(cure, f"{'':9}→ ") if cure else []
        levels = [finding.level for finding in self.findings]
        last = f"Nothing would be silently wrong ({_plural(levels.count('note'), 'note')}, "
        last += f"{levels.count('refused')} refused)."
        if self.exit_status:
            last = f"{_plural(levels.count('wrong'), 'thing')} would be silently wrong: see WRONG above."
        return "\n".join([*lines, "", last])


class _Trial(NamedTuple):
    """A module that is only ever copied, tasks for it, and how to learn them."""

    model: nn.Module
    tasks: Task
    criterion: Callable[[Tensor, Tensor], Tensor]
    inner_lr: float
    inner_steps: int
    seed: int
    random: bool = False

    def copy(self, name: str = "", value: Tensor | None = None) -> nn.Module:
        """A copy, with a value written into the parameter `name`."""
        model = copy.deepcopy(self.model)
        if name:
            with torch.no_grad():
                model.get_parameter(name).copy_(value)
        return model

    def outputs(
        self, model: Callable[[Tensor], Tensor], inputs: Tensor | None = None, seed: int = 0
    ) -> Tensor:
        torch.manual_seed(self.seed + seed)
        return model(self.tasks.support.inputs[0] if inputs is None else inputs)

    def each(self) -> Iterator[Task]:
        return (one(self.tasks, index) for index in range(count(self.tasks)))

    def is_random(self) -> bool:
        return _differ(self.outputs(self.copy()), self.outputs(self.copy(), seed=1))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(_learned(self.model).values())).dtype

    def learner(self, first_order: bool = True):
        choices = {"criterion": self.criterion, "first_order": first_order}
        return FOMAML(self.copy(), self.inner_lr, self.inner_steps, **choices)

    def gradient(self, engine: str, first_order: bool) -> tuple[dict[str, Tensor], list[str]]:
        """The meta-gradient, and the names of what computing it changed in the meta-model."""
        learner = self.learner(first_order)
        before = _values(learner.model.state_dict())
        torch.manual_seed(self.seed)
        gradients = meta_gradient(learner, self.tasks, engine=engine).gradients
        return gradients, [n for n, t in learner.model.state_dict().items() if _differ(t, before[n])]


def check(
    model: nn.Module,
    shape: Sequence[int],
    *,
    vocabulary: int | None = None,
    ways: int = 5,
    shots: int = 2,
    query_shots: int = 3,
    inner_steps: int = 3,
    inner_lr: float = 0.01,
    seed: int = 0,
    name: str | None = None,
) -> Report:
    """Try a module, in the mode it is in, on two random tasks. It is copied, never changed.

    FOMAML's gradient is compared with a plain loop in float64, dropout off; second order with central
    differences of that loop's query loss in random directions, by their median, as a direction may cross
    a kink of a ReLU or of a max-pool.

    shape: of one input. Inputs are normal random numbers (examples, *shape) of the module's dtype or,
        with a vocabulary, int64 below it. Outputs that are not (examples, at least 2) make it a regression.
    name: of the module, for the heading.

    Raises:
        InputError: numbers that are not positive, or a module that does not run on this shape.
    """
    counts = {"ways": ways, "shots": shots, "query_shots": query_shots, "inner_steps": inner_steps}
    for what, number in [*counts.items(), *(("a size of the input", size) for size in shape)]:
        positive(what, number, integer=True)
    mode = "train" if model.training else "eval"
    heading = f"{name or type(model).__name__} in {mode} mode, inputs {tuple(shape)}, {ways}-way {shots}-shot"
    heading += f", {_plural(inner_steps, 'inner step')} of {positive('inner_lr', inner_lr):g}"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        stale = [name for name, tensor in _plain_tensors(model) if tensor.grad_fn is not None]
        if stale:  # such a module cannot even be copied
            return Report(heading, list(_kinds({"stale": stale})))
        inputs = [_inputs(model, (TASKS, ways * n, *shape), vocabulary) for n in (shots, query_shots)]
        outputs = _first_outputs(model, inputs[0][0])
        learning = *_targets(inputs, outputs, ways), inner_lr, inner_steps, seed
        trial = _Trial(_without_dropout(model), *learning)
        trial = trial._replace(random=trial.is_random())
        return Report(heading, list(_findings(_Trial(model, *learning), trial, outputs, ways)))


def _findings(own: _Trial, trial: _Trial, outputs: Tensor, ways: int) -> Iterator[Finding]:
    """own: the module as it is. trial: with dropout off."""
    parameters = list(own.model.parameters())
    count = f"{sum(p.numel() for p in parameters):,} parameters"
    yield Finding("ok", f"{count} in {_plural(len(parameters), 'tensor')}")
    yield _width(outputs, ways)
    yield from _kinds(_layers(own))
    if not outputs.isfinite().all():
        yield Finding("wrong", "the outputs are not finite; nothing else was tried", "look at the forward")
    elif not outputs.requires_grad:
        yield Finding(
            "wrong", "no gradient reaches any parameter", "no torch.no_grad or .detach() in forward"
        )
    else:
        yield from _state(trial)
        yield from _randomness(trial)
        exact, note = _widened(trial)
        yield from note
        expected, reached = _reference(exact)
        yield from _kinds(_unreached(exact, reached))
        yield from _engines(own, trial, exact, expected)


def _kinds(found: Mapping[str, list[str]]) -> Iterator[Finding]:
    for kind, names in found.items():
        if names:
            level, what, cure = KINDS[kind]
            yield Finding(level, f"{what}: {_names(names)}", cure)


# --- what needs no gradient -------------------------------------------------------------------------


def _width(outputs: Tensor, ways: int) -> Finding:
    if _is_regression(outputs):
        return Finding("note", f"outputs {tuple(outputs.shape[1:])} per example: tried as a regression")
    width = outputs.shape[1]
    if width < ways:
        cure = f"a last layer of at least {ways} outputs, or {width} ways, as tried here"
        return Finding("refused", f"{width} outputs are too few for {ways} ways", cure)
    return Finding("ok", f"{width} outputs for {ways} ways")


def _layers(own: _Trial) -> dict[str, list[str]]:
    """The names of parameters and layers by kind of finding."""
    model = own.model
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    layers = [(f"{type(m).__name__} {n}".strip(), m) for n, m in model.named_modules()]
    running = [(n, m) for n, m in layers if isinstance(m, _NormBase) and m.running_mean is not None]
    batch = [n for n, m in layers if isinstance(m, _BatchNorm) and m.running_mean is None]
    return {
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "tied": [" = ".join(names) for names in groups.values() if len(names) > 1],
        "leaking": [n for n, m in running if m.training],
        "eval": [n for n, m in running if not m.training],
        "batch": batch + [n for n, m in layers if isinstance(m, BatchNorm) and m.statistics == "batch"],
        "recurrent": [n for n, m in layers if isinstance(m, nn.RNNBase)],
        "dropout": [n for n, m in layers if _drops(m)] if own.is_random() else [],
    }


def _state(trial: _Trial) -> Iterator[Finding]:
    """What one forward pass leaves behind."""
    model = trial.copy()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    before, versions = _values(parameters | buffers), {n: p._version for n, p in parameters.items()}
    norms = [n for n, m in model.named_modules() if isinstance(m, _NormBase)]
    first = trial.outputs(model)
    moved = [n for n, p in parameters.items() if p._version != versions[n] or _differ(p, before[n])]
    changed = [n for n, b in buffers.items() if _differ(b, before[n]) and n.rpartition(".")[0] not in norms]
    assigned = [n for n, b in model.named_buffers() if b is not buffers.get(n)]
    yield from _kinds({"moved": moved, "buffers": changed, "assigned": assigned})
    if _differ(first, trial.outputs(lambda inputs: functional_call(model, before, (inputs,)))):
        what = "forward keeps state on self that is no buffer: one task leaks into the next"
        yield Finding("wrong", what, "register_buffer for what changes; no counters or caches on self")


def _randomness(trial: _Trial) -> Iterator[Finding]:
    if trial.random:
        yield Finding("note", "forward draws random numbers of its own: only the loop can be compared")
    elif not any(isinstance(m, (BatchNorm, _BatchNorm)) for m in trial.model.modules()):
        inputs = trial.tasks.support.inputs[0]
        half = len(inputs) // 2  # the last half: what a recurrent layer gives depends on what came before
        if _differ(trial.outputs(trial.copy())[half:], trial.outputs(trial.copy(), inputs[half:]), 1e-3):
            what = "an example's outputs depend on the other examples, and there is no batch norm"
            yield Finding("note", what, "batch_first=True, if a layer takes the examples for time steps")


# --- what gradients tell ----------------------------------------------------------------------------


def _reference(trial: _Trial) -> tuple[dict[str, Tensor], set[str]]:
    """FOMAML's gradient the plainest way, copy, descend, differentiate, and the names that any gradient reached.

    No torch.func and nothing of this library, but that its `BatchNorm` is told the inner step.
    """
    torch.manual_seed(trial.seed)
    totals, reached = {name: torch.zeros_like(p) for name, p in _learned(trial.model).items()}, set()
    for task in trial.each():
        model = _descend(trial, trial.copy(), task, reached)
        for name, gradient in _gradients(_query_loss(trial, model, task), model, reached).items():
            totals[name] += gradient / count(trial.tasks)
    return totals, reached


def _descend(trial: _Trial, model: nn.Module, task: Task, reached: set[str]) -> nn.Module:
    for step in range(trial.inner_steps):
        with normalising(step=step):
            loss = trial.criterion(model(task.support.inputs), task.support.targets)
        gradients = _gradients(loss, model, reached)
        with torch.no_grad():
            for name, parameter in _learned(model).items():
                parameter -= trial.inner_lr * gradients[name]
    return model


def _query_loss(trial: _Trial, model: nn.Module, task: Task) -> Tensor:
    first, inputs = None, task.query.inputs
    if any(isinstance(m, BatchNorm) and m.statistics == "support" for m in model.modules()):
        first, inputs = len(task.support.inputs), torch.cat([task.support.inputs, task.query.inputs])
    with normalising(first=first, step=trial.inner_steps):
        return trial.criterion(model(inputs)[first:], task.query.targets)


def _gradients(loss: Tensor, model: nn.Module, reached: set[str]) -> dict[str, Tensor]:
    own = _learned(model)
    found = dict(zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True)))
    reached |= {name for name, gradient in found.items() if gradient is not None and gradient.any()}
    return {name: torch.zeros_like(own[name]) if g is None else g for name, g in found.items()}


def _unreached(trial: _Trial, reached: set[str]) -> dict[str, list[str]]:
    """The names of parameters that do not learn, and the shapes of tensors that should be parameters."""
    model = trial.copy()
    outputs = trial.outputs(model)
    found: dict[str, list[str]] = {"bypassed": [], "cached": [], "unused": []}
    for name, own in _learned(trial.model).items():
        if name not in reached:
            moved = _differ(trial.outputs(trial.copy(name, own + torch.randn_like(own))), outputs)
            same = any(t.shape == own.shape and not _differ(t, own) for _, t in _plain_tensors(model))
            found["bypassed" if moved else "cached" if same else "unused"].append(name)
    own = {id(parameter) for parameter in model.parameters()}
    return found | {"strange": [f"{tuple(leaf.shape)}" for leaf in _leaves(outputs) if id(leaf) not in own]}


def _unread(trial: _Trial) -> str:
    """The parameters that forward reads elsewhere than from its modules, where adapted ones cannot be put."""
    unread, inputs = [], trial.tasks.support.inputs[0]
    for name, own in _learned(trial.model).items():
        value = own.detach() + torch.randn_like(own)
        torch.manual_seed(trial.seed)
        put = functional_call(trial.copy(), {name: value}, (inputs,))
        unread += [name] if _differ(trial.outputs(trial.copy(name, value)), put) else []
    return f"; forward does not read its current {_names(unread)}" if unread else ""


def _engines(own: _Trial, trial: _Trial, exact: _Trial, expected: dict[str, Tensor]) -> Iterator[Finding]:
    """Each engine in both orders, and which of them `engine="auto"` takes."""

    def first(gradients: dict[str, Tensor]) -> tuple[str, str]:
        error = _error(gradients, expected)
        if error <= TOLERANCE.get(exact.dtype, 0.1):
            size = f"to {error:.0e}" if error else "bit for bit"
            return "ok", f"equals the plain reference {size} in {str(exact.dtype)[6:]}"
        return "wrong", f"differs from the plain reference by {error:.1g}{_unread(exact)}"

    # finite differences are slow, and two steps of one task hold all there is to get wrong
    brief = exact._replace(tasks=next(chunks(exact.tasks, 1)), inner_steps=min(2, exact.inner_steps))
    levels = {}
    for first_order, wide, judge in ((True, exact, first), (False, brief, _second_order(brief))):
        cure = READ if first_order or levels["loop", True] == "wrong" else DOUBLE
        for engine in ENGINES if first_order else ("loop", "batched"):
            finding = _engine(own, trial, wide, engine, first_order, judge)
            levels[engine, first_order] = finding.level
            wrong = finding.level == "wrong"
            yield finding._replace(cure=finding.cure or cure) if wrong else finding
            cure = cure if wrong or engine != "loop" else LOOP
    name, why = choose(trial.learner(), trial.tasks)
    level = levels[name, True]
    if level in ("ok", "note"):
        yield Finding("ok", f"engine='auto' takes {name!r}: {why}")
    elif levels["loop", True] in ("ok", "note"):
        yield Finding(level, f"engine='auto' takes {name!r}, see above", LOOP)


def _engine(own: _Trial, trial: _Trial, exact: _Trial, engine: str, first_order: bool, judge) -> Finding:
    """Run it in the module's own dtype, with dropout and without; judge the gradient in the wider one."""
    what, when = f"{'first' if first_order else 'second'} order, {engine}", ""
    try:
        own._replace(inner_steps=1).gradient(engine, first_order)
        if any(map(_drops, own.model.modules())):
            when = " with dropout off"
            trial._replace(inner_steps=1).gradient(engine, first_order)
        gradients, moved = exact.gradient(engine, first_order)
    except Exception as error:
        plain = short(error), "" if isinstance(error, InputError) or engine == "loop" else LOOP
        text, cure = next((known for part, known in REASONS.items() if part in str(error)), plain)
        return Finding("refused", f"{what}{when}: {text}", cure)
    if moved:
        return Finding("wrong", f"{what}: a task's steps change the meta-model's {_names(moved)}", INPLACE)
    if exact.random and engine != "loop":
        return Finding("note", f"{what}: runs, not compared (random)")
    level, text = judge(gradients)
    return Finding(level, f"{what}: {text}")


def _second_order(trial: _Trial):
    """The judge of second-order gradients by central differences, or one that says why these would mean nothing."""
    if trial.dtype != torch.float64:
        return lambda gradients: ("note", "runs, not compared (finite differences need float64)")
    directions = []
    for _ in range(DIRECTIONS):
        random = {name: torch.randn_like(p) for name, p in _learned(trial.model).items()}
        norm = sum(r.square().sum() for r in random.values()).sqrt()
        directions.append({name: r / norm for name, r in random.items()})
    slopes = _slopes(trial, directions)
    # what second order adds to first order is the measure: it may be small beside the gradient
    scale = max(_apart(slopes, _along(_reference(trial)[0], directions)), 1e-3 * _apart(slopes))
    still = trial._replace(inner_steps=0)
    if _apart(_slopes(still, directions), _along(_reference(still)[0], directions)) > 0.001 * scale:
        why = "autograd's gradient is not the slope of the loss: something detached, rounded or in float32"
        return lambda gradients: ("note", f"runs, not compared ({why})")

    def judge(gradients: dict[str, Tensor]) -> tuple[str, str]:
        error = _apart(slopes, _along(gradients, directions)) / scale
        if error <= 0.002:
            return "ok", f"equals finite differences to {error:.0e} (the median of {DIRECTIONS} directions)"
        return "wrong", f"what it adds to first order is off by {error:.1g} from finite differences"

    return judge


def _slopes(trial: _Trial, directions: list[dict[str, Tensor]]) -> list[float]:
    """Central differences of the query loss after the inner steps, the mean over the tasks."""

    def loss(direction: dict[str, Tensor], step: float) -> float:
        start = trial.copy()
        with torch.no_grad():
            for name, parameter in _learned(start).items():
                parameter.add_(direction[name], alpha=step)
        torch.manual_seed(trial.seed)
        total = 0.0
        for task in trial.each():
            model = _descend(trial, copy.deepcopy(start), task, set())
            total += _query_loss(trial, model, task).item()
        return total / count(trial.tasks)

    return [(loss(d, EPS) - loss(d, -EPS)) / (2 * EPS) for d in directions]


def _along(gradients: Mapping[str, Tensor], directions: list[dict[str, Tensor]]) -> list[float]:
    return [sum((gradients[n] * d).sum().item() for n, d in direction.items()) for direction in directions]


def _apart(these: list[float], those: list[float] | None = None) -> float:
    return median(abs(a - b) for a, b in zip(these, those or [0.0] * len(these)))


def _error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference relative to the largest entry of its tensor, or to 1e-4 of the largest of all: a
    bias before a batch norm has a gradient of rounding errors alone."""
    sizes = {name: tensor.abs().max().item() for name, tensor in expected.items()}
    floor = 1e-4 * max(sizes.values()) or 1.0
    return max((found[n] - t).abs().max().item() / max(sizes[n], floor) for n, t in expected.items())


# --- the trial --------------------------------------------------------------------------------------


def _inputs(model: nn.Module, shape: tuple[int, ...], vocabulary: int | None) -> Tensor:
    parameters = list(model.parameters())
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        raise InputError("the module has lazy parameters without a shape; run it once on a batch before")
    floating = [p for p in parameters if p.is_floating_point() and p.requires_grad]
    if not floating:
        raise InputError("the module has no parameter that requires gradients: there is nothing to learn")
    if vocabulary is None:
        return torch.randn(shape).to(floating[0])
    return torch.randint(positive("vocabulary", vocabulary, integer=True), shape).to(floating[0].device)


def _first_outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of the module as it is; InputError unless it runs and returns one tensor, a row per example."""
    given = f"{str(inputs.dtype)[6:]} inputs {tuple(inputs.shape)}"
    try:
        outputs = copy.deepcopy(model)(inputs)
    except Exception as error:
        raise InputError(f"the module does not run on {given}: {short(error)}") from None
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = f"{outputs.dtype} tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"the module must return one floating tensor, not a {kind}")
    if outputs.shape[:1] != inputs.shape[:1]:
        raise InputError(f"{given} gave outputs {tuple(outputs.shape)}; expected {len(inputs)} rows")
    return outputs


def _targets(inputs: list[Tensor], outputs: Tensor, ways: int):
    """Tasks of these inputs and their criterion, by the kind of the outputs."""
    if _is_regression(outputs):
        targets = [torch.randn(*i.shape[:2], *outputs.shape[1:]).to(outputs) for i in inputs]
        return Task(*map(Examples, inputs, targets)), F.mse_loss
    width = min(ways, outputs.shape[1])
    targets = [(torch.arange(i.shape[1], device=i.device) % width).expand(i.shape[:2]) for i in inputs]
    return Task(*map(Examples, inputs, targets)), F.cross_entropy


def _is_regression(outputs: Tensor) -> bool:
    return outputs.dim() != 2 or outputs.shape[1] < 2


def _widened(trial: _Trial) -> tuple[_Trial, list[Finding]]:
    """The trial in float64, or as it is and a note where the module does not take that."""
    try:
        exact = trial._replace(model=trial.copy().double(), tasks=trial.tasks.to(dtype=torch.float64))
        dtype = exact.outputs(exact.copy()).dtype
        if dtype != torch.float64:
            raise TypeError(f"its outputs stay {dtype}")
        return exact, []
    except Exception as error:
        what = f"does not run in float64, so compared in {str(trial.dtype)[6:]}, more loosely: {short(error)}"
        return trial, [Finding("note", what)]


def _drops(module: nn.Module) -> bool:
    """Whether a layer draws a dropout mask; recurrent and attention layers hold the rate themselves."""
    rate = getattr(module, _rate(module), 0.0)
    return module.training and isinstance(rate, float) and rate > 0


def _rate(module: nn.Module) -> str:
    return "p" if isinstance(module, nn.modules.dropout._DropoutNd) else "dropout"


def _without_dropout(model: nn.Module) -> nn.Module:
    """A copy with all rates at 0; not in eval mode, which changes other things too."""
    model = copy.deepcopy(model)
    for module in filter(_drops, model.modules()):
        setattr(module, _rate(module), 0.0)
    return model


def _learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that modules hold, themselves or in a list, neither as parameters nor as buffers."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            for held in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(held, Tensor) and not isinstance(held, nn.Parameter):
                    yield f"{prefix}.{name}".lstrip("."), held


def _leaves(outputs: Tensor) -> list[Tensor]:
    """The tensors that a backward pass would give a gradient to."""
    todo, seen, leaves = [outputs.grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            todo += [following for following, _ in node.next_functions]
    return leaves


def _differ(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return a.shape != b.shape or not torch.allclose(
        a, b.to(a), rtol=tolerance, atol=tolerance, equal_nan=True
    )


# --- words ------------------------------------------------------------------------------------------


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _wrap(text: str, lead: str) -> list[str]:
    indent = " " * len(lead)
    return textwrap.wrap(text, 110, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)


# --- a module by name -------------------------------------------------------------------------------
