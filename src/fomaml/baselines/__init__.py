"""What meta-learning is measured against on the same tasks: networks that are not meta-learned, and none at all."""

from fomaml.baselines.centroid import nearest_centroid
from fomaml.baselines.estimators import Chosen, fit_estimator, space_of, tune_estimator
from fomaml.baselines.fitting import ESTIMATORS
from fomaml.baselines.networks import Tuned, fine_tune, pretrain, unadapted
from fomaml.baselines.pool import Pool, pooled
from fomaml.submodules import submodules

__all__ = [
    "ESTIMATORS", "Chosen", "Pool", "Tuned", "fine_tune", "fit_estimator", "nearest_centroid", "pooled", "pretrain",
    "space_of", "tune_estimator", "unadapted",
]  # fmt: skip

__getattr__, __dir__ = submodules(__name__)
