import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from clusters import clusters, episodes, learner
from fomaml.baselines import fine_tune, nearest_centroid, pretrain
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.evaluate import balance, estimate, evaluate, evaluate_all
from fomaml.learning.algorithms import FOMAML
from fomaml.metrics import ACCURACY, LOSS
from fomaml.models import MLP, Conv4
from fomaml.tasks import Examples, Task, count, one

# --- estimates ------------------------------------------------------------------------------------


def test_estimate_by_hand():
    found = estimate(torch.tensor([0.2, 0.4, 0.9]))
    deviation = math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2)  # about the mean 0.5, of a sample
    assert found.mean == pytest.approx(0.5)
    assert found.interval == pytest.approx(1.96 * deviation / math.sqrt(3))
    assert estimate(torch.ones(7)) == (1.0, 0.0)


def test_estimate_of_one_value_has_no_interval():
    found = estimate(torch.tensor([0.25]))
    assert found.mean == 0.25 and math.isnan(found.interval)


def test_intervals_cover_the_truth_95_times_in_100():
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand(2000, 50, generator=random).double()
    covered = 0
    for values in drawn:
        mean, interval = estimate(values)
        covered += abs(mean - 0.5) <= interval
    assert 0.93 < covered / 2000 < 0.965  # 0.945 expected at 50 values, ± 4 standard errors


# --- evaluate -------------------------------------------------------------------------------------


def by_hand(meta, tasks, steps):
    """Accuracy of each task after plain gradient descent."""
    found = []
    for i in range(count(tasks)):
        task = one(tasks, i)
        rates = dict.fromkeys(reference.learned(meta.model), 0.1)
        adapted, _ = reference.adapt(meta.model, task.support, F.cross_entropy, rates, steps)
        right = adapted(task.query.inputs).argmax(-1) == task.query.targets
        found.append(right.double().mean())
    return torch.stack(found)


@pytest.mark.parametrize("engine", ["auto", "loop", "batched", "factored"])
@pytest.mark.parametrize("tasks_at_once", [3, 100])
def test_evaluate_equals_manual_adaptation(engine, tasks_at_once):
    meta = learner()
    before = {name: tensor.clone() for name, tensor in meta.model.state_dict().items()}
    found = evaluate(
        meta, episodes(), tasks=7, at_steps=(4, 0, 1), tasks_at_once=tasks_at_once, engine=engine
    )
    assert list(found) == [0, 1, 4]
    for steps, scores in found.items():
        assert scores.shape == (7,) and scores.dtype == torch.float64
        assert torch.equal(scores, by_hand(meta, episodes().batch(0, 7), steps))
    assert len({tuple(scores.tolist()) for scores in found.values()}) == 3
    for name, tensor in meta.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def pixels(tasks=6, **options):
    random = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 1, 8, 8, generator=random) + 0.7 * torch.rand(4, 6, 1, 8, 8, generator=random)
    own = ClassSource(images.flatten(0, 1), torch.arange(4).repeat_interleave(6))
    return Episodes(own, ways=3, shots=1, query_shots=2, seed=2, **options)


def test_the_outputs_of_a_query_image_are_averaged_over_its_copies():
    torch.manual_seed(0)
    own = pixels(jitter=0.3, copies=3)
    meta = FOMAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.1, 2)
    expected, of_one = [], []
    for index in range(8):
        task = own[index]
        outputs = meta.adapt(task.support, steps=2)(task.query.inputs)
        mean = torch.stack([outputs[copy::3] for copy in range(3)]).mean(0)
        expected.append((mean.argmax(-1) == task.query.targets[::3]).double().mean())
        of_one.append((outputs.argmax(-1) == task.query.targets).double().mean())
    expected, of_one = torch.stack(expected), torch.stack(of_one)
    assert not torch.equal(expected, of_one)
    for tasks_at_once in (3, 100):
        found = evaluate(meta, own, tasks=8, at_steps=[2], tasks_at_once=tasks_at_once)[2]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def test_balanced_outputs_are_the_given_ones_scaled_by_rows_and_columns_to_equal_sums():
    torch.manual_seed(0)
    outputs = 3 * torch.randn(4, 6, 5, dtype=torch.float64)  # two classes more than the tasks have
    targets = torch.stack([torch.arange(3).repeat(2)[torch.randperm(6)] for _ in range(4)])
    found = balance(outputs, targets)
    probabilities = found.exp()
    torch.testing.assert_close(probabilities.sum(2), torch.ones(4, 6).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(probabilities.sum(1), torch.full((4, 3), 2.0).double(), rtol=0, atol=1e-4)
    # What was added is a term of the row and one of the column: Sinkhorn's theorem leaves no other solution.
    factors = found - outputs[..., :3]
    interaction = factors - factors.mean(1, keepdim=True) - factors.mean(2, keepdim=True)
    torch.testing.assert_close(
        interaction, -factors.mean((1, 2), keepdim=True).expand(4, 6, 3), rtol=0, atol=1e-4
    )


def test_a_balanced_query_set_puts_an_image_of_two_classes_where_one_is_missing():
    labels = torch.tensor([0, 1, 1, 2, 2, 0])
    outputs = 9.0 * F.one_hot(labels)
    outputs[5] = torch.tensor([1.0, 2.0, 0.0])
    assert torch.equal(balance(outputs[None], labels[None])[0].argmax(1), labels)


@pytest.mark.parametrize("options", [{}, {"jitter": 0.3, "copies": 3}])
def test_evaluate_balances_where_asked_for(options):
    torch.manual_seed(0)
    own, copies = pixels(**options), options.get("copies", 1)
    meta = FOMAML(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.1, 2)
    expected = []
    for task in map(own.__getitem__, range(20)):
        outputs = meta.adapt(task.support, steps=2)(task.query.inputs).unflatten(0, (-1, copies)).mean(1)
        targets = task.query.targets[::copies]
        expected.append((balance(outputs[None], targets[None])[0].argmax(-1) == targets).double().mean())
    found = evaluate(meta, own, tasks=20, at_steps=[2], balanced=True)[2]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)
    assert not torch.equal(found, evaluate(meta, own, tasks=20, at_steps=[2])[2])


def test_balanced_needs_labels_that_are_balanced():
    targets = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(
        InputError, match=r"^balanced needs the same number of query examples per class, got 1 to 3$"
    ):
        balance(torch.zeros(2, 4, 2), targets)
    meta = FOMAML(MLP(1, 8, 1), 0.01, 1, F.mse_loss)
    with pytest.raises(InputError, match=r"^balanced needs one label for each example"):
        evaluate(
            meta,
            RegressionEpisodes(Sinusoids(), shots=3, query_shots=3),
            tasks=2,
            at_steps=[1],
            balanced=True,
        )
    for labels, outputs, message in (
        (torch.zeros(1, 4, 5, 5).long(), torch.zeros(1, 4, 3, 5, 5), "one label for each example"),
        (torch.zeros(1, 4, 3).long(), torch.zeros(1, 4, 3), "one label for each example"),
        (
            torch.tensor([[0, 1, -100]]),
            torch.zeros(1, 3, 2),
            "a label for each example, got ones that are ignored",
        ),
    ):
        with pytest.raises(InputError, match=f"^balanced needs {message}"):
            balance(outputs, labels)


def test_the_baselines_see_the_same_copies():
    own = pixels(jitter=0.3, copies=3)
    found = nearest_centroid(own, tasks=5)
    task = own[0]
    centroids = task.support.inputs.flatten(1).unflatten(0, (3, 3)).mean(1)
    distances = torch.cdist(task.query.inputs.flatten(1), centroids).unflatten(0, (6, 3)).mean(1)
    assert found[0] == (distances.argmin(-1) == task.query.targets[::3]).double().mean()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    tuned = fine_tune(model, own, own, tasks=5, tuning_tasks=2, inner_lrs=(0.1,), at_steps=(2,))
    assert torch.equal(tuned.scores, evaluate(FOMAML(model, 0.1, 2), own, tasks=5, at_steps=[2])[2])


def test_evaluate_takes_each_number_of_steps_once():
    found = evaluate(learner(), episodes(), tasks=5, at_steps=(1, 1))
    assert found[1].shape == (5,)


def test_evaluate_of_regression_gives_losses():
    torch.manual_seed(0)
    meta = FOMAML(MLP(1, 8, 1), 0.01, 1, F.mse_loss)
    found = evaluate(meta, RegressionEpisodes(Sinusoids(), shots=5, query_shots=6), tasks=4, at_steps=(0,))
    tasks = RegressionEpisodes(Sinusoids(), shots=5, query_shots=6).batch(0, 4)
    with torch.no_grad():
        outputs = meta.model(tasks.query.inputs.flatten(0, 1)).view(4, 6, 1)
    expected = (outputs - tasks.query.targets).square().mean((1, 2)).double()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_inductive_and_transductive_are_told_apart(engine):
    torch.manual_seed(0)
    images, labels = torch.randn(48, 1, 16, 16), torch.arange(4).repeat_interleave(12)
    images = images + labels.view(-1, 1, 1, 1) / 2
    tasks = Episodes(ClassSource(images, labels), ways=3, shots=2, query_shots=6)
    meta = FOMAML(Conv4(3, channels=4, image=(1, 16, 16)), 0.2, 1)
    options = {"tasks": 10, "at_steps": (3,), "engine": engine}
    inductive = evaluate(meta, tasks, statistics="support", **options)[3]
    transductive = evaluate(meta, tasks, **options)[3]
    assert not torch.equal(inductive, transductive)
    apart = []
    for i in range(10):  # every query example on its own
        task = one(tasks.batch(0, 10), i)
        served = meta.adapt(task.support, steps=3, statistics="support")
        with torch.no_grad():
            outputs = torch.cat([served(example[None]) for example in task.query.inputs])
        apart.append((outputs.argmax(-1) == task.query.targets).double().mean())
    assert (torch.stack(apart) - inductive).abs().max() < 0.06  # a tie may fall either way


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tasks": 0}, "tasks must be a whole number"), ({"engine": "fast"}, "unknown engine 'fast'")],
)
def test_errors_of_evaluate(options, message):
    with pytest.raises(InputError, match=message):
        evaluate(learner(), episodes(), **({"tasks": 2} | options))


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks_at_once", [2, 100])
def test_nearest_centroid_equals_the_slow_loop(tasks_at_once):
    inputs, labels = clusters()
    noisy = Episodes(
        ClassSource(inputs + 2 * torch.randn(inputs.shape), labels), ways=4, shots=3, query_shots=5
    )
    expected = []
    for i in range(9):
        (xs, ys), (xq, yq) = noisy[i]
        right = 0
        for x, y in zip(xq, yq):
            distances = [(x - xs[ys == way].mean(0)).square().sum().item() for way in range(4)]
            right += distances.index(min(distances)) == y.item()
        expected.append(right / 20)
    found = nearest_centroid(noisy, tasks=9, tasks_at_once=tasks_at_once)
    assert found.tolist() == expected
    assert 0.3 < found.mean() < 0.99


@pytest.mark.parametrize("fixed", [True, False])
def test_fine_tune_picks_the_better_step_size_and_count(fixed):
    numbers = []

    def start(number=0):
        numbers.append(number)
        torch.manual_seed(number)
        return nn.Linear(6, 3)

    model = start() if fixed else start
    tuned = fine_tune(
        model, episodes(seed=1), episodes(seed=2), tasks=120, tuning_tasks=20,
        inner_lrs=(1e-6, 0.1), at_steps=(1, 30),
    )  # fmt: skip
    assert (tuned.inner_lr, tuned.steps) == (0.1, 30)
    assert tuned.scores.shape == (120,)
    assert tuned.scores.mean() > 0.9
    if fixed:
        expected = evaluate(FOMAML(model, 0.1, 30), episodes(seed=2), tasks=120, at_steps=(30,))[30]
        assert torch.equal(tuned.scores, expected)
    else:
        assert set(numbers) == {0, 1}  # a start of its own for every hundred tasks


def test_pretrain_makes_a_classifier_of_all_classes_and_repeats_itself():
    source, found = ClassSource(*clusters()), []
    for _ in range(2):
        torch.manual_seed(3)
        model = pretrain(MLP(6, 32, 8), source, iterations=150, batch_size=32, lr=1e-2)
        found.append(model)
    inputs, labels = clusters()
    assert (found[0](inputs).argmax(-1) == labels).double().mean() > 0.95
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in found)))


@pytest.mark.parametrize("tasks_at_once", [2, 7])
@pytest.mark.parametrize("engine", ["loop", "batched", "factored"])
def test_tasks_whose_outputs_are_no_numbers_are_counted(engine, tasks_at_once):
    class Diverging:
        """In two of seven tasks the support set is so large that an inner step overflows."""

        def batch(self, start, tasks):
            found = episodes().batch(start, tasks)
            for index in {1, 4} & set(range(start, start + tasks)):
                found.support.inputs[index - start] = 3e38
            return found

    told = []
    own = learner()
    with pytest.warns(RuntimeWarning, match="of 2 of 7 tasks are no numbers, and count as wrong"):
        evaluate_all(
            own, Diverging(), [(0, "own"), (2, "own")], 7, tasks_at_once, engine, False, [ACCURACY],
            tell=told.append,
        )  # fmt: skip
    evaluate_all(own, episodes(), [(2, "own")], 7, tasks_at_once, engine, False, [LOSS], tell=told.append)
    assert told == [2, 0]


def test_to_evaluate_again_looks_at_labels_alone():
    """The forward passes that see whether a learner and such tasks go together are made once."""
    passes = []
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_forward_hook(lambda *_: passes.append(1))
    learner = FOMAML(model, 0.1, 1)

    def tasks(largest=2):
        examples = Examples(torch.randn(1, 6, 4), torch.tensor([[0, 1, 2, 0, 1, largest]]))
        return SimpleNamespace(batch=lambda start, tasks: Task(examples, examples))

    def number(episodes):
        passes.clear()
        evaluate(learner, episodes, tasks=1, compile=False)
        return len(passes)

    first = number(tasks())
    assert number(tasks()) == number(tasks()) < first
    with pytest.raises(InputError, match="too narrow for 5 ways"):
        number(tasks(4))
    model[0] = nn.Linear(4, 2)  # another network is looked at anew
    with pytest.raises(InputError, match="too narrow for 3 ways"):
        number(tasks())
