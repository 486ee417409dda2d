"""Losses of any form, (forward, examples) → scalar: as a plain loop over the tasks, where an engine takes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compiling import untouched
from fomaml import (
    ANIL,
    CAVIA,
    FOMAML,
    MAML,
    BatchNorm,
    InputError,
    MetaSGD,
    Reptile,
    evaluate,
    meta_gradient,
    train,
)
from fomaml.engines import plan
from fomaml.metrics import Metric, OfModel
from fomaml.models.norms import third_order_is_refused
from fomaml.tasks import Examples, Task, stack
from shapes import Encoder, close, labels, number, same_gradients, slow

TASKS, STEPS, LR = 4, 2, 0.05


def curve() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def points(seed: int, n: int) -> Examples:
    """Points in time, and how fast the oscillator of this task is."""
    return Examples({"input": number(seed, n, 1)}, number(seed + 1, 1).abs().expand(n, 1) + 1)


def residual(forward, examples):
    """u' + k u = 0, u(0) = 1, by `torch.autograd.grad`."""
    time = examples.inputs["input"].detach().requires_grad_()
    u = forward(time)
    [slope] = torch.autograd.grad(u.sum(), time, create_graph=True)
    start = forward(torch.zeros(1, 1, dtype=time.dtype))
    return (slope + examples.targets * u).square().mean() + (start - 1).square().mean()


def residual_by_func(forward, examples):
    """The same by `torch.func`."""
    time = examples.inputs["input"]
    slope = torch.func.grad(lambda t: forward(t).sum())(time)
    start = forward(torch.zeros(1, 1, dtype=time.dtype))
    return (slope + examples.targets * forward(time)).square().mean() + (start - 1).square().mean()


def weighed(forward, examples):
    """A weight for each example, which is a part of the targets."""
    found = forward(**examples.inputs).logits
    each = F.cross_entropy(found, examples.targets["label"], reduction="none")
    return (each * examples.targets["weight"]).sum() / examples.targets["weight"].sum()


def two_heads(forward, examples):
    """Its inputs as they are, and a term of the hidden layer."""
    found = forward(**examples.inputs)
    return F.cross_entropy(found.logits, examples.targets["label"]) + found.hidden_states[0].square().mean()


def tokens(seed: int, n: int) -> Examples:
    return Examples(
        {"input_ids": labels(seed, 11, n, 7)}, {"label": labels(seed, 3, n), "weight": number(seed, n).abs()}
    )


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().double()


# module, examples, the loss, the engines that take it
ROWS = {
    "physics": (curve, points, residual, ("loop",)),
    "physics-by-func": (curve, points, residual_by_func, ("loop", "batched")),
    "weighed": (encoder, tokens, weighed, ("loop", "batched")),
    "two-heads": (encoder, tokens, two_heads, ("loop", "batched")),
}


def drawn(examples) -> list[Task]:
    return [Task(examples(10 * i, 6), examples(10 * i + 5, 4)) for i in range(TASKS)]


@pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(("row", "engine"), [(row, engine) for row in ROWS for engine in ROWS[row][3]])
def test_the_meta_gradient_is_that_of_a_plain_loop(row, engine, first_order):
    make, examples, loss, _ = ROWS[row]
    model, tasks = make(), drawn(examples)
    expected = slow(model, tasks, loss, LR, STEPS, first_order)
    learner = FOMAML(model, LR, STEPS, loss=loss, first_order=first_order)
    found = meta_gradient(learner, stack(tasks), engine=engine)
    assert found.query_outputs == ()
    same_gradients(found.gradients, expected.gradients)
    close(found.query_losses, expected.losses)


@pytest.mark.parametrize("row", ["physics", "physics-by-func", "weighed"])
def test_compiled_it_is_the_same(row, monkeypatch):
    untouched(monkeypatch)
    make, examples, loss, engines = ROWS[row]
    model, tasks = make(), drawn(examples)
    found = meta_gradient(FOMAML(model, LR, STEPS, loss=loss), stack(tasks), engine=engines[-1], compile=True)
    same_gradients(found.gradients, slow(model, tasks, loss, LR, STEPS).gradients)


@pytest.mark.parametrize("row", ROWS)
def test_auto_takes_what_takes_it(row):
    make, examples, loss, engines = ROWS[row]
    found = meta_gradient(FOMAML(make(), LR, STEPS, loss=loss), stack(drawn(examples)))
    assert found.engine == engines[-1]


def moved(forward, examples):
    time = examples.inputs["input"]
    return torch.autograd.grad(forward(time).sum(), time, create_graph=True)[0].mean()


@pytest.mark.parametrize(
    ("loss", "message"),
    [(residual, "requires_grad_ makes no leaf.*torch.func.grad"), (moved, "torch.autograd.grad")],
)
def test_what_vmap_does_not_take_names_the_cure(loss, message):
    with pytest.raises(InputError, match=f"{message}.*engine='loop'"):
        meta_gradient(FOMAML(curve(), LR, STEPS, loss=loss), stack(drawn(points)), engine="batched")
    with pytest.raises(InputError, match="takes a criterion of outputs and targets, not a loss="):
        meta_gradient(FOMAML(curve(), LR, STEPS, loss=loss), stack(drawn(points)), engine="factored")


def several_at_once(forward, examples):
    """The residual for a network that normalises by a batch: one point alone has no statistics."""
    return residual(lambda t: forward(t.expand(max(2, len(t)), 1))[: len(t)], examples)


def normed(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), norm, nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.mark.parametrize("running", [True, False])
def test_native_batch_norm_is_refused_under_vmap_and_taken_by_the_loop(running):
    tasks = drawn(points)
    learner = FOMAML(normed(nn.BatchNorm1d(8, track_running_stats=running)), LR, STEPS, loss=several_at_once)
    with pytest.raises(InputError, match=r"BatchNorm1d '1'.*engine='loop', or fomaml.convert_batch_norm"):
        meta_gradient(learner, stack(tasks), engine="batched")
    found = meta_gradient(learner, stack(tasks))
    assert found.engine == "loop"
    same = normed(nn.BatchNorm1d(8, track_running_stats=False))
    expected = slow(same, tasks, several_at_once, LR, STEPS).gradients
    del found.gradients["0.bias"], expected["0.bias"]  # nothing but rounding: the norm takes it away
    same_gradients(found.gradients, expected)


@pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_own_batch_norm_is_exact_under_derivatives_by_the_inputs(engine, first_order):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x):
            centred = x - x.mean(0)
            return centred / (centred.square().mean(0) + 1e-5).sqrt() * self.weight + self.bias

    def slopes(forward, examples):
        time = examples.inputs["input"]
        return (torch.func.grad(lambda t: forward(t).square().sum())(time) - examples.targets).square().mean()

    tasks = drawn(points)
    learner = FOMAML(normed(BatchNorm(8)), LR, STEPS, loss=slopes, first_order=first_order)
    found = meta_gradient(learner, stack(tasks), engine=engine).gradients
    expected = slow(normed(Written()), tasks, slopes, LR, STEPS, first_order).gradients
    del found["0.bias"], expected["0.bias"]  # nothing but rounding: the norm takes it away
    same_gradients(found, expected)


class Given:
    def __init__(self, tasks):
        self.tasks = tasks

    def batch(self, start, tasks):
        return stack(self.tasks[start : start + tasks])


@pytest.mark.parametrize("row", ROWS)
def test_train_and_evaluate_differentiate_in_query_losses(row):
    make, examples, loss, _ = ROWS[row]
    model, tasks = make(), drawn(examples)
    expected = {steps: slow(model, tasks, loss, LR, steps).losses for steps in (0, 2)}
    learner = FOMAML(model, LR, STEPS, loss=loss)
    with torch.no_grad():
        found = evaluate(learner, Given(tasks), tasks=TASKS, at_steps=(0, 2))
    for steps, losses in expected.items():
        close(found[steps], losses)
    for own in (learner, Reptile(make(), LR, STEPS, loss=loss)):
        [record] = train(
            own, Given(tasks), torch.optim.SGD(own.parameters(), 0.1), iterations=1, meta_batch_size=TASKS
        )
        close(record.before, expected[0].mean())
        close(record.after, expected[2].mean())


def test_reptile_with_a_loss():
    tasks = drawn(points)
    model = curve()
    found = meta_gradient(Reptile(model, LR, STEPS, loss=residual), stack(tasks), engine="loop")
    adapted = [FOMAML(model, LR, STEPS, loss=residual).adapt(task.support) for task in tasks]
    for name, p in model.named_parameters():
        mean = torch.stack([p.detach() - own.get_parameter(name).detach() for own in adapted]).mean(0)
        close(found.gradients[name], mean)


def test_scores_are_the_loss_or_a_function_of_the_model():
    model, tasks = encoder(), drawn(tokens)
    learner = FOMAML(model, LR, STEPS, loss=weighed, output="logits")

    def right(forward, examples):
        return (forward(**examples.inputs).logits.argmax(1) == examples.targets["label"]).double().mean()

    def hand(forward, examples):
        return right(forward, examples)

    expected = slow(model, tasks, weighed, LR, STEPS, outputs=hand)
    found = evaluate(learner, Given(tasks), tasks=TASKS, at_steps=2, metric=[None, right])
    close(found["loss"][2], expected.losses)
    close(found["right"][2], torch.stack(expected.outputs))
    metric = Metric("wrong", OfModel(lambda f, e: 1 - right(f, e)), -1, "%")
    close(
        evaluate(learner, Given(tasks), tasks=TASKS, at_steps=2, metric=metric)[2],
        1 - torch.stack(expected.outputs),
    )
    [record] = train(
        learner,
        Given(tasks),
        torch.optim.SGD(model.parameters(), 0.1),
        iterations=1,
        meta_batch_size=TASKS,
        metric=right,
    )
    close(record.after, torch.stack(expected.outputs).mean())


def test_a_named_metric_judges_the_outputs_for_the_inputs():
    model = encoder()
    plain = [Task(*(Examples(e.inputs, e.targets["label"]) for e in task)) for task in drawn(tokens)]

    def smooth(forward, examples):
        return F.cross_entropy(forward(examples.inputs).logits, examples.targets, label_smoothing=0.1)

    learner = FOMAML(model, LR, STEPS, loss=smooth, output="logits")
    same = FOMAML(model, LR, STEPS, lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1), output="logits")
    for engine in ("loop", "batched"):
        found = evaluate(learner, Given(plain), tasks=TASKS, at_steps=2, metric="accuracy", engine=engine)[2]
        close(found, evaluate(same, Given(plain), tasks=TASKS, at_steps=2, metric="accuracy")[2])


def test_a_loss_with_parameters_of_its_own_learns():
    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.size = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, forward, examples):
            return residual(forward, examples) * self.size.exp()

    loss = Weighed()
    learner = FOMAML(curve(), LR, STEPS, loss=loss)
    assert "loss.size" in learner.meta_parameters()
    found = meta_gradient(learner, stack(drawn(points)))
    close(found.gradients["loss.size"], found.query_losses.mean())  # d/ds exp(s) r = exp(s) r


def test_no_targets_and_the_attributes_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def also(forward, examples):
        assert examples.targets == ()
        return (forward(examples.inputs) - forward.get_submodule("0")(examples.inputs).mean()).square().mean()

    tasks = [Task(Examples(number(i, 5, 1), None), Examples(number(i + 9, 4, 1), ())) for i in range(3)]

    found = meta_gradient(FOMAML(model, LR, 1, loss=also), tasks)
    alone = [
        meta_gradient(FOMAML(model, LR, 1, loss=also), [task], engine="loop").query_losses for task in tasks
    ]
    close(found.query_losses, torch.cat(alone))
    assert found.query_outputs == [(), (), ()]


REFUSED = {
    "both": (lambda: FOMAML(curve(), LR, 1, F.mse_loss, loss=residual), "give one of the two"),
    "both by name": (lambda: MAML(curve(), LR, 1, criterion=F.mse_loss, loss=residual), "give one of the two"),
    "a class": (lambda: FOMAML(curve(), LR, 1, loss=nn.MSELoss), "the loss is a function.*the class MSELoss"),
    "parts": (lambda: FOMAML(curve(), LR, 1, loss=residual, inner_accumulate=2), "loss= is a function of all of them"),
    "no scalar": (
        lambda: meta_gradient(FOMAML(curve(), LR, 1, loss=lambda f, e: f(**e.inputs)), stack(drawn(points))),
        r"the loss returns a tensor of shape \(4, 1\)",
    ),
    "statistics": (
        lambda: evaluate(FOMAML(curve(), LR, 1, loss=residual), Given(drawn(points)), tasks=1, statistics="support"),
        "loss= makes its own forward passes",
    ),
    "third order": (
        lambda: meta_gradient(
            MAML(normed(nn.BatchNorm1d(8, track_running_stats=False)), LR, 1, loss=several_at_once),
            stack(drawn(points)),
        ),
        "differentiates batch norms three times.*convert_batch_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_go_together_is_told(row):
    call, message = REFUSED[row]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("make", [ANIL, MetaSGD, CAVIA, Reptile])
def test_every_algorithm_takes_a_loss(make):
    model = encoder()
    choices = {"head": "head.*"} if make is ANIL else {"context": "body.bias"} if make is CAVIA else {}
    learner = make(model, LR, 1, loss=weighed, **choices)
    tasks = stack(drawn(tokens))
    loop, batched = (meta_gradient(learner, tasks, engine=engine) for engine in ("loop", "batched"))
    same_gradients(batched.gradients, loop.gradients)
    own = plan(learner, tasks)
    assert own(tasks).query_losses.shape == (TASKS,)


@pytest.mark.skipif(
    not third_order_is_refused(), reason="this torch takes a third derivative of its batch norms"
)
def test_a_second_derivative_by_inputs_is_not_told_to_take_the_first_order_that_it_has():
    def bent(forward, examples):
        time = examples.inputs["input"].detach().requires_grad_()
        [slope] = torch.autograd.grad(forward(time).sum(), time, create_graph=True)
        [bend] = torch.autograd.grad(slope.sum(), time, create_graph=True)
        return bend.square().mean()

    learner = FOMAML(normed(nn.BatchNorm1d(8, track_running_stats=False)), LR, 1, loss=bent)
    with pytest.raises(InputError, match=r"or twice in first order.*convert_batch_norm\(model\)$"):
        meta_gradient(learner, stack(drawn(points)))
