"""A module to be tried: copies of it, random tasks of the shapes it takes, the dtype it is judged in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.check.findings import Finding
from fomaml.engines import meta_gradient
from fomaml.errors import InputError, in_one_line, positive
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.contracts import Output
from fomaml.learning.forward import Forward
from fomaml.learning.learner import MetaLearner
from fomaml.learning.mistakes import described, selected
from fomaml.learning.replica import Replicas
from fomaml.models import NATIVE_NORMS
from fomaml.tasks import Examples, Task, count, first, one
from fomaml.trees import Tree, as_tree, call, joined, leaves, mapped


class Trial(NamedTuple):
    """A module that is only ever copied, tasks for it, and how to learn them.

    judged: by what, `criterion`, `loss` and `output` of a learner.
    """

    model: nn.Module
    tasks: Task
    judged: Mapping[str, Any]
    inner_lr: float
    inner_steps: int
    seed: int
    random: bool = False

    def copy(self, name: str = "", value: Tensor | None = None) -> nn.Module:
        """A copy, with a value written into the parameter `name` where there is one."""
        model = Replicas(self.model).duplicate()
        if value is not None:
            with torch.no_grad():
                model.get_parameter(name).copy_(value)
        return model

    @property
    def inputs(self) -> Tree:
        """Those of the first support set."""
        return mapped(itemgetter(0), self.tasks.support.inputs)

    def outputs(self, model: Callable[..., Any], inputs: Tree | None = None, seed: int = 0) -> Tensor:
        """All that is judged of what the model returns, in one tensor; a row for each example where it has rows."""
        torch.manual_seed(self.seed + seed)
        inputs = self.inputs if inputs is None else inputs
        return rows(self.picked(call(model, inputs)), len(first(inputs)))

    def picked(self, returned: Any) -> Tree:
        found = selected(returned, self.judged["output"])
        if self.judged["loss"] is not None:
            return tensors_of(found)
        return found if isinstance(found, Tensor) else as_tree(found, as_number, "outputs")

    def loss(self, model: nn.Module, examples: Examples, before: Tree | None = None) -> Tensor:
        """The loss of examples. before: inputs that go through the model before them, in one batch."""
        if self.judged["loss"] is not None:
            return self.judged["loss"](Forward(model, model, examples.inputs), examples)
        inputs = examples.inputs if before is None else joined([before, examples.inputs])
        returned = call(model, inputs)
        if before is None:  # the model's own object, as the learner's criterion gets it
            return self.judged["criterion"](selected(returned, self.judged["output"]), examples.targets)
        found = mapped(itemgetter(slice(len(first(before)), None)), self.picked(returned))
        return self.judged["criterion"](found, examples.targets)

    def each(self) -> Iterator[Task]:
        return (one(self.tasks, index) for index in range(count(self.tasks)))

    def is_random(self) -> bool:
        return differ(self.outputs(self.copy()), self.outputs(self.copy(), seed=1))

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(learned(self.model).values())).dtype

    def learner(self, first_order: bool = True) -> MetaLearner:
        judged = {name: value for name, value in self.judged.items() if value is not None}
        return FOMAML(self.copy(), self.inner_lr, self.inner_steps, first_order=first_order, **judged)

    def gradient(self, engine: str, first_order: bool) -> tuple[dict[str, Tensor], list[str]]:
        """The meta-gradient, and the names of what computing it changed in the meta-model."""
        learner = self.learner(first_order)
        before = snapshot(learner.model.state_dict())
        torch.manual_seed(self.seed)
        found = meta_gradient(learner, self.tasks, engine=engine).gradients
        # sparse ones are those of nn.Embedding(sparse=True)
        gradients = {name: gradient.to_dense() for name, gradient in found.items()}
        return gradients, [n for n, t in learner.model.state_dict().items() if differ(t, before[n])]


def check_learns(model: nn.Module) -> Tensor:
    """A parameter that learns; InputError where there is none, or one without a shape."""
    parameters = list(model.parameters())
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in parameters):
        raise InputError("the module has lazy parameters without a shape; run it once on a batch before")
    floating = [p for p in parameters if p.is_floating_point() and p.requires_grad]
    if not floating:
        raise InputError("the module has no parameter that requires gradients: there is nothing to learn")
    return floating[0]


def draw_inputs(like: Tensor, shape: tuple[int, ...], vocabulary: int | None) -> Tensor:
    if vocabulary is None:
        return torch.randn(shape).to(like)
    return torch.randint(positive("vocabulary", vocabulary, integer=True), shape).to(like.device)


def first_outputs(model: nn.Module, inputs: Tree, output: Output = None, has_loss: bool = False) -> Tree:
    """The outputs of the module as it is; InputError unless it runs and returns tensors, a row per example.

    has_loss: a loss takes what it returns, which may then be any object that holds tensors.
    """
    given = " and ".join(f"{str(leaf.dtype)[6:]} inputs {tuple(leaf.shape)}" for leaf in leaves(inputs))
    try:
        found = selected(call(Replicas(model).duplicate(), inputs), output)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the module does not run on {given}: {in_one_line(error)}") from None
    if has_loss:
        return tensors_of(found)
    if not isinstance(found, Tensor | Mapping | list | tuple):
        raise InputError(
            f"the module must return one floating tensor, not {described(found)}: give output=, the part that is judged"
        )
    if not isinstance(found, Tensor):
        found = as_tree(found, as_number, "outputs")
    for leaf in leaves(found):
        if not leaf.is_floating_point():
            raise InputError(f"the module must return one floating tensor, not a {leaf.dtype} tensor")
        if isinstance(found, Tensor) and leaf.shape[:1] != first(inputs).shape[:1]:
            raise InputError(f"{given} gave outputs {tuple(leaf.shape)}; expected {len(first(inputs))} rows")
    return found


def tensors_of(returned: Any) -> Tree:
    """The floating tensors of what a model returns, whatever else it holds, as an object of the user's own does.

    Raises:
        InputError: there are none.
    """
    if isinstance(returned, Tensor):
        return returned
    found: dict[str, Tensor] = {}

    def look(value: Any, place: str) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found[place] = value
        elif isinstance(value, Mapping | list | tuple):
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, part in parts:
                look(part, f"{place}.{key}")
        elif place == "" or hasattr(value, "__dataclass_fields__"):
            for key, part in getattr(value, "__dict__", {}).items():
                look(part, f"{place}.{key}")

    look(returned, "")
    if not found:
        raise InputError(f"the module returns {described(returned)}, in which there is no floating tensor")
    return found


def as_number(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    raise InputError(
        f"the module must return one floating tensor, or several; {name} is a {type(value).__name__}: give output="
    )


def rows(outputs: Tree, number: int) -> Tensor:
    """One tensor of all outputs, a row for each of so many examples where each of them has such rows."""
    if isinstance(outputs, Tensor):
        return outputs
    found = leaves(outputs)
    if all(leaf.shape[:1] == (number,) for leaf in found):
        return torch.cat([leaf.reshape(number, -1) for leaf in found], 1)
    return torch.cat([leaf.flatten() for leaf in found])


def draw_tasks(inputs: list[Tensor], outputs: Tensor, ways: int):
    """Tasks of these inputs and their criterion, by the kind of the outputs."""
    if is_regression(outputs):
        targets = [torch.randn(*i.shape[:2], *outputs.shape[1:]).to(outputs) for i in inputs]
        return Task(*map(Examples, inputs, targets)), F.mse_loss
    width = min(ways, outputs.shape[1])
    targets = [(torch.arange(i.shape[1], device=i.device) % width).expand(i.shape[:2]) for i in inputs]
    return Task(*map(Examples, inputs, targets)), F.cross_entropy


def is_regression(outputs: Tensor) -> bool:
    return outputs.dim() != 2 or outputs.shape[1] < 2


def widened(trial: Trial) -> tuple[Trial, list[Finding]]:
    """The trial in float64, or as it is and a note where the module does not take that."""
    try:
        exact = trial._replace(model=trial.copy().double(), tasks=trial.tasks.to(dtype=torch.float64))
        dtype = exact.outputs(exact.copy()).dtype
        if dtype != torch.float64:
            raise TypeError(f"its outputs stay {dtype}")
        return exact, []
    except Exception as error:
        what = f"does not run in float64, so compared in {str(trial.dtype)[6:]}, more loosely: {in_one_line(error)}"
        return trial, [Finding("note", what)]


DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip


def drops(module: nn.Module) -> bool:
    """Whether a layer draws a dropout mask; recurrent and attention layers hold the rate themselves."""
    rate = getattr(module, _rate(module), 0.0)
    return module.training and isinstance(rate, float) and rate > 0


def _rate(module: nn.Module) -> str:
    return "p" if isinstance(module, DROPOUTS) else "dropout"


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy with all rates at 0; not in eval mode, which changes other things too."""
    model = Replicas(model).duplicate()
    for module in filter(drops, model.modules()):
        setattr(module, _rate(module), 0.0)
    return model


def learned(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def computed_before(model: nn.Module, inputs: Tree) -> list[str]:
    """The names of tensors that were computed from parameters, and that a forward pass does not compute anew."""
    names = [name for name, tensor in plain_tensors(model) if tensor.grad_fn is not None]
    if not names:
        return []
    copied = Replicas(model).duplicate()
    before = dict(plain_tensors(copied))
    call(copied, inputs)
    after = dict(plain_tensors(copied))
    return [name for name in names if after.get(name) is before.get(name)]


def changed_buffers(trial: Trial) -> list[str]:
    """The names of buffers that a forward pass changes, but for the running statistics of torch's own layers."""
    model = trial.copy()
    before = snapshot(dict(model.named_buffers()))
    norms = [name for name, module in model.named_modules() if isinstance(module, NATIVE_NORMS)]
    trial.outputs(model)
    after = {name: buffer for name, buffer in model.named_buffers() if name in before}
    return [n for n, b in after.items() if differ(b, before[n]) and n.rpartition(".")[0] not in norms]


def put(model: nn.Module, tensors: Mapping[str, Tensor], *args, **kwargs) -> Any:
    """What the module returns with these tensors in place of its own."""
    buffers = {name: tensors.get(name, buffer) for name, buffer in model.named_buffers()}
    with Replicas(model).holding(tensors, buffers) as (forward, _):
        return forward(*args, **kwargs)


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that modules hold, themselves or in a list, neither as parameters nor as buffers."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            for held in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(held, Tensor) and not isinstance(held, nn.Parameter):
                    yield f"{prefix}.{name}".lstrip("."), held


def differ(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return a.shape != b.shape or not torch.allclose(
        a, b.to(a), rtol=tolerance, atol=tolerance, equal_nan=True
    )
