"""What estimators refuse."""

import importlib

import pytest
import torch
from torch import nn

from estimators import Given, drawn, sources
from fomaml import ClassSource, Episodes, GroupEpisodes, Metric
from fomaml.baselines import fit_estimator, pooled
from fomaml.errors import InputError
from fomaml.metrics import OfModel
from fomaml.tasks import Examples, Task

sklearn = pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra metrics")


def refusals():
    classes = ClassSource(torch.randn(20, 3), torch.arange(20) % 4)
    renumbered = Episodes(classes, ways=2, shots=1, query_shots=1)
    train, test = sources("classification")
    pool = pooled(train)
    fixed = drawn("classification")
    maps = Given(Task(*(Examples(torch.randn(4, 3), torch.zeros(4, 2, dtype=torch.long)) for _ in range(2))))
    nested = Given(Task(*(Examples(torch.randn(4, 3), {"a": torch.zeros(4)}) for _ in range(2))))
    of_model = Metric("residual", OfModel(lambda forward, examples: 0.0), -1, "")
    anew = GroupEpisodes(test, shots=1, query_shots=1, ways=2)
    renumbered_text = "the classes are numbered anew in each task: pooled labels"
    return [
        (lambda: pooled(classes), renumbered_text),
        (lambda: pooled(renumbered), renumbered_text),
        (lambda: pooled(anew), renumbered_text),
        (lambda: fit_estimator("ridge", renumbered, pool=pool), renumbered_text),
        (lambda: fit_estimator("ridge", anew, pool=pool), renumbered_text),
        (lambda: fit_estimator("nearest", fixed, pool=pool), "KNeighborsClassifier takes no weights: share is"),
        (lambda: fit_estimator("ridge", fixed, share=0.0), "a share of 0 is the pool alone, and there is no pool"),
        (lambda: fit_estimator("ridge", fixed, pool=pool, share=2), "share is from 0 to 1, or None, got 2"),
        (lambda: fit_estimator("forrest", fixed), "no estimator 'forrest'; there are: forest, "),
        (lambda: fit_estimator("line", fixed), "'line' is not for labels; take 'ridge'"),
        (lambda: fit_estimator("ridge", fixed, options={"beta": 1}), "RidgeClassifier: "),
        (lambda: fit_estimator(nn.Linear(1, 1), fixed), "expected an estimator of scikit-learn or the name of one"),
        (lambda: fit_estimator("ridge", maps), "an estimator takes one label for each example, got"),
        (lambda: fit_estimator("ridge", nested), "an estimator takes one tensor of targets, and these are nested"),
        (lambda: fit_estimator("ridge", fixed, metric=of_model), "the metric 'residual' is of a model, and"),
        (lambda: fit_estimator("ridge", fixed, tasks=0), "tasks must be a whole number of 1 or more, got 0"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(refusals())))
def test_bad_input(number):
    call, message = refusals()[number]
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_without_scikit_learn(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"need scikit-learn: pip install 'fomaml\[metrics\]'$"):
        fit_estimator("ridge", drawn("classification"))
