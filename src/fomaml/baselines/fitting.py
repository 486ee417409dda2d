"""The estimators of scikit-learn that baselines have by name, and how one is fitted to one task after the other."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomaml.baselines.networks import default_criterion
from fomaml.baselines.pool import Pool
from fomaml.baselines.rows import Encoder, Features, Rows, rows_of
from fomaml.choices import nearest_first
from fomaml.errors import InputError, shown
from fomaml.learning.contracts import Criterion
from fomaml.learning.mistakes import as_numbers
from fomaml.measures import exact
from fomaml.metrics import LOSS, METRICS, Asked, Metric, OfModel, ignored_label, metrics_for, threshold_of
from fomaml.tasks import Task, are_labels
from fomaml.trees import Tree
from fomaml.tuning import Choice, LogUniform, Space


@dataclass(frozen=True)
class Estimator:
    """An estimator by name.

    classifier, regressor: where it is in scikit-learn, "module:Class"; None where there is none.
    space: what of it is tuned. options: what else it is made with.
    """

    classifier: str | None
    regressor: str | None
    space: Space = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


LEAST = np.finfo(np.float64).eps  # a probability of 0 counts as this, as in scikit-learn's log_loss
ALPHA = LogUniform(1e-3, 1e3)
ESTIMATORS: dict[str, Estimator] = {
    "nearest": Estimator(
        "neighbors:KNeighborsClassifier",
        "neighbors:KNeighborsRegressor",
        {"n_neighbors": LogUniform(1, 20, whole=True), "weights": Choice(("uniform", "distance"))},
        {"n_neighbors": 1},
    ),
    "ridge": Estimator("linear_model:RidgeClassifier", "linear_model:Ridge", {"alpha": ALPHA}),
    "line": Estimator(None, "linear_model:LinearRegression"),
    "logistic": Estimator(
        "linear_model:LogisticRegression", None, {"C": LogUniform(1e-3, 1e3)}, {"max_iter": 1000}
    ),
    "forest": Estimator(
        "ensemble:RandomForestClassifier",
        "ensemble:RandomForestRegressor",
        {"min_samples_leaf": Choice((1, 2, 5, 10)), "max_features": Choice(("sqrt", 0.3, 1.0))},
        {"random_state": 0},
    ),
}


class Kind:
    """What tasks ask for: classes or numbers, by which criterion, judged by which metrics.

    targets: of the support set of one of them.
    """

    def __init__(self, targets: Tree, criterion: Criterion | None, metric: Asked | Sequence[Asked]):
        self.criterion: Any = default_criterion(targets) if criterion is None else criterion
        self.metrics: list[Metric] = metrics_for(self.criterion, metric)
        for own in self.metrics:
            if isinstance(own.score, OfModel):
                raise InputError(
                    f"the metric {own.name!r} is of a model, and an estimator is none: take one of outputs and targets"
                )
        if not isinstance(targets, Tensor):
            raise InputError("an estimator takes one tensor of targets, and these are nested")
        # of a binary cross-entropy, whose targets are numbers, and classes all the same
        self.threshold = threshold_of(self.criterion)
        self.classes = self.threshold is not None or are_labels(self._numbers(targets))
        each = targets[0].numel()
        if self.classes and (targets.dim() > 1 if self.threshold is None else each > 1):
            raise InputError(
                f"an estimator takes one label for each example, got targets of shape {tuple(targets.shape)}"
            )
        if ignored_label(self.criterion) is not None and not self.classes:
            raise InputError("an estimator takes labels under a cross-entropy, got floating targets")

    def _numbers(self, targets: Tensor) -> Tensor:
        return as_numbers(self.criterion, torch.empty(0, dtype=torch.float64), targets)

    def answers(self, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What an estimator is to say, (examples,) labels or (examples, numbers), and the rows that count."""
        if not self.classes:
            found = targets.cpu().double().numpy().reshape(len(targets), -1)
            return found, np.arange(len(found))
        labels = targets.cpu().reshape(-1).long().numpy()
        ignored = ignored_label(self.criterion)
        return labels, np.flatnonzero(labels != ignored)

    def losses(self, outputs: Tensor, task: Task) -> Tensor | None:
        """(1,) the criterion, of the outputs of a query set, where a metric may ask for it."""
        if all(metric.name in METRICS and metric.name != LOSS.name for metric in self.metrics):
            return None
        targets = self._numbers(task.query.targets.cpu())
        outputs = outputs.to(targets.dtype if targets.is_floating_point() else torch.get_default_dtype())
        return exact(self.criterion(outputs, targets).detach()).view(1)


class Fitting:
    """One estimator with its settings, to be fitted to one task after the other."""

    def __init__(
        self,
        estimator: str | Any,
        of: Kind,
        pool: Pool | None,
        share: float | None,
        options: Mapping[str, Any],
        features: Features | None,
    ):
        if share is not None and not 0 <= share <= 1:
            raise InputError(f"share is from 0 to 1, or None, got {shown(share)}")
        if pool is None and share == 0:
            raise InputError("a share of 0 is the pool alone, and there is no pool")
        self.of, self.features = of, features
        self.share = 1.0 if pool is None else share
        self.model = made(estimator, of.classes, options)
        if self.share not in (None, 0, 1) and not takes_weights(self.model):
            raise InputError(
                f"{type(self.model).__name__} takes no weights: share is None, 0 or 1, got {shown(share)}"
            )
        self.pool: Rows | None = None
        if pool is not None and self.share != 1:
            self.pool, self.groups = self._rows(pool.examples), pool.groups
        self._of_pool: dict[str | None, _Fitted] = {}

    def outputs(self, task: Task, group: str | None) -> Tensor:
        """(query examples, ...) float64 on the CPU, of a task of the group of this name."""
        fitted = self._fitted(task, group)
        inputs, targets = rows_of(task.query.inputs, self.features), task.query.targets
        if not self.of.classes:
            found = fitted.numbers(inputs).reshape(tuple(targets.shape))
        elif self.of.threshold is None:
            found = fitted.classes(inputs, int(targets.max()) + 1)
        else:
            both = fitted.classes(inputs, 2)
            # certain ones are far off, not infinitely
            found = np.nan_to_num(both[:, 1] - both[:, 0], posinf=1e3, neginf=-1e3).reshape(
                tuple(targets.shape)
            )
            found = found if self.of.threshold == 0 else 1 / (1 + np.exp(-found))
        return torch.from_numpy(found)

    def _fitted(self, task: Task, group: str | None) -> _Fitted:
        pool = self.pool
        own = None
        if pool is not None and self.groups is not None and (self.groups == group).any():
            own = group
            pool = pool.chosen(self.groups != group)
        if self.share == 0:
            assert pool is not None
            if own not in self._of_pool:
                self._of_pool[own] = _Fitted(self.model, pool, None)
            return self._of_pool[own]
        support = self._rows(task.support)
        if pool is None:
            return _Fitted(self.model, support, None)
        weights = None
        if self.share is not None:
            sizes = np.array([len(support), len(pool)])
            each = sizes.sum() * np.array([self.share, 1 - self.share]) / sizes  # the mean weight is 1
            weights = np.repeat(each, sizes)
        return _Fitted(self.model, support.joined(pool), weights)

    def _rows(self, examples: Any) -> Rows:
        """The rows that count."""
        answers, counted = self.of.answers(examples.targets)
        return rows_of(examples.inputs, self.features, answers).chosen(counted)


class _Fitted:
    """A clone of an estimator that has been fitted."""

    def __init__(self, estimator: Any, rows: Rows, weights: np.ndarray | None):
        assert rows.answers is not None
        if not len(rows):
            raise InputError("there are no labels to fit an estimator to: all are ignored")
        answers = rows.answers
        self.encoder = Encoder(rows)
        self.only = answers[0] if answers.ndim == 1 and (answers == answers[0]).all() else None
        if self.only is not None:  # one class, which most estimators refuse
            return
        self.model = library("base").clone(estimator)
        if "n_neighbors" in self.model.get_params():
            self.model.set_params(n_neighbors=min(self.model.get_params()["n_neighbors"], len(rows)))
        more = {} if weights is None else {"sample_weight": weights}
        one_column = answers.ndim == 2 and answers.shape[1] == 1
        self.model.fit(self.encoder(rows), answers[:, 0] if one_column else answers, **more)

    def numbers(self, rows: Rows) -> np.ndarray:
        return np.asarray(self.model.predict(self.encoder(rows)), dtype=np.float64)

    def classes(self, rows: Rows, least: int) -> np.ndarray:
        """(examples, classes), -inf for those that it has not seen; at least so many."""
        if self.only is not None:
            found, known = np.zeros((len(rows), 1)), np.array([self.only])
        else:
            encoded, known = self.encoder(rows), self.model.classes_
            if hasattr(self.model, "predict_proba"):
                found = np.log(np.maximum(self.model.predict_proba(encoded), LEAST))
            else:
                found = self.model.decision_function(encoded)
                found = np.stack([np.zeros(len(rows)), found], axis=1) if found.ndim == 1 else found
        wide = np.full((len(rows), max(least, int(known.max()) + 1)), -math.inf)
        wide[:, known] = found
        return wide


def made(estimator: str | Any, classes: bool, options: Mapping[str, Any]) -> Any:
    """The estimator, not fitted, with these options."""
    if not isinstance(estimator, str):
        if (
            isinstance(estimator, type)
            or not hasattr(estimator, "fit")
            or not hasattr(estimator, "get_params")
        ):
            raise InputError(
                f"expected an estimator of scikit-learn or the name of one, got {shown(estimator)}"
            )
        return library("base").clone(estimator).set_params(**options)
    if estimator not in ESTIMATORS:
        raise InputError(
            f"no estimator {estimator!r}; there are: {nearest_first(estimator, list(ESTIMATORS))}"
        )
    entry = ESTIMATORS[estimator]
    place = entry.classifier if classes else entry.regressor
    if place is None:
        raise InputError(f"{estimator!r} is not for {'labels' if classes else 'numbers'}; take 'ridge'")
    module, _, name = place.partition(":")
    try:
        return getattr(library(module), name)(**{**entry.options, **options})
    except TypeError as error:
        raise InputError(f"{name}: {error}") from None


def takes_weights(estimator: Any) -> bool:
    return "sample_weight" in inspect.signature(estimator.fit).parameters


def library(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise InputError(
            "baselines without a network need scikit-learn: pip install 'fomaml[metrics]'"
        ) from None
