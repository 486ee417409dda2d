"""Numbers of every kind are taken for what they are worth, and kept as Python's; no other value passes."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fomaml.baselines import pretrain
from fomaml.data.augment import warped
from fomaml.data.folder import load_folder
from fomaml.data.omniglot import load_omniglot
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError, in_one_line, not_negative, plain, positive, whole
from fomaml.learning.algorithms import FOMAML, MAMLPlusPlus, MetaSGD
from fomaml.learning.rates import by_name
from fomaml.models import BatchNorm, Conv4
from fomaml.tasks import count
from fomaml.train import fomaml_train

INTEGERS = [
    2, np.int8(2), np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8),
]  # fmt: skip
REALS = [
    0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5), Fraction(1, 2),
    torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16),
]  # fmt: skip
TRUTHS = [True, np.True_, np.array(True), torch.tensor(True)]
NO_NUMBERS = [
    "2", None, [2], 2j, np.array([2]), torch.tensor([2]), nn.Parameter(torch.tensor(2.0)), np.complex64(2),
    *TRUTHS,
]  # fmt: skip


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_whole_numbers(value):
    for found in (
        plain(value), whole("n", value), positive("n", value, integer=True), positive("n", value),
        not_negative("n", value),
    ):  # fmt: skip
        assert type(found) is int and found == 2


@pytest.mark.parametrize("value", REALS, ids=repr)
def test_real_numbers(value):
    for found in (plain(value), positive("x", value), not_negative("x", value)):
        assert type(found) is float and found == 0.5
    with pytest.raises(InputError, match=r"n must be a whole number of 1 or more, got 0\.5"):
        positive("n", value, integer=True)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "check", [whole, positive, not_negative, lambda name, value: positive(name, value, integer=True)]
)
def test_what_is_no_number(value, check):
    with pytest.raises(InputError, match=r"^n must be .*number") as error:
        check("n", value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, torch.tensor])
@pytest.mark.parametrize("number", [-0.5, math.nan, math.inf, -math.inf])
def test_numbers_out_of_bounds(kind, number):
    for check in (positive, not_negative):
        with pytest.raises(InputError, match=f"got {number!r}"):
            check("x", kind(number))
    with pytest.raises(InputError, match="got 0"):
        positive("x", kind(0.0))
    assert not_negative("x", kind(0.0)) == 0


def test_bounds_of_whole_numbers():
    assert whole("n", -3, least=-math.inf) == -3
    with pytest.raises(InputError, match=r"n must be a whole number, got 0\.5"):
        whole("n", 0.5, least=-math.inf)
    with pytest.raises(InputError, match="n must be a whole number of 2 or more, got 1"):
        whole("n", 1, least=2)


def test_a_long_value_is_shortened():
    with pytest.raises(InputError) as error:
        positive("x", torch.zeros(500, 50))
    assert len(str(error.value)) < 160
    assert in_one_line(RuntimeError("first. second\nthird")) == "RuntimeError: first"


# --- every option -----------------------------------------------------------------------------------

SOURCE = ClassSource(torch.arange(24.0).view(24, 1), torch.arange(24) // 6)


def sizes(**given):
    return {"ways": 2, "shots": 2, "query_shots": 2} | given


def trained(**given):
    options = {"num_iterations": 2, "num_inner_updates": 2, "inner_lr": 0.5, "meta_lr": 0.5} | given
    torch.manual_seed(0)
    return fomaml_train(nn.Linear(1, 2), SOURCE, **(sizes(meta_batch_size=2, report=len) | options))


def images(number, folder):
    from PIL import Image

    for row in range(8):
        (folder / f"{row}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 5), 9 * row).save(folder / f"{row}" / "0.png")
    return folder


IMAGES = ClassSource(torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8), torch.arange(2))


def pretrained(**given):
    torch.manual_seed(0)
    return pretrain(nn.Linear(1, 4), SOURCE, **({"iterations": 2, "batch_size": 2} | given)).weight.tolist()


def kept(made, *names):
    """The attributes, which must be Python's own numbers."""
    found = [getattr(made, name) for name in names]
    assert {type(each) for each in found} <= {int, float, dict}
    return found


LINEAR = nn.Linear(2, 2)
# What is made of the number 2 or of another kind of 2, to compare.
WHOLE_OPTIONS = {
    "ways": lambda n: kept(Episodes(SOURCE, **sizes(ways=n)), "ways"),
    "shots": lambda n: kept(Episodes(SOURCE, **sizes(shots=n)), "shots"),
    "query_shots": lambda n: kept(Episodes(SOURCE, **sizes(query_shots=n)), "query_shots"),
    "seed": lambda n: kept(Episodes(SOURCE, **sizes(seed=n)), "seed"),
    "tasks of a seed": lambda n: Episodes(SOURCE, **sizes(seed=n))[0].support.inputs.tolist(),
    "a task": lambda n: Episodes(SOURCE, **sizes())[n].support.inputs.tolist(),
    "start": lambda n: Episodes(SOURCE, **sizes()).batch(n, 3).query.inputs.tolist(),
    "tasks": lambda n: count(Episodes(SOURCE, **sizes()).batch(0, n)),
    "regression": lambda n: kept(RegressionEpisodes(Sinusoids(), shots=n, query_shots=n, seed=n),
                                 "shots", "query_shots", "seed"),
    "functions": lambda n: RegressionEpisodes(Sinusoids(), shots=n, query_shots=n, seed=n)[n].query.targets.tolist(),
    "copies": lambda n: kept(Episodes(ClassSource(torch.zeros(8, 1, 4, 4), torch.arange(8) // 4), jitter=0.1,
                                      **sizes(copies=n)), "copies"),
    "classes": lambda n: SOURCE.select([n, 0]).names,
    "inner_lr": lambda n: list(FOMAML(LINEAR, n, 1).inner_lr.sizes.values()),
    "inner_steps": lambda n: kept(FOMAML(LINEAR, 0.1, n), "inner_steps"),
    "steps of rates": lambda n: [p.shape for p in MAMLPlusPlus(LINEAR, 0.1, n, multi_step_iterations=n).parameters()],
    "steps of a norm": lambda n: BatchNorm(3, policy="per-step", steps=n).mean.shape,
    "channels": lambda n: Conv4(2, channels=n).head.weight.shape,
    "four channels": lambda n: Conv4(2, channels=[n, 3, n, 4]).head.weight.shape,
    "classes of warps": lambda n: warped(IMAGES, 7 + n, examples=n, seed=n).inputs.sum().item(),
    "pretrain": lambda n: pretrained(iterations=n, batch_size=n, seed=n),
    "num_iterations": lambda n: trained(num_iterations=n),
    "num_inner_updates": lambda n: trained(num_inner_updates=n),
    "sizes of fomaml_train": lambda n: trained(ways=n, shots=n, query_shots=n, meta_batch_size=n, seed=n),
}  # fmt: skip
REAL_OPTIONS = {
    "inner_lr": lambda x: list(FOMAML(LINEAR, x, 1).inner_lr.sizes.values()),
    "inner_lr by name": lambda x: list(by_name(["head.weight", "bias"], {"head.*": x, "*": 0.1}).values()),
    "learned inner_lr": lambda x: [p.tolist() for p in MetaSGD(LINEAR, x, 1).inner_lr.parameters()],
    "jitter": lambda x: kept(Episodes(ClassSource(torch.zeros(8, 1, 4, 4), torch.arange(8) // 4), jitter=x,
                                      **sizes()), "jitter"),
    "inner_lr of fomaml_train": lambda x: trained(inner_lr=x),
    "lr": lambda x: pretrained(lr=x),
    "meta_lr": lambda x: trained(meta_lr=x),
}  # fmt: skip


@pytest.mark.parametrize("value", INTEGERS[1:], ids=repr)
@pytest.mark.parametrize("option", WHOLE_OPTIONS)
def test_an_option_that_is_a_whole_number(option, value):
    assert WHOLE_OPTIONS[option](value) == WHOLE_OPTIONS[option](2)


@pytest.mark.parametrize("value", REALS[1:], ids=repr)
@pytest.mark.parametrize("option", REAL_OPTIONS)
def test_an_option_that_is_a_number(option, value):
    assert REAL_OPTIONS[option](value) == REAL_OPTIONS[option](0.5)


@pytest.mark.parametrize("value", TRUTHS, ids=repr)
@pytest.mark.parametrize("option", [*WHOLE_OPTIONS.items(), *REAL_OPTIONS.items()], ids=lambda item: item[0])
def test_an_option_that_is_true(option, value):
    with pytest.raises(InputError, match="got True"):
        option[1](value)


def test_the_sides_and_the_seed_of_a_folder_and_of_omniglot(tmp_path):
    folder = images(8, tmp_path / "images")
    one, other = (
        load_folder(folder, size=(n(3), n(4)), seed=n(1), shares=(x(0.5), x(0.25), x(0.25)))
        for n, x in ((int, float), (np.int64, np.float32))
    )
    assert one.train.names == other.train.names and one.origin == other.origin
    with pytest.raises(
        InputError, match=str(tmp_path)
    ):  # the numbers are taken: it is the files that are not there
        load_omniglot(tmp_path, size=np.int64(28), seed=np.int64(1))


@pytest.mark.parametrize(
    ("inner_lr", "got"),
    [(0, "0"), (0.0, "0.0"), (np.float32(0), "0.0"), ({"*bias": 0, "*": 0.1}, "0"), (np.float64("nan"), "nan"),
     ({"*": np.float32("inf")}, "inf"), (torch.tensor(-1.0), "-1.0"), (nn.Parameter(torch.tensor(1.0)), "Parameter")],
)  # fmt: skip
def test_step_sizes_that_are_none(inner_lr, got):
    with pytest.raises(InputError, match=rf"inner_lr.* must be a positive finite number, got {got}") as error:
        FOMAML(LINEAR, inner_lr, 1)
    assert ("adapted=" in str(error.value)) == (got in ("0", "0.0"))


@pytest.mark.parametrize(
    "make",
    [lambda: Episodes(SOURCE, **sizes()), lambda: RegressionEpisodes(Sinusoids(), shots=1, query_shots=1)],
)
@pytest.mark.parametrize("index", [-1, 0.5, "a", slice(3), None])
def test_a_task_that_is_none(make, index):
    with pytest.raises(InputError, match="the number of the first task must be a whole number of 0 or more"):
        make()[index]


class Pole:
    inputs = (0.0, 1.0)

    def draw(self, random):
        return lambda x: x / (x - x)


@pytest.mark.filterwarnings("ignore:invalid value|divide by zero:RuntimeWarning")
def test_a_function_that_is_not_finite_is_not_blamed_on_the_step_size():
    with pytest.raises(InputError, match="the function of task 7 is not finite for some inputs"):
        RegressionEpisodes(Pole(), shots=2, query_shots=2).batch(7, 2)


def test_the_message_is_one_line_whatever_the_names_in_it():
    assert str(InputError("no file a\nb\x00\udcff\u2028é")) == r"no file a\nb\x00\udcff\u2028é"
    assert InputError(3).args == (3,)
