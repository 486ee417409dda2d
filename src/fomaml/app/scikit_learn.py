"""What the estimators use of scikit-learn, which is of an extra."""

from fomaml.errors import InputError

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import (
        check_array,
        check_consistent_length,
        check_is_fitted,
        column_or_1d,
        validate_data,  # from 1.6 on
    )
except ImportError:
    raise InputError(
        "the estimators need scikit-learn, 1.6 or later: pip install 'fomaml[sklearn]'"
    ) from None

__all__ = [
    "BaseEstimator", "ClassifierMixin", "RegressorMixin", "check_array", "check_classification_targets",
    "check_consistent_length", "check_is_fitted", "check_random_state", "column_or_1d", "validate_data",
]  # fmt: skip
