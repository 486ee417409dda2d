"""A learner or a run as an estimator of scikit-learn: `fit` on a handful of examples adapts it, `predict` asks it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fomaml.app.scikit_learn import (
    BaseEstimator,
    ClassifierMixin,
    RegressorMixin,
    check_array,
    check_classification_targets,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)
from fomaml.app.serving import Run, Served, load_run
from fomaml.choices import check_choice
from fomaml.data.keys import key_of
from fomaml.data.scaling import Scaling
from fomaml.errors import InputError, in_one_line, shown
from fomaml.learning.learner import MetaLearner
from fomaml.metrics import ignored_label
from fomaml.serve.adapted import AdaptedModel, Predictions
from fomaml.serve.intake import Taken
from fomaml.serve.pictures import Pictures
from fomaml.serve.rows import ArrayRows, TableRows
from fomaml.tasks import Examples


class _FewShot(BaseEstimator):
    """What both kinds have in common: the learner, and what is read of the inputs."""

    model_: AdaptedModel

    def __init__(self, learner: Any, *, steps: Any = None, statistics: Any = "support"):
        self.learner = learner
        self.steps = steps
        self.statistics = statistics

    def _inputs(self, X: Any, opened: MetaLearner | Run | None = None) -> Any:
        """The inputs as the intake takes them. opened: in `fit`, which keeps what they are."""
        fitting = opened is not None
        if not fitting:
            check_is_fitted(self)
        intake = self.model_.intake if opened is None else opened.intake if isinstance(opened, Run) else None
        if isinstance(intake, Pictures):
            return _pictures(X)
        if isinstance(intake, TableRows):
            if not hasattr(X, "iloc"):
                X = validate_data(self, X, reset=fitting, dtype=np.float64)
                return _frame(X, intake)
            validate_data(self, X, reset=fitting, skip_check_array=True)
            return X
        if isinstance(intake, ArrayRows):
            if len(intake.keys) > 1:
                raise InputError(
                    f"the run takes the arrays {', '.join(intake.keys)}, and an estimator has one: use "
                    "fomaml.load_run(…).adapt"
                )
            return {intake.keys[0]: validate_data(self, X, reset=fitting, allow_nd=True)}
        if intake is not None and not isinstance(intake, _Arrays):
            raise InputError(
                "an estimator has one row for each target, and the run reads recordings: use "
                "fomaml.load_run(…).adapt"
            )
        return validate_data(self, X, reset=fitting, allow_nd=True)

    def _adapted(self, opened: MetaLearner | Run, X: Any, y: Any, classes: list[str] | None) -> AdaptedModel:
        """The model that examples make. y: texts of a run of classes, numbers of a learner, (rows, targets) values."""
        if isinstance(opened, Run):
            support = _labelled(opened.intake, self._inputs(X, opened), y)
            return opened.adapt(support, steps=self.steps, statistics=self.statistics)
        check_choice("statistics of an adapted model", self.statistics, Served)
        if isinstance(self.steps, str):
            raise InputError(f"steps is a whole number for a learner, got {shown(self.steps)}")
        intake = _Arrays.of(opened.model)
        inputs = intake.inputs(self._inputs(X, opened)).inputs
        targets = torch.from_numpy(np.array(y))
        if targets.is_floating_point():
            targets = targets.to(intake.dtype)
        support = Examples(inputs, targets.to(intake.device))
        names = None if classes is not None else [f"target {n}" for n in range(targets.shape[1])]

        def made(module: nn.Module) -> AdaptedModel:
            return AdaptedModel(module.eval(), intake, classes, names, Scaling(), opened.output, 1.0, {})

        _check_shapes(made, opened, support, len(classes or names or []))
        return made(opened.adapt(support, self.steps, self.statistics))

    def _predictions(self, X: Any) -> Predictions:
        given = self._inputs(X)
        found = self.model_.predict(given)
        number = len(next(iter(given.values()))) if isinstance(given, dict) else len(given)
        if len(found) != number:  # rows with missing values, which a run may leave out
            raise InputError(
                f"{number} rows were given, but {len(found)} are predicted: leave out the others"
            )
        return found


class FewShotClassifier(ClassifierMixin, _FewShot):
    """A learner or a run that `fit` adapts to a handful of labelled examples; the learner itself never changes.

    Parameters
    ----------
    learner : MetaLearner, Run, str or path
        A learner with one output for each class; or a run of `fomaml train`, whose inputs are read as in training.
    steps : int or "auto", default=None
        Inner steps; None for the learner's own, or as many as the run's figure is of; "auto", of a calibrated run, for
        those that were best in validation.
    statistics : {"support", "own"}, default="support"
        Whose examples batch norms normalise by: those of `fit`, so that each row is judged alone, or those that are
        judged together.
    classes : array-like, default=None
        The classes of a learner's outputs in their order, where they are the same in all tasks; None for those of `y`,
        sorted. A run knows by itself.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The classes, sorted.
    model_ : AdaptedModel
        What was adapted; `model_.module` is an ordinary `nn.Module`.
    n_features_in_ : int
        Features seen in `fit`; not of pictures.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where these are all text.
    """

    classes_: np.ndarray

    def __init__(self, learner: Any, *, steps: Any = None, statistics: Any = "support", classes: Any = None):
        super().__init__(learner, steps=steps, statistics=statistics)
        self.classes = classes

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Adapt to labelled examples.

        X: (rows, ...), of the shape that the learner takes. Whole numbers are kept where its model has an embedding,
            else they are as floating ones. For runs of tables a DataFrame, or an array of the features in order; for
            runs of pictures paths, images of Pillow or arrays. y: (rows,) labels of any kind.

        Raises:
            InputError: examples that are none for the learner; more classes than it has outputs; one class only.
        """
        opened = _opened(self.learner)
        labels = as_labels(y)
        check_consistent_length(X, labels)
        values = np.unique(labels)
        names = [key_of(value) for value in values]
        if len(set(names)) < len(names):
            raise InputError(
                f"the labels {shown(values.tolist())} hold different ones that are the same as text"
            )
        if (
            len(values) < 2
            and self.classes is None
            and not (isinstance(opened, Run) and opened.settings.fixed_classes)
        ):
            raise InputError(f"all examples are of the class {names[0]!r}: two classes or more are needed")
        texts = [key_of(label) for label in labels]
        if isinstance(opened, Run):
            if self.classes is not None:
                raise InputError("a run knows its classes: give no classes")
            if opened.settings.kind == "regression":
                raise InputError(f"the run {opened.path} predicts numbers: take a FewShotRegressor")
            self.model_ = self._adapted(opened, X, texts, [])
            assert self.model_.classes is not None
            known = self.model_.classes
        else:
            known = names if self.classes is None else [key_of(value) for value in np.asarray(self.classes)]
            numbers = {name: number for number, name in enumerate(known)}
            if unknown := [name for name in names if name not in numbers]:
                raise InputError(f"the class {unknown[0]!r} is none of the given: {', '.join(known)}")
            self.model_ = self._adapted(opened, X, np.array([numbers[text] for text in texts]), known)
        by_name = dict(zip(names, values))
        own = np.asarray([by_name[name] if name in by_name else _as(name, labels.dtype) for name in known])
        self._columns = np.argsort(own)
        self.classes_ = own[self._columns]
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """(rows, classes) probabilities, in the order of `classes_`; calibrated where the run is.

        Raises:
            InputError: rows that are none for the learner.
            NotFittedError: before `fit`.
        """
        probabilities = self._predictions(X).probabilities
        assert probabilities is not None
        return probabilities.numpy()[:, self._columns]

    def predict(self, X: Any) -> np.ndarray:
        """(rows,) the most probable class of each; raises as `predict_proba`."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]


class FewShotRegressor(RegressorMixin, _FewShot):
    """A learner or a run that `fit` adapts to a handful of examples; the learner itself never changes.

    Parameters
    ----------
    learner : MetaLearner, Run, str or path
        A learner with one output for each target, as (rows, targets); or a run of `fomaml train`, whose inputs and
        targets are read as in training.
    steps : int or "auto", default=None
        Inner steps; None for the learner's own, or as many as the run's figure is of.
    statistics : {"support", "own"}, default="support"
        Whose examples batch norms normalise by: those of `fit`, so that each row is judged alone, or those that are
        judged together.

    Attributes
    ----------
    model_ : AdaptedModel
        What was adapted; `model_.module` is an ordinary `nn.Module`.
    n_features_in_ : int
        Features seen in `fit`.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where these are all text.
    """

    def fit(self, X: Any, y: Any) -> FewShotRegressor:
        """Adapt to examples.

        X: as of `FewShotClassifier.fit`. y: (rows,) or (rows, targets) numbers in their own unit; the learner is
        given (rows, targets).

        Raises:
            InputError: examples that are none for the learner.
        """
        opened = _opened(self.learner)
        targets = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if targets.ndim not in (1, 2):
            raise InputError(f"y is (rows,) or (rows, targets), got shape {targets.shape}")
        check_consistent_length(X, targets)
        if isinstance(opened, Run) and opened.settings.kind != "regression":
            raise InputError(f"the run {opened.path} predicts classes: take a FewShotClassifier")
        if isinstance(opened, MetaLearner) and ignored_label(opened.criterion) is not None:
            raise InputError(
                "the learner's criterion is a cross-entropy, of classes: take a FewShotClassifier"
            )
        self.model_ = self._adapted(opened, X, targets.reshape(len(targets), -1), None)
        self._flat = targets.ndim == 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(rows,) or (rows, targets) values, as `y` was.

        Raises:
            InputError: rows that are none for the learner.
            NotFittedError: before `fit`.
        """
        values = self._predictions(X).values
        assert values is not None
        return values.numpy()[:, 0] if self._flat else values.numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


# --- what is given --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrays:
    """The intake of a bare learner: arrays, in the model's dtype and where it is. whole: whole numbers are kept."""

    dtype: torch.dtype
    device: torch.device
    whole: bool

    @classmethod
    def of(cls, model: nn.Module) -> _Arrays:
        own = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        whole = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
        return cls(own.dtype, own.device, whole)

    def inputs(self, given: Any) -> Taken:
        tensor = torch.from_numpy(np.array(given))  # a copy: torch warns of arrays that are read only
        if tensor.is_floating_point() or not self.whole:
            tensor = tensor.to(self.dtype)
        return Taken(tensor.to(self.device), [f"row {number}" for number in range(len(tensor))])

    def labelled(self, given: Any) -> Taken:
        raise InputError("labelled examples are given to fit, or to score")


def _opened(learner: Any) -> MetaLearner | Run:
    if isinstance(learner, MetaLearner | Run):
        return learner
    if isinstance(learner, str | os.PathLike):
        return load_run(os.fspath(learner))
    raise InputError(
        f"learner is a MetaLearner, a run or the path of a run directory, got a {type(learner).__name__}"
    )


def _check_shapes(
    made: Callable[[nn.Module], AdaptedModel], learner: MetaLearner, support: Examples, wanted: int
) -> None:
    """Raise `InputError` for rows that the learner does not take, and for outputs that are too few for the targets.

    It is asked of where adaptation starts, as a loss of labels beyond the outputs says nothing that helps.
    """
    inputs = support.inputs
    try:
        start = made(learner.adapt(support, 0))
        found = tuple(start.outputs(Taken(inputs[:1], ["row 0"])).shape[1:])
    except RuntimeError as error:
        shape = ", ".join(map(str, inputs.shape[1:]))
        raise InputError(
            f"the learner does not take rows of shape ({shape}): {in_one_line(error)}; it takes those of the shape "
            "that it was trained on"
        ) from error
    if found != (wanted,):
        raise InputError(
            f"the learner gives {_outputs(found)} for a row, and there are {wanted} "
            f"{'targets' if start.classes is None else 'classes'}: it needs an output for each"
        )


def _outputs(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} outputs" if len(shape) == 1 else f"outputs of shape {shape}"


def as_labels(y: Any) -> np.ndarray:
    """(rows,) labels, as scikit-learn takes them."""
    labels = column_or_1d(y, warn=True)
    check_classification_targets(labels)
    return labels


def _as(name: str, kind: np.dtype) -> Any:
    """A class that the run has and the labels lack, as one of their kind."""
    if kind.kind in "OUS":
        return name
    try:
        value = {"True": True, "False": False}[name] if kind.kind == "b" else kind.type(name)
    except (KeyError, ValueError):
        raise InputError(f"the labels are of dtype {kind}, and the run has the class {name!r}") from None
    return value


def _pictures(X: Any) -> Any:
    """Pictures, one for each label: an array of several, or a list."""
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OSU":
        if X.ndim not in (3, 4):
            raise InputError(
                f"pictures are (rows, height, width) or (rows, height, width, 3), got an array of shape {X.shape}"
            )
        return X
    if isinstance(X, str | os.PathLike):
        raise InputError(
            "several pictures are wanted, one for each label, got one path: give a list of paths"
        )
    return X if isinstance(X, torch.Tensor) else list(X)


def _frame(X: np.ndarray, intake: TableRows) -> Any:
    """The rows of an array as a table."""
    if intake.categories:
        raise InputError(
            f"the run has columns of text, {', '.join(intake.categories)}: give a DataFrame with its columns"
        )
    if X.shape[1] != len(intake.features):
        raise InputError(
            f"the run takes the {len(intake.features)} features {', '.join(intake.features)}, got {X.shape[1]}"
        )
    import pandas

    return pandas.DataFrame(X, columns=intake.features)


def _labelled(intake: Any, inputs: Any, y: Any) -> Any:
    """Inputs and labels as the intake of a run takes them together."""
    if isinstance(intake, Pictures):
        return inputs, y
    if isinstance(intake, ArrayRows):
        return {**inputs, intake.targets[0]: np.asarray(y)}
    columns = [list(y)] if np.ndim(y) == 1 else list(np.asarray(y).T)
    if len(columns) != len(intake.targets):
        raise InputError(f"the run has the targets {', '.join(intake.targets)}, got {len(columns)} in y")
    return inputs.assign(**dict(zip(intake.targets, columns)))
