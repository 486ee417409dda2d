"""Estimators of scikit-learn that meta-train: `fit(X, y, groups=task)` learns how tasks are learned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomaml.app.estimators import FewShotClassifier, FewShotRegressor, as_labels
from fomaml.app.scikit_learn import (
    BaseEstimator,
    ClassifierMixin,
    RegressorMixin,
    check_consistent_length,
    check_is_fitted,
    check_random_state,
    validate_data,
)
from fomaml.data.groups import GroupSource
from fomaml.data.keys import few, key_of
from fomaml.data.scaling import Standard
from fomaml.devices import forked_random
from fomaml.errors import InputError, positive
from fomaml.group_episodes import GroupEpisodes
from fomaml.learning.algorithms import FOMAML
from fomaml.learning.learner import MetaLearner
from fomaml.models import MLP
from fomaml.train import cosine, train


class _Meta(BaseEstimator):
    """What both kinds have in common: the settings, and the meta-training."""

    learner_: MetaLearner

    def __init__(
        self,
        *,
        hidden: int | Sequence[int] = (64, 64),
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        meta_lr: float = 0.005,
        iterations: int = 500,
        meta_batch_size: int = 4,
        shots: int | None = None,
        query_shots: int | None = None,
        first_order: bool | None = None,
        random_state: Any = None,
    ):
        self.hidden = hidden
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.meta_lr = meta_lr
        self.iterations = iterations
        self.meta_batch_size = meta_batch_size
        self.shots = shots
        self.query_shots = query_shots
        self.first_order = first_order
        self.random_state = random_state

    def _meta_train(self, X: np.ndarray, y: Any, groups: Any, classes: list[str] | None) -> None:
        """Set what `fit` learns of tasks. y: the names of classes, or floating (rows, targets)."""
        check_consistent_length(X, y, groups)
        groups = np.zeros(len(X), dtype=np.int64) if groups is None else groups
        # tensors keep their dtype when rows are drawn; in float64 no prediction depends on the rows beside it
        inputs = torch.from_numpy(np.array(X, dtype=np.float64))
        if classes is None:
            y = torch.from_numpy(np.array(y, dtype=np.float64))
        kind: Any = "regression" if classes is None else "classification"
        source = GroupSource(inputs, y, groups, kind=kind, classes=classes)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        episodes = self._episodes(source, seed)
        scaling = source.fit_scaling()
        assert source.outputs is not None
        with forked_random():
            torch.manual_seed(seed)
            hidden = [
                positive("a width in hidden", width, integer=True) for width in np.atleast_1d(self.hidden)
            ]
            network = MLP(X.shape[1], *hidden, source.outputs).double()
        targets = scaling.targets.get("")
        model = _Standardised(network, scaling.inputs[""], targets)
        criterion = F.cross_entropy if targets is None else _StandardisedError(targets)
        # of squared errors first order overshoots on some new tasks, a hundred times their variance and more
        first_order = targets is None if self.first_order is None else bool(self.first_order)
        learner = FOMAML(model, self.inner_lr, self.inner_steps, criterion, first_order=first_order)
        iterations = positive("iterations", self.iterations, integer=True)
        optimizer = torch.optim.Adam(learner.parameters(), lr=positive("meta_lr", self.meta_lr))
        records = train(
            learner,
            episodes,
            optimizer,
            iterations=iterations,
            meta_batch_size=self.meta_batch_size,
            schedule=cosine(iterations),
            measure_every=iterations,
        )
        self.loss_curve_ = [float(record.meta_loss) for record in records]
        self.learner_ = learner

    def _episodes(self, source: GroupSource, seed: int) -> GroupEpisodes:
        """Tasks of random rows of a group, of which some are adapted to and others judge it."""
        of_classes = source.class_counts is not None
        counts = source.counts[:, None] if source.class_counts is None else source.class_counts
        enough = counts >= 2
        usable = enough.sum(1) >= (2 if of_classes else 1)
        if not usable.any():
            what = "of two classes or more" if of_classes else ""
            raise InputError(
                f"no group has two rows or more {what}".rstrip() + ": there is nothing to adapt to"
            )
        half = int(counts[enough & usable[:, None]].min()) // 2
        shots = min(half, 5 if of_classes else 10) if self.shots is None else self.shots
        query_shots = shots if self.query_shots is None else self.query_shots
        episodes = GroupEpisodes(
            source,
            shots=shots,
            query_shots=query_shots,
            seed=seed,
            small="leave out",
            fewer_classes=of_classes,
        )
        self.left_out_ = [name for name, _ in episodes.left_out]
        if self.left_out_:
            warnings.warn(
                f"{len(self.left_out_)} of {len(source)} groups have too few rows for {shots} shots and {query_shots} "
                f"query rows{' of two classes' if of_classes else ''}, and are left out: {few(self.left_out_)}",
                UserWarning,
                stacklevel=4,
            )
        return episodes


class MetaClassifier(ClassifierMixin, _Meta):
    """A multi-layer perceptron that `fit` meta-trains by FOMAML, so that a few rows of a new task suffice.

    Tasks are groups of rows, with the same classes in all; without groups they are random rows of all. `predict` is of
    the network adapted to all rows of `fit`; `adapt` gives an estimator of a new task.

    Parameters
    ----------
    hidden : int or sequence of int, default=(64, 64)
        The widths of the hidden layers. Inputs are standardised by the rows of `fit`.
    inner_lr, inner_steps : float, default=0.1 and int, default=5
        Step size and number of the gradient steps that adapt to a task.
    meta_lr, iterations, meta_batch_size : float, default=0.005, int, default=500 and int, default=4
        Of the outer loop: Adam's step size, which ends at 0 along a cosine; its steps, and the tasks of each.
    shots, query_shots : int, default=None
        Rows of each class that a task adapts to, and is judged by. By default half of the smallest class of a group, at
        most 5; and as many.
    first_order : bool, default=None
        Whether to leave out second derivatives: by default yes, by FOMAML.
    random_state : int, RandomState instance or None, default=None
        Decides the weights that training starts from, and the tasks.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes, sorted.
    learner_ : MetaLearner
        What was meta-trained; it takes rows as they are.
    adapted_ : FewShotClassifier
        The same adapted to all rows of `fit`.
    loss_curve_ : list of float
        The meta-loss of each iteration.
    left_out_ : list of str
        Groups that have too few rows.
    n_features_in_ : int
        Features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where these are all text.
    """

    def fit(self, X: Any, y: Any, groups: Any = None) -> MetaClassifier:
        """Meta-train.

        X: (rows, features). y: (rows,) labels of any kind. groups: (rows,) the key of each row's task, text or numbers.

        Raises:
            InputError: one class only, or no group with two rows of two classes.
            ValueError: arrays that are none for scikit-learn.

        Warns: groups that have too few rows, and are left out.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        labels = as_labels(y)
        classes = np.unique(labels)
        names = [key_of(value) for value in classes]
        self._meta_train(X, [key_of(label) for label in labels], groups, names)
        self.classes_ = classes
        self.adapted_ = FewShotClassifier(self.learner_, classes=classes).fit(X, labels)
        return self

    def adapt(self, X: Any, y: Any) -> FewShotClassifier:
        """An estimator of a new task, fitted on its rows, of some or all of the same classes.

        Raises:
            InputError: a class that is none of `classes_`.
            NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        validate_data(self, X, reset=False, dtype=np.float64)
        return FewShotClassifier(self.learner_, classes=self.classes_).fit(X, y)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(rows, classes) probabilities, in the order of `classes_`."""
        check_is_fitted(self)
        return self.adapted_.predict_proba(validate_data(self, X, reset=False, dtype=np.float64))

    def predict(self, X: Any) -> np.ndarray:
        """(rows,) the most probable class of each."""
        check_is_fitted(self)
        return self.adapted_.predict(validate_data(self, X, reset=False, dtype=np.float64))


class MetaRegressor(RegressorMixin, _Meta):
    """A multi-layer perceptron that `fit` meta-trains by MAML, so that a few rows of a new task suffice.

    Tasks are groups of rows; without groups they are random rows of all. `predict` is of the network adapted to all
    rows of `fit`; `adapt` gives an estimator of a new task.

    Parameters
    ----------
    hidden : int or sequence of int, default=(64, 64)
        The widths of the hidden layers. Inputs and targets are standardised by the rows of `fit`.
    inner_lr, inner_steps : float, default=0.1 and int, default=5
        Step size and number of the gradient steps that adapt to a task.
    meta_lr, iterations, meta_batch_size : float, default=0.005, int, default=500 and int, default=4
        Of the outer loop: Adam's step size, which ends at 0 along a cosine; its steps, and the tasks of each.
    shots, query_shots : int, default=None
        Rows that a task adapts to, and is judged by. By default half of the smallest group, at most 10; and as many.
    first_order : bool, default=None
        Whether to leave out second derivatives: by default no, as the squared error needs them.
    random_state : int, RandomState instance or None, default=None
        Decides the weights that training starts from, and the tasks.

    Attributes
    ----------
    learner_ : MetaLearner
        What was meta-trained; it takes rows, and gives targets, as they are.
    adapted_ : FewShotRegressor
        The same adapted to all rows of `fit`.
    loss_curve_ : list of float
        The meta-loss of each iteration, of standardised targets.
    left_out_ : list of str
        Groups that have too few rows.
    n_features_in_ : int
        Features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where these are all text.
    """

    def fit(self, X: Any, y: Any, groups: Any = None) -> MetaRegressor:
        """Meta-train.

        X: (rows, features). y: (rows,) or (rows, targets) numbers. groups: (rows,) the key of each row's task.

        Raises:
            InputError: a target that is the same in all rows, or no group with two rows.
            ValueError: arrays that are none for scikit-learn.

        Warns: groups that have too few rows, and are left out.
        """
        X, y = validate_data(
            self, X, y, dtype=np.float64, ensure_min_samples=2, multi_output=True, y_numeric=True
        )
        self._meta_train(X, np.asarray(y, dtype=np.float64).reshape(len(y), -1), groups, None)
        self.adapted_ = FewShotRegressor(self.learner_).fit(X, y)
        return self

    def adapt(self, X: Any, y: Any) -> FewShotRegressor:
        """An estimator of a new task, fitted on its rows.

        Raises:
            NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        validate_data(self, X, reset=False, dtype=np.float64)
        return FewShotRegressor(self.learner_).fit(X, y)

    def predict(self, X: Any) -> np.ndarray:
        """(rows,) or (rows, targets) values, as `y` was."""
        check_is_fitted(self)
        return self.adapted_.predict(validate_data(self, X, reset=False, dtype=np.float64))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class _Standardised(nn.Module):
    """A network of standardised inputs, whose outputs are in the targets' own unit; classes have none."""

    mean: Tensor
    deviation: Tensor
    offset: Tensor
    unit: Tensor

    def __init__(self, network: nn.Module, inputs: Standard, targets: Standard | None):
        super().__init__()
        self.network = network
        for name, values in zip(("mean", "deviation"), _tensors(inputs)):
            self.register_buffer(name, values)
        for name, values in zip(("offset", "unit"), _tensors(targets or Standard([0.0], [1.0]))):
            self.register_buffer(name, values)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network((inputs - self.mean) / self.deviation) * self.unit + self.offset


class _StandardisedError(nn.Module):
    """The mean squared error in units of the targets' deviations, so that step sizes do not depend on their unit."""

    unit: Tensor

    def __init__(self, targets: Standard):
        super().__init__()
        self.register_buffer("unit", _tensors(targets)[1])

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs / self.unit, targets / self.unit)


def _tensors(standard: Standard) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(standard.mean, dtype=torch.float64)
    return mean, torch.tensor([own or 1.0 for own in standard.deviation], dtype=torch.float64)
