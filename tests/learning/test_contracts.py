"""What an objective and an inner optimiser declare, and what is refused because it does not."""

import functools
import inspect
from dataclasses import dataclass

import pytest
import torch

from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning import algorithms
from fomaml.learning.adapt import SGD, Adam, Sign
from fomaml.learning.contracts import InnerProblem, Learner, PlainObjective, checked_objective
from fomaml.learning.learner import Choices, MetaLearner
from fomaml.learning.objectives import Displacement, Implicit, MultiStepLoss, Outcome, QueryLoss, run
from fomaml.learning.problem import Problem
from fomaml.models import MLP
from fomaml.tasks import one
from zoo import example


def query_loss(problem):
    adapted, support_losses = run(problem)
    losses, outputs = problem.query(adapted)
    return Outcome(losses.sum(), losses.detach(), outputs.detach(), support_losses)


class Halved:
    """Half the gradient: plain SGD at half the step size."""

    second_order, carried, elementwise = True, False, True

    def direction(self, gradient, parameter, state, step):
        return gradient / 2


@dataclass(frozen=True)
class Declared:
    """An objective of one's own that declares all it must."""

    proximal: float = 0.0
    differentiates_twice: bool = False

    def __call__(self, problem):
        return query_loss(problem)


def changed(**choices):
    model, tasks, criterion = example("mlp")
    return MetaLearner(model, inner_lr=0.2, inner_steps=3, criterion=criterion, **choices), tasks


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize(
    "objective", [query_loss, lambda problem: query_loss(problem), functools.partial(query_loss), Declared()],
    ids=["function", "lambda", "partial", "object"],
)  # fmt: skip
@pytest.mark.parametrize("first_order", [True, False])
def test_an_objective_of_ones_own_is_as_good_as_the_librarys(objective, engine, first_order):
    found, expected = (
        meta_gradient(*changed(first_order=first_order, **choices), engine=engine)
        for choices in ({"objective": objective}, {})
    )
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient)


def test_a_function_declares_nothing_and_so_has_no_proximal_term():
    objective = checked_objective(query_loss)
    assert objective == PlainObjective(query_loss)
    assert (objective.proximal, objective.differentiates_twice) == (0.0, False)
    query = QueryLoss()
    assert checked_objective(query) is query


@pytest.mark.parametrize("stacked", [True, False])
def test_a_declared_proximal_term_is_in_the_inner_problem(stacked):
    def losses(objective):
        learner, tasks = changed(objective=objective)
        problem = Problem(learner, tasks if stacked else one(tasks, 0), stacked=stacked)
        moved = {name: value + 0.5 for name, value in problem.start.items()}
        return problem.support_losses(moved, True, 0), sum(
            value.numel() for value in learner.model.parameters()
        )

    (plain, number), (proximal, _) = losses(Declared()), losses(Declared(proximal=3.0))
    torch.testing.assert_close(proximal - plain, torch.full_like(plain, 3 / 2 * number / 4))


def test_an_inner_optimiser_of_ones_own():
    learner, tasks = changed(optimizer=Halved(), first_order=False)
    found = meta_gradient(learner, tasks).gradients
    learner, tasks = changed(optimizer=SGD(), first_order=False)
    learner.inner_lr.sizes = {name: size / 2 for name, size in learner.inner_lr.sizes.items()}
    for name, gradient in meta_gradient(learner, tasks).gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14)


def lacking(kind, *names):
    """An object of a class that has all but these attributes of another class."""
    kept = {
        name: value for name, value in vars(kind).items() if name not in (*names, "__dict__", "__weakref__")
    }
    return type(kind.__name__, (), kept)()


class Objective:
    proximal, differentiates_twice = 0.0, False

    def __call__(self, problem):
        return query_loss(problem)


def half_declared(problem):
    return query_loss(problem)


half_declared.differentiates_twice = True


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"objective": lacking(Objective, "proximal")}, "the objective Objective has no proximal; see fomaml"),
        ({"objective": lacking(Objective, "proximal", "differentiates_twice")},
         "the objective Objective has no proximal and no differentiates_twice"),
        ({"objective": lacking(Objective, "__call__")}, "the objective Objective has no __call__"),
        ({"objective": half_declared}, "the objective half_declared has no proximal; see"),
        ({"objective": QueryLoss}, r"the objective QueryLoss is a class, expected an instance: QueryLoss\(…\)"),
        ({"objective": None}, "the objective NoneType has no proximal and no differentiates_twice and no __call__"),
        ({"optimizer": lacking(Halved, "carried")}, "the inner optimiser Halved has no carried; see"),
        ({"optimizer": lacking(Halved, "second_order", "direction")},
         "the inner optimiser Halved has no second_order and no direction"),
        ({"optimizer": torch.optim.SGD}, "the inner optimiser SGD is a class"),
    ],
)  # fmt: skip
def test_what_does_not_declare_what_it_must_is_refused_by_name(choices, message):
    with pytest.raises(InputError, match=message) as raised:
        changed(**choices)
    assert "\n" not in str(raised.value)


def test_what_lacks_nothing_is_taken():
    changed(objective=lacking(Objective), optimizer=lacking(Halved))


def test_the_librarys_own_parts_declare_what_they_are():
    declared = [
        (each.proximal, each.differentiates_twice)
        for each in (QueryLoss(), Displacement(), MultiStepLoss(3), Implicit(2.5))
    ]
    assert declared == [(0.0, False)] * 3 + [(2.5, True)]
    optimizers = [SGD(), Adam(), Adam(carried=True), Sign()]
    assert [(each.second_order, each.carried) for each in optimizers] == [
        (True, False), (False, False), (False, True), (False, False)
    ]  # fmt: skip


def test_learner_and_problem_have_what_the_contracts_promise():
    learner, tasks = changed()
    problem = Problem(learner, one(tasks, 0))
    for contract, given in ((Learner, learner), (InnerProblem, problem)):
        names = {*contract.__annotations__, *(n for n in vars(contract) if not n.startswith("_"))}
        assert len(names) > 6 and all(hasattr(given, name) for name in names), names


def test_the_typed_choices_are_the_learners_arguments():
    arguments = set(inspect.signature(MetaLearner).parameters)
    assert set(Choices.__annotations__) == arguments - {"model", "inner_lr", "inner_steps", "criterion"}


@pytest.mark.parametrize(
    ("algorithm", "given"),
    [
        ("Reptile", {"objective": QueryLoss()}),
        ("ANIL", {"adapted": "*"}),
        ("BOIL", {"adapted": "*"}),
        ("MetaSGD", {"learn_rates": "per-step"}),
        ("iMAML", {"objective": QueryLoss()}),
        ("CAVIA", {"start": None, "context": "*"}),
        ("SignMAML", {"optimizer": SGD()}),
        ("ZeroHeadMAML", {"start": None}),
        ("ProtoMAML", {"start": None}),
    ],
)
def test_an_algorithm_refuses_the_choice_that_makes_it(algorithm, given):
    heads = {"head": "1*"} if algorithm in ("ANIL", "BOIL") else {}
    with pytest.raises(InputError, match="is what makes this algorithm, and cannot be given"):
        getattr(algorithms, algorithm)(MLP(2, 2), 0.1, 1, **heads, **given)


def test_first_order_is_a_default_of_maml_that_can_be_changed():
    assert algorithms.MAML(MLP(2, 2), 0.1, 1).first_order is False
    assert algorithms.MAML(MLP(2, 2), 0.1, 1, first_order=True).first_order is True


def test_the_hints_import_nothing():
    """`Unpack` is in typing from Python 3.11 on: nothing imports it when the library runs."""
    assert not hasattr(algorithms, "Unpack")
