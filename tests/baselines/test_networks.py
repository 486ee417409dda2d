"""The pooled network, as it is and fine-tuned, for tasks of every kind: the figures of plain loops."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml import FOMAML, MLP, BatchNorm, ClassSource, Episodes, GroupEpisodes, GroupSource, evaluate
from fomaml.baselines import fine_tune, pretrain, unadapted
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import RegressionEpisodes
from fomaml.errors import InputError
from fomaml.tasks import Examples, Task
from tables import uneven

TABLE = uneven(least=6)
ITERATIONS, BATCH, LR = 5, 16, 0.01


def groups(kind="regression"):
    source = GroupSource(TABLE["x"], TABLE["value" if kind == "regression" else "label"], TABLE["key"])
    return source.scaled(source.fit_scaling())


def by_hand(model, losses):
    """Adam on what `losses` gives of a model, iteration by iteration."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for number in range(ITERATIONS):
        optimizer.zero_grad()
        losses(model, number).backward()
        optimizer.step()
    return model


def same(found, expected):
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def drawn_rows(number):
    """The rows of each mini-batch out of so many."""
    random = torch.Generator().manual_seed(3)
    return [torch.randint(number, (BATCH,), generator=random) for _ in range(ITERATIONS)]


OPTIONS = {"iterations": ITERATIONS, "batch_size": BATCH, "lr": LR, "seed": 3}


def test_of_classes():
    inputs, labels = torch.randn(40, 4), torch.arange(40) % 5
    order = labels.argsort(stable=True)
    model, rows = MLP(4, 8, 5), drawn_rows(40)
    expected = by_hand(
        model, lambda own, n: F.cross_entropy(own(inputs[order][rows[n]]), labels[order][rows[n]])
    )
    same(pretrain(copy.deepcopy(model), ClassSource(inputs, labels), **OPTIONS), expected)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_of_groups_scaled_as_they_are_drawn(kind):
    source = groups(kind)
    rows = drawn_rows(len(TABLE["key"]))
    x = torch.tensor(TABLE["x"])
    inputs = ((x - x.mean(0)) / x.std(0, correction=0)).float()[source.rows]
    if kind == "regression":
        y = torch.tensor(TABLE["value"])
        targets, judge = ((y - y.mean()) / y.std(correction=0)).float()[source.rows, None], F.mse_loss
    else:
        targets, judge = torch.tensor(TABLE["label"])[source.rows], F.cross_entropy
    model = MLP(2, 8, 1 if kind == "regression" else 3)
    expected = by_hand(model, lambda own, n: judge(own(inputs[rows[n]]), targets[rows[n]]))
    same(pretrain(copy.deepcopy(model), source, **OPTIONS), expected)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, numbers, flag):
        return SimpleNamespace(logits=self.layer(torch.cat([numbers, flag], 1)), other=None)


class Unequal:
    """Nested tasks of unequal sizes; task i has i + 2 support and 3 query examples."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)

        def examples(number):
            inputs = {
                "numbers": torch.randn(number, 2, generator=random),
                "flag": torch.rand(number, 1, generator=random),
            }
            return Examples(inputs, torch.randint(2, (number,), generator=random))

        self.tasks = [Task(examples(number % 4 + 2), examples(3)) for number in range(60)]

    def batch(self, start, tasks):
        return self.tasks[start : start + tasks]


@pytest.mark.parametrize(("policy", "steps"), [("running", None), ("per-step", 2), ("batch", None)])
def test_running_statistics_move_as_the_mini_batches_say(policy, steps):
    inputs, labels = 3 * torch.randn(40, 4) + 2, torch.arange(40) % 5
    order = labels.argsort(stable=True)
    torch.manual_seed(0)
    # without a bias before the norm, whose gradient is rounding alone
    model = nn.Sequential(
        nn.Linear(4, 6, bias=False), BatchNorm(6, policy=policy, steps=steps), nn.Linear(6, 5)
    )
    # the same by torch's own layer, but for the unbiased variance that its running one is of
    plain = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm1d(6), copy.deepcopy(model[2]))
    rows, optimizer = drawn_rows(40), torch.optim.Adam(plain.parameters(), lr=LR)
    for own in rows:
        optimizer.zero_grad()
        F.cross_entropy(plain(inputs[order][own]), labels[order][own]).backward()
        optimizer.step()
    pretrain(model, ClassSource(inputs, labels), **OPTIONS)
    same(model, plain)
    if policy == "batch":
        assert not dict(model.named_buffers())
        return
    mean, variance = model[1].mean, model[1].variance
    assert len(mean) == (1 if steps is None else steps + 1)
    torch.testing.assert_close(mean, plain[1].running_mean.expand_as(mean), rtol=1e-4, atol=1e-5)
    left = 0.9**ITERATIONS  # of the ones it began with, which no batch has seen
    biased = (plain[1].running_var - left) * (BATCH - 1) / BATCH + left
    torch.testing.assert_close(variance, biased.expand_as(variance), rtol=1e-4, atol=1e-5)
    # so that the pooled network, as it is, normalises by what it has seen
    episodes = Episodes(ClassSource(inputs, labels), ways=5, shots=1, query_shots=2)
    found = unadapted(model, episodes, tasks=1, metric=lambda outputs, targets: outputs[0, 0])
    hidden = model[0](episodes[0].query.inputs[0])
    hidden = (hidden - mean[0]) / (variance[0] + 1e-5).sqrt() * model[1].weight + model[1].bias
    assert found.item() == pytest.approx(model[2](hidden)[0].item(), rel=1e-4)


def test_of_nested_tasks_of_unequal_sizes():
    episodes, model = Unequal(), Nested()
    number = round(BATCH / 5)  # the first task has 5 examples

    def losses(own, iteration):
        tasks = episodes.batch(iteration * number, number)
        each = [
            F.cross_entropy(own(**part.inputs).logits, part.targets, reduction="none")
            for task in tasks
            for part in task
        ]
        return torch.cat(each).mean()

    expected = by_hand(model, losses)
    same(pretrain(copy.deepcopy(model), episodes, output="logits", **OPTIONS), expected)


def test_with_a_loss_of_ones_own():
    episodes, model = RegressionEpisodes(Sinusoids(), shots=5, query_shots=3, seed=1), MLP(1, 8, 1)

    def residual(forward, examples):
        x = examples.inputs.detach().requires_grad_()
        [slope] = torch.autograd.grad(forward(x).sum(), x, create_graph=True)
        return (forward(examples.inputs) - examples.targets).square().mean() + slope.square().mean()

    def losses(own, iteration):
        tasks = [episodes[2 * iteration], episodes[2 * iteration + 1]]
        return torch.stack([residual(own, part) for task in tasks for part in task]).mean()

    same(pretrain(copy.deepcopy(model), episodes, loss=residual, **OPTIONS), by_hand(model, losses))


def test_a_criterion_with_parameters_learns_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, outputs, targets):
            return (outputs * self.scale - targets).square().mean()

    criterion = Scaled()
    pretrain(MLP(2, 8, 1), groups(), criterion=criterion, **OPTIONS)
    assert criterion.scale.item() != 1


def test_without_adaptation_it_is_the_model_itself():
    episodes = GroupEpisodes(groups("classification"), shots=1, query_shots=None, seed=2, in_turn=True)
    model = MLP(2, 8, 3)
    found = unadapted(model, episodes, tasks=6)
    expected = [
        (model(episodes[n].query.inputs).argmax(1) == episodes[n].query.targets).double().mean()
        for n in range(6)
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    regression = GroupEpisodes(groups(), shots=2, query_shots=3, seed=2)
    model = MLP(2, 8, 1)
    found = unadapted(model, regression, tasks=4, criterion=F.mse_loss, metric="mae")
    expected = [
        (model(regression[n].query.inputs) - regression[n].query.targets).abs().mean() for n in range(4)
    ]
    torch.testing.assert_close(found, torch.stack(expected).double())


@pytest.mark.parametrize("choices", [{}, {"adapted": "3.*"}], ids=["all", "head"])
def test_fine_tuning_by_trials(choices):
    source = groups("classification")
    tuning = GroupEpisodes(source, shots=2, query_shots=3, seed=5)
    episodes = GroupEpisodes(source, shots=2, query_shots=3, seed=6)
    model = MLP(2, 8, 3)
    found = fine_tune(
        model, tuning, episodes, tasks=8, tuning_tasks=6, trials=5, seed=4, inner_lrs=(1e-3, 1.0),
        at_steps=(1, 20), **choices,
    )  # fmt: skip
    worth = [
        evaluate(
            FOMAML(model, trial.settings["inner_lr"], 1, **choices), tuning, tasks=6,
            at_steps=trial.settings["steps"],
        )[trial.settings["steps"]].mean().item()
        for trial in found.trials
    ]  # fmt: skip
    assert [trial.score for trial in found.trials] == worth and len(worth) == 5
    best = found.trials[worth.index(max(worth))].settings
    assert {"inner_lr": found.inner_lr, "steps": found.steps} == best
    assert all(1e-3 <= t.settings["inner_lr"] <= 1 and 1 <= t.settings["steps"] <= 20 for t in found.trials)
    learner = FOMAML(model, found.inner_lr, 1, **choices)
    assert torch.equal(found.scores, evaluate(learner, episodes, tasks=8, at_steps=found.steps)[found.steps])


class Counted:
    """Episodes that count how often each task is drawn."""

    def __init__(self, episodes):
        self.episodes, self.draws = episodes, []

    def batch(self, start, tasks):
        self.draws += range(start, start + tasks)
        return self.episodes.batch(start, tasks)


@pytest.mark.parametrize("trials", [None, 3])
def test_several_metrics_of_one_adaptation(trials):
    """The scores are those of each metric by itself at the settings that the first one chose."""
    source = groups()
    tuning = Counted(GroupEpisodes(source, shots=2, query_shots=3, seed=5))
    test = Counted(GroupEpisodes(source, shots=2, query_shots=3, seed=6))
    model = MLP(2, 8, 1)
    metrics = ["mae", "r2", lambda outputs, targets: (outputs - targets).abs().max()]
    names = ["mae", "r2", "<lambda>"]
    options = {"tasks": 5, "criterion": F.mse_loss}
    tuned = {"tuning_tasks": 4, "inner_lrs": (1e-3, 0.1), "at_steps": (1, 3), "trials": trials, **options}
    by_first = fine_tune(model, tuning, test, metric="mae", **tuned)
    once = len(tuning.draws), len(test.draws)
    found = fine_tune(model, tuning, test, metric=metrics, **tuned)
    assert (len(tuning.draws), len(test.draws)) == (2 * once[0], 2 * once[1])
    assert (found.inner_lr, found.steps, found.trials) == (by_first.inner_lr, by_first.steps, by_first.trials)
    assert list(found.scores) == names and torch.equal(found.scores["mae"], by_first.scores)
    as_they_are = unadapted(model, test, metric=metrics, **options)
    for name, metric in zip(names, metrics, strict=True):
        learner = FOMAML(model, found.inner_lr, 1, F.mse_loss)
        curve = evaluate(learner, test, tasks=5, at_steps=(0, found.steps), metric=metric)
        assert torch.equal(found.scores[name], curve[found.steps])
        assert torch.equal(as_they_are[name], curve[0])
        assert torch.equal(unadapted(model, test, metric=metric, **options), curve[0])
    assert list(unadapted(model, test, metric=["mae"], **options)) == ["mae"]  # a list of one is a list


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be a whole number of 1 or more, got 0"),
        ({"lr": -1}, "lr must be a positive finite number, got -1"),
        ({"loss": F.mse_loss, "criterion": F.mse_loss}, "loss= takes the place of the criterion: give one"),
        ({"criterion": F.cross_entropy}, "the model's outputs have shape (128, 1), a single class, of which"),
        ({"criterion": nn.MSELoss}, "the criterion is a function of outputs and targets, or a module; got"),
        ({"lr": 1e30}, "after 3 iterations the parameters are not finite: try a smaller lr"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(InputError) as error:
        pretrain(MLP(2, 8, 1), groups(), **{"iterations": 3, **options})
    assert str(error.value).startswith(message)
