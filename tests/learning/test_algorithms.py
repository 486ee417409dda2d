import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml.learning.algorithms as algorithms
import reference
from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning.adapt import Adam
from fomaml.learning.algorithms import ANIL, BOIL, FOMAML, MAML, Reptile, iMAML
from fomaml.learning.learner import MetaLearner, select
from fomaml.learning.problem import minibatch
from fomaml.learning.rates import by_name
from fomaml.models import MLP, Conv4
from fomaml.tasks import Examples, one
from zoo import Twice, User, draw

NAMES = ["body.weight", "body.bias", "head.weight", "head.bias"]
LISTED = "there are: body.weight, body.bias, head.weight, head.bias"


def support_of(model_shape=(6,)):
    return one(draw(model_shape, F.cross_entropy), 0).support


# --- adapt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [User, Twice])
@pytest.mark.parametrize("steps", [None, 0, 1, 7])
def test_adapt_equals_manual_gradient_descent(build, steps):
    model, support = build().double(), support_of()
    manual = copy.deepcopy(model)
    optimizer = torch.optim.SGD(manual.parameters(), lr=0.2)
    for _ in range(3 if steps is None else steps):
        optimizer.zero_grad()
        F.cross_entropy(manual(support.inputs), support.targets).backward()
        optimizer.step()
    adapted = FOMAML(model, 0.2, 3).adapt(support, steps=steps)
    for name, parameter in manual.named_parameters():
        found = adapted.get_parameter(name)
        torch.testing.assert_close(found.detach(), parameter.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("preset", [FOMAML, MAML, Reptile])
@pytest.mark.parametrize("training", [True, False])
def test_adapt_returns_an_independent_module_in_the_same_mode(preset, training):
    model, support = User().double().train(training), support_of()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # as when serving
        adapted = preset(model, 0.2, 3).adapt(support)
    assert type(adapted) is User and adapted is not model
    assert adapted.training is training
    assert adapted.first.weight is adapted.second.weight  # tied before, tied after
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in adapted.parameters())
    with torch.no_grad():
        for tensor in adapted.state_dict().values():
            tensor.fill_(7.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_running_statistics_of_the_meta_model_never_change():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))
    tasks = draw((1, 4, 4), F.cross_entropy).to(dtype=torch.float32)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    learner = FOMAML(model, 0.1, 2)
    learner.adapt(one(tasks, 0).support)
    learner(tasks).backward()
    for engine in ("loop", "batched", "factored"):
        meta_gradient(learner, tasks, engine=engine)
    assert len(buffers) == 3
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("statistics", ["own", "support"])
def test_a_module_with_frozen_statistics_serves_single_examples(statistics):
    torch.manual_seed(0)
    model = Conv4(4, channels=4, image=(1, 16, 16)).double()
    task = one(draw((1, 16, 16), F.cross_entropy), 0)
    adapted = FOMAML(model, 0.1, 2).adapt(task.support, statistics=statistics)
    together = adapted(task.query.inputs)
    apart = torch.cat([adapted(example[None]) for example in task.query.inputs])
    assert torch.allclose(together, apart, rtol=0, atol=1e-10) is (statistics == "support")


# --- which parameters, and how fast ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ("*", NAMES),
        ("head.*", NAMES[2:]),
        (["*.bias", "head.weight"], ["body.bias", "head.weight", "head.bias"]),
        (("head.bias",), ["head.bias"]),
        ([], []),
    ],
)
def test_select(globs, expected):
    assert select(NAMES, globs) == expected


@pytest.mark.parametrize("globs", ["tail.*", ["head.*", "tail.*"]])
def test_select_refuses_a_glob_that_matches_nothing(globs):
    with pytest.raises(InputError) as raised:
        select(NAMES, globs)
    assert str(raised.value) == f"no parameter that requires gradients matches 'tail.*'; {LISTED}"
    with pytest.raises(InputError, match="there are: none"):
        select([], "tail.*")


@pytest.mark.parametrize(
    ("inner_lr", "expected"),
    [
        (0.5, [0.5] * 4),
        (1, [1] * 4),
        ({"head.*": 0.4, "*": 0.01}, [0.01, 0.01, 0.4, 0.4]),
        ({"*": 0.01, "head.*": 0.4}, [0.01] * 4),  # the first match counts
    ],
)
def test_step_sizes_by_name(inner_lr, expected):
    assert by_name(NAMES, inner_lr) == dict(zip(NAMES, expected))


@pytest.mark.parametrize(
    ("inner_lr", "message"),
    [
        (-0.1, "inner_lr must be a positive finite number, got -0.1"),
        (float("nan"), "inner_lr must be a positive finite number, got nan"),
        (float("inf"), "inner_lr must be a positive finite number, got inf"),
        (True, "inner_lr must be a positive finite number, got True"),
        ("0.1", "inner_lr must be a positive finite number, got '0.1'"),
        ({"head.*": 0.4}, "inner_lr names no step size for 'body.weight'; add '*' for all others"),
        ({"*": -1.0}, "inner_lr of body.weight must be a positive finite number, got -1.0"),
    ],
)
def test_errors_of_step_sizes(inner_lr, message):
    with pytest.raises(InputError) as raised:
        FOMAML(Twice(), inner_lr, 1)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be a whole number of 1 or more, got 0"),
        ({"inner_steps": 2.0}, "inner_steps must be a whole number of 1 or more, got 2.0"),
        ({"inner_batch_size": 0}, "inner_batch_size must be a whole number of 1 or more, got 0"),
        ({"adapted": "tail.*"}, f"no parameter that requires gradients matches 'tail.*'; {LISTED}"),
        ({"frozen": "tail.*"}, f"no parameter that requires gradients matches 'tail.*'; {LISTED}"),
        ({"learn_rates": "all"}, "unknown learn_rates 'all'; there are: None, elementwise, per-step"),
    ],
)
def test_errors_of_a_learner(choices, message):
    with pytest.raises(InputError) as raised:
        MetaLearner(Twice(), **({"inner_lr": 0.1, "inner_steps": 1} | choices))
    assert str(raised.value) == message


def test_a_parameter_without_gradients_neither_adapts_nor_is_learned():
    learner = FOMAML(User(), 0.1, 1)
    assert "frozen" not in learner.adapted
    assert "frozen" not in learner.meta_parameters()
    assert "unused" in learner.meta_parameters()
    with pytest.raises(InputError, match="'frozen'"):
        FOMAML(User(), 0.1, 1, adapted="frozen")


def test_the_implicit_gradient_refuses_parameters_that_do_not_adapt():
    learner = iMAML(Twice(), 0.1, 1, adapted="head.*")
    with pytest.raises(InputError, match=r"every meta-learned parameter to adapt: 'body\.bias' does not"):
        meta_gradient(learner, draw((6,), F.cross_entropy).to(dtype=torch.float32))


def test_globs_freeze_parameters_for_both_loops():
    model, tasks = Twice(), draw((6,), F.cross_entropy).to(dtype=torch.float32)
    learner = FOMAML(model, 0.1, 2, frozen="head.*")
    assert learner.adapted == list(learner.meta_parameters()) == NAMES[:2]
    assert list(meta_gradient(learner, tasks).gradients) == NAMES[:2]
    learner(tasks).backward()
    assert model.body.weight.grad is not None
    assert model.head.weight.grad is None


def test_presets_choose_the_parameters_of_the_papers():
    assert ANIL(Twice(), 0.1, 1).adapted == NAMES[2:]
    assert BOIL(Twice(), 0.1, 1).adapted == NAMES[:2]
    assert BOIL(Twice(), 0.1, 1, head="body*").adapted == NAMES[2:]


def presets():
    named = vars(algorithms).items()
    return [
        f for n, f in named if inspect.isfunction(f) and f.__module__ == algorithms.__name__ and n[0] != "_"
    ]


@pytest.mark.parametrize("preset", [p for p in presets() if p.__name__ not in ("minibatch", "select")])
def test_every_preset_cites_its_paper_and_takes_the_same_first_arguments(preset):
    assert preset.__doc__
    assert list(inspect.signature(preset).parameters)[:4] == ["model", "inner_lr", "inner_steps", "criterion"]


# --- mini-batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("number", "size"), [(10, 4), (10, 5), (7, 3), (5, 1), (6, 6), (6, 9), (6, None)])
def test_mini_batches_cover_the_support_set_once_a_round(number, size, stacked):
    inputs = torch.arange(number).expand(3, number) if stacked else torch.arange(number)
    batches = 1 if size is None else -(-number // size)
    rounds = []
    for step in range(2 * batches):
        part = minibatch(Examples(inputs, inputs * 2), size, step, stacked)
        assert torch.equal(part.targets, part.inputs * 2)
        rows = (part.inputs[0] if stacked else part.inputs).tolist()
        assert 1 <= len(rows) <= (size or number)
        assert (
            rows
            == reference.minibatch(Examples(torch.arange(number), torch.arange(number)), size, step)[
                0
            ].tolist()
        )
        rounds += rows
    assert sorted(rounds) == sorted([*range(number)] * 2)


def test_mini_batches_of_ordered_examples_hold_every_class():
    targets = torch.arange(5).repeat_interleave(4)  # 5 ways, 4 shots
    for step in range(4):
        assert minibatch(Examples(targets, targets), 5, step, False).targets.tolist() == [0, 1, 2, 3, 4]


# --- the surface ----------------------------------------------------------------------------------


def test_an_ordinary_outer_loop_trains():
    """`backward(); optimizer.step()`, nothing else."""
    model = MLP(6, 16, 4)
    learner = FOMAML(model, 0.5, 3)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    tasks = draw((6,), F.cross_entropy).to(dtype=torch.float32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = learner(tasks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_learner_with_adam_inside_adapts():
    model, support = MLP(6, 16, 4).double(), support_of()
    learner = FOMAML(model, 0.05, 20, optimizer=Adam())
    adapted = learner.adapt(support)
    before, after = (F.cross_entropy(m(support.inputs), support.targets).item() for m in (model, adapted))
    assert after < 0.5 * before
