"""On a device that is not the CPU, see elsewhere.py: the numbers of the CPU, no float64, no two devices in one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elsewhere import Elsewhere, classes, network
from family import ALGORITHMS
from fomaml.baselines import fine_tune, fit_estimator, nearest_centroid, pretrain, unadapted
from fomaml.checkpoint import load_state, save_state
from fomaml.data.groups import GroupSource
from fomaml.devices import forked_random, set_random_state
from fomaml.engines import check_outputs, meta_gradient, plan
from fomaml.errors import InputError
from fomaml.evaluate import estimate, evaluate
from fomaml.group_episodes import GroupEpisodes
from fomaml.learning.adapt import Adam
from fomaml.learning.algorithms import FOMAML, ZeroHeadMAML
from fomaml.models import BatchNorm
from fomaml.ranks import Ranks
from fomaml.serve.calibration import calibration_error, fit_temperature
from fomaml.tasks import Examples, Task, one
from fomaml.train import train


class Lines:
    """Tasks of regression. copies, ways: see `TaskSequence`."""

    ways, copies = None, 1

    def __init__(self, device):
        self.device = device

    def batch(self, start: int, tasks: int) -> Task:
        random = torch.Generator().manual_seed(start)
        slopes = torch.randn(tasks, 1, 1, generator=random)
        inputs = [torch.randn(tasks, 5, 1, generator=random) for _ in range(2)]
        return Task(*(Examples(own, slopes * own + 0.1) for own in inputs)).to(self.device)


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def trained(device, algorithm: str = "fomaml", engine: str = "auto", **more):
    learner = ALGORITHMS[algorithm].learner(network(), F.cross_entropy).to(device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    episodes = classes(device, turns=True, jitter=0.1)
    records = train(
        learner, episodes, optimizer, iterations=2, meta_batch_size=3, engine=engine, clip=1.0, **more
    )
    found = [(record.meta_loss.cpu(), record.before, record.after) for record in records]
    return found, {name: value.cpu() for name, value in learner.state_dict().items()}


def evaluated(device, episodes=classes, model=network, **more):
    criterion = F.mse_loss if model is line else None
    learner = FOMAML(model().to(device), 0.1, 2, criterion)
    found = evaluate(learner, episodes(device), tasks=4, at_steps=[0, 2], **more)
    return found, [tuple(estimate(scores)) for scores in found.values() if not isinstance(scores, dict)]


def of_function(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def served(device):
    learner = FOMAML(network().to(device), 0.1, 2)
    task = classes(device)[0]
    logits = learner.adapt(task.support)(task.query.inputs).detach()
    labels = task.query.targets
    return logits.cpu(), fit_temperature(logits, labels), calibration_error(logits.softmax(1), labels)


def pretrained(device):
    model = pretrain(network().to(device), classes(device), iterations=2, batch_size=9)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def tuned(device):
    found = fine_tune(
        network().to(device), classes(device), classes(device), tasks=2, tuning_tasks=2, at_steps=(1, 2)
    )
    return found.scores, found.inner_lr, found.steps


def unequal(device):
    """Tasks of two shapes, with a gradient in parts."""
    tasks = [classes(device, shots=shots)[0] for shots in (1, 2, 1)]
    learner = FOMAML(network().to(device), 0.1, 2, inner_accumulate=2)
    found = meta_gradient(learner, tasks)
    return {n: g.cpu() for n, g in found.gradients.items()}, found.query_losses.cpu()


def grouped(device):
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 2, generator=random)
    source = GroupSource(rows, rows.sum(1, keepdim=True), torch.arange(30) % 5)
    episodes = GroupEpisodes(source, shots=2, query_shots=2, device=device)
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, 0.1)
    nn.init.zeros_(model.bias)
    return evaluate(FOMAML(model.to(device), 0.1, 2, F.mse_loss), episodes, tasks=4, metric=["rmse", "loss"])


def moved(device, norm=None, **choices):
    """A training whose outer steps move more than the meta-parameters."""
    model = network()
    model[2] = model[2] if norm is None else norm
    learner = FOMAML(model, 0.1, 2, **choices).to(device)
    optimizer = torch.optim.SGD(learner.parameters(), 0.1)
    list(train(learner, classes(device), optimizer, iterations=2, meta_batch_size=2))
    return {name: value.cpu() for name, value in learner.state_dict().items()}


SITUATIONS = {
    **{
        f"training, {algorithm} on {engine}": lambda device, a=algorithm, e=engine: trained(device, a, e)
        for algorithm in ("fomaml", "maml", "reptile", "meta-sgd", "proto-maml", "zero-head", "fomaml-adam")
        for engine in ("loop", "batched")
    },
    "training, factored": lambda device: trained(device, engine="factored"),
    "training, running statistics": lambda device: moved(
        device, norm=BatchNorm(7, policy="per-step", steps=2)
    ),
    "training, carried moments": lambda device: moved(device, optimizer=Adam((0, 0.999), carried=True)),
    "training, weighted tasks": lambda device: trained(device, task_weights=lambda task: 2.0),
    "evaluation by names": lambda device: evaluated(
        device, metric=["accuracy", "loss", "balanced-accuracy", "f1", "auprc", of_function]
    ),
    "evaluation, balanced": lambda device: evaluated(device, balanced=True),
    "evaluation of copies": lambda device: evaluated(
        device, lambda d: classes(d, jitter=0.1, copies=2), engine="batched"
    ),
    "evaluation of numbers": lambda device: evaluated(
        device, Lines, line, metric=["loss", "mse", "rmse", "mae", "r2", "psnr"]
    ),
    "the nearest centroid": lambda device: nearest_centroid(classes(device), tasks=3),
    "no adaptation": lambda device: unadapted(network().to(device), classes(device), tasks=3),
    "fine-tuning": tuned,
    "pretraining": pretrained,
    "an adapted model and its temperature": served,
    "an estimator for each task": lambda device: fit_estimator("nearest", classes(device), tasks=3),
    "groups of rows": grouped,
    "tasks of unequal sizes": unequal,
}


def same(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.device.type == "cpu" and type(found) is torch.Tensor
        torch.testing.assert_close(found, expected, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            same(one, other)
    else:
        assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_device_without_float64_gives_what_the_cpu_gives(situation):
    expected = SITUATIONS[situation](torch.device("cpu"))
    with Elsewhere() as machine:
        found = SITUATIONS[situation](machine.device)
    same(found, expected)


class Drawing(nn.Linear):
    """A layer with noise that a device draws. state: of that device's random numbers, one number."""

    state = torch.zeros(8, dtype=torch.uint8)

    def forward(self, inputs):
        number = int(self.state[0])
        self.state[0] = (number + 1) % 256
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(number))
        return super().forward(inputs + 0.1 * noise)


@pytest.fixture(params=["cuda", "mps"])
def device_states(request, monkeypatch):
    """A device that draws random numbers: the keeper of its state."""
    state = Drawing.state
    state.zero_()
    own = getattr(torch, request.param)
    monkeypatch.setattr(own, "get_rng_state", lambda *device: state.clone())
    monkeypatch.setattr(own, "set_rng_state", lambda new, *device: state.copy_(new))
    monkeypatch.setattr(own, "manual_seed", lambda seed: state.fill_(seed % 256))
    if request.param == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    else:
        monkeypatch.setattr(own, "manual_seed_all", lambda seed: state.fill_(seed % 256))
        monkeypatch.setattr(own, "is_available", lambda: True)
        monkeypatch.setattr(own, "is_initialized", lambda: True)
        monkeypatch.setattr(own, "device_count", lambda: 1)
    return state


def noisy() -> FOMAML:
    torch.manual_seed(0)
    return FOMAML(nn.Sequential(nn.Flatten(), Drawing(16, 3)), 0.1, 1)


def failing(learner, tasks):
    with pytest.raises(InputError, match="takes whole numbers"):
        meta_gradient(learner, tasks.map(lambda t: t if t.is_floating_point() else t[..., None]))


def stopping(learner, tasks):
    def by_values(outputs, targets):
        return F.cross_entropy(outputs, targets) if outputs[0, 0] < 1e9 else outputs.sum()

    learner.criterion = by_values
    own = plan(learner, tasks, engine="batched")
    before = Drawing.state.clone()
    with pytest.raises(InputError, match="'loop' does"):
        own(tasks)
    assert Drawing.state[0] == before[0] + 1  # what the engine has drawn before it failed, and no more
    Drawing.state.copy_(before)


def drawn_for_a_rank(learner, tasks):
    with Ranks().drawing(3, 1, 2):
        learner.model(tasks.support.inputs[0])


PROBES = {
    "a choice": lambda learner, tasks: plan(learner, tasks),
    "a check of the outputs": lambda learner, tasks: check_outputs(learner, tasks),
    "an error that is explained": failing,
    "a criterion that vmap does not take": stopping,
    "numbers drawn for a rank": drawn_for_a_rank,
}


@pytest.mark.parametrize("probe", PROBES)
def test_probes_draw_nothing_from_a_device(device_states, probe):
    learner, tasks = noisy(), classes("cpu").batch(0, 2)
    device_states.fill_(7)
    PROBES[probe](learner, tasks)
    assert device_states.tolist() == [7] * 8


def test_a_run_goes_on_with_the_random_numbers_of_its_device(device_states, tmp_path):
    def run(start: int, iterations: int) -> dict:
        learner = noisy()
        optimizer = torch.optim.SGD(learner.parameters(), 0.01, momentum=0.9)
        if start:
            assert load_state(tmp_path / "state", learner, optimizer) == start
        told = {"iterations": 4, "meta_batch_size": 2, "start": start, "engine": "loop"}
        for record in train(learner, classes("cpu"), optimizer, **told):
            if record.iteration == iterations:
                save_state(tmp_path / "state", learner, optimizer, iterations)
                break
        return learner.state_dict()

    device_states.fill_(5)
    expected = run(0, 4)
    device_states.fill_(5)
    run(0, 2)
    device_states.fill_(99)
    found = run(2, 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_of_another_device_is_taken_up(device_states, tmp_path):
    """As of a run that was begun elsewhere."""
    learner = noisy()
    optimizer = torch.optim.Adam(learner.parameters(), 0.01)
    with forked_random():
        set_random_state({"cpu": torch.Generator().manual_seed(3).get_state(), "cuda:9": device_states + 1})
        assert device_states.tolist() == [0] * 8  # there is no tenth GPU
        save_state(tmp_path / "state", learner, optimizer, 1)
        expected = torch.rand(3)
    assert load_state(tmp_path / "state", learner, optimizer) == 1
    assert torch.equal(torch.rand(3), expected)


LABELS_BEYOND = {
    "a query label of the last task": (lambda s, q: q[-1, -1].fill_(3), None, "too narrow for 4 ways"),
    "a support label of the second": (lambda s, q: s[1, 0].fill_(9), None, "too narrow for 10 ways"),
    "below 0": (lambda s, q: q[1, 2].fill_(-1), None, "the query labels hold -1"),
    "one that is ignored": (lambda s, q: q[1, 2].fill_(-100), None, None),
    "all as they should be": (lambda s, q: None, None, None),
    "a head as wide as the support set": (lambda s, q: q[1, 2].fill_(2), ZeroHeadMAML, None),
    "beyond a head as wide as the support set": (
        lambda s, q: q[1, 2].fill_(3), ZeroHeadMAML, "has the labels up to 2 alone",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("what", "engine"),
    [*((what, "auto") for what in LABELS_BEYOND), (next(iter(LABELS_BEYOND)), "loop")],
)
def test_labels_beyond_the_outputs_are_told_before_the_device_sees_them(what, engine):
    change, preset, message = LABELS_BEYOND[what]
    tasks = classes("cpu").batch(0, 3)
    change(tasks.support.targets, tasks.query.targets)
    with Elsewhere() as machine:
        learner = (preset or FOMAML)(network(), 0.1, 1, **({"head": "4"} if preset else {})).to(
            machine.device
        )
        own = tasks.to(machine.device)
        for given in (own, [one(own, index) for index in range(3)]):
            if message is None:
                assert meta_gradient(learner, given, engine=engine).query_losses.shape == (3,)
                continue
            with pytest.raises(InputError, match=message):
                meta_gradient(learner, given, engine=engine)
        assert not machine.dead


@pytest.mark.parametrize("of", ["autocast", "parameters"])
def test_float16_is_refused(of):
    model = network().half() if of == "parameters" else network()
    tasks = classes("cpu").batch(0, 2).to(dtype=next(model.parameters()).dtype)
    told = {"autocast": torch.float16} if of == "autocast" else {}
    for make in (plan, meta_gradient):
        with pytest.raises(InputError, match=r"float16.*below 6e-8.*bfloat16"):
            make(FOMAML(model, 0.1, 1), tasks, **told)
    low = classes("cpu").batch(0, 2).to(dtype=torch.bfloat16)
    found = meta_gradient(FOMAML(network().bfloat16(), 0.1, 1), low)
    assert all(gradient.dtype == torch.bfloat16 for gradient in found.gradients.values())


def test_what_fails_on_a_device_fails_on_the_one_that_is_played():
    with Elsewhere() as machine:
        there = torch.ones(2).to(machine.device)
        with pytest.raises(TypeError, match="has no"):
            there.double()
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2)
        assert (there + 1).cpu().tolist() == [2.0, 2.0]
        assert machine.waits == {"copy to the CPU": 1} and machine.copies == {"copy": 1}
        assert there.sum().item() == 2 and there[there > 0].shape == (2,)
        assert machine.waits["_local_scalar_dense"] and machine.waits["index by a mask"]
        with pytest.raises(IndexError):
            F.cross_entropy(there[None], torch.tensor([2]).to(machine.device))
        with pytest.raises(RuntimeError, match="device-side assert"):
            there + 1
