"""One table: algorithm x module x execution, in float64 against the slow loops of reference.py.

A new algorithm is one row of ALGORITHMS, and its slow loop in reference.py.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import reference
from family import ALGORITHMS, CASES, EXACT, EXECUTIONS, LR, STEPS, answer, assert_agrees, error, rates
from fomaml.engines import meta_gradient
from fomaml.engines.factored import linear_weights
from fomaml.engines.factored import problem as factored_problem
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.models import MLP
from zoo import MODULES, draw, example


@pytest.mark.parametrize(("algorithm", "module", "execution"), CASES)
def test_agrees_with_the_reference(algorithm, module, execution):
    row, options = ALGORITHMS[algorithm], EXECUTIONS[execution]
    model, tasks, criterion = example(module)
    learner = row.learner(model, criterion)
    refusal = row.factored or (linear_weights(learner) == [] and "no adapted nn.Linear weight")
    if module == "autoencoder" and not refusal and "encode.weight" in linear_weights(learner):
        refusal = "'encode.weight' is used outside of a linear layer"
    if options["engine"] == "factored" and refusal:
        with pytest.raises(InputError, match=refusal):
            meta_gradient(learner, tasks, **options)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = meta_gradient(learner, tasks, **options)
    assert_agrees(result, answer(algorithm, module), 1e-12 if (algorithm, module) in EXACT else 1e-10)
    assert result.engine == options["engine"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("algorithm", "module"), dict.fromkeys(case[:2] for case in CASES))
def test_backward_of_the_learner_gives_the_same(algorithm, module):
    model, tasks, criterion = example(module)
    learner = ALGORITHMS[algorithm].learner(model, criterion)
    learner(tasks).backward()
    own = learner.meta_parameters()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in own.items()}
    assert error(found, answer(algorithm, module).gradients) <= 1e-10


def test_apply_to_sets_the_gradients_of_the_model():
    model, tasks, criterion = example("user")
    learner = FOMAML(model, LR, STEPS, criterion)
    result = meta_gradient(learner, tasks)
    result.apply_to(learner)
    expected = answer("fomaml", "user").gradients
    for name, parameter in model.named_parameters():
        if name == "frozen":
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("shots", [1, 2, 9])  # support rows × 2 layers' width below and above width²
@pytest.mark.parametrize("module", ["mlp", "twice", "attention", "deep"])
def test_factored_turns_changes_dense_where_they_are_large(module, shots, steps, monkeypatch):
    monkeypatch.setitem(MODULES, "deep", (partial(MLP, 16, 12, 12, 12, 4), (16,), F.cross_entropy))
    model, tasks, criterion = example(module, shots=shots)
    learner = FOMAML(model, LR, steps, criterion)
    expected = reference.over_tasks(
        lambda m, t: reference.fomaml(m, t, criterion, rates(reference.learned(m)), steps),
        model,
        tasks,
    )
    assert_agrees(meta_gradient(learner, tasks, engine="factored"), expected, 1e-12)


def test_the_change_of_a_layer_is_kept_as_factors_and_then_dense():
    """The case above does reach both: factors for few rows, dense when they would cost more."""
    torch.manual_seed(1)
    model = MLP(16, 12, 12, 4).double()
    kinds = {}
    for shots in (1, 9):
        tasks = draw((16,), F.cross_entropy, shots=shots)
        problem = factored_problem(FOMAML(model, LR, STEPS), tasks)
        path = problem.path()
        kinds[shots] = [len(next(path)[0].changes["3.weight"]) for _ in range(STEPS)]
    assert kinds == {1: [2, 1, 1], 9: [1, 1, 1]}
