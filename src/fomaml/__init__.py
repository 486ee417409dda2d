"""First-order MAML and its relatives on any PyTorch module."""

from typing import TYPE_CHECKING

from fomaml.data.groups import GroupSource
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.engines import MetaGradient, meta_gradient
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.evaluate import Estimate, estimate, evaluate
from fomaml.group_episodes import GroupEpisodes
from fomaml.learning.adapt import SGD, Adam, FastModel, Sign
from fomaml.learning.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    FOMAML,
    MAML,
    MAMLPlusPlus,
    MetaSGD,
    ProtoMAML,
    Reptile,
    SignMAML,
    ZeroHeadMAML,
    iMAML,
)
from fomaml.learning.learner import MetaLearner
from fomaml.metrics import Metric
from fomaml.models import MLP, BatchNorm, Conv4, Conv4Strided, WithContext, convert_batch_norm
from fomaml.submodules import submodules
from fomaml.tasks import Examples, Task
from fomaml.train import fomaml_train, train

__version__ = "0.1.0"

if TYPE_CHECKING:  # a checker of types is to know all modules, and no other name
    from fomaml import ahead as ahead
    from fomaml import app as app
    from fomaml import backbones as backbones
    from fomaml import baselines as baselines
    from fomaml import blocks as blocks
    from fomaml import check as check
    from fomaml import checkpoint as checkpoint
    from fomaml import choices as choices
    from fomaml import data as data
    from fomaml import devices as devices
    from fomaml import draws as draws
    from fomaml import engines as engines
    from fomaml import episodes as episodes
    from fomaml import errors as errors
    from fomaml import features as features
    from fomaml import files as files
    from fomaml import finite as finite
    from fomaml import group_episodes as group_episodes
    from fomaml import layout as layout
    from fomaml import learning as learning
    from fomaml import measures as measures
    from fomaml import memory as memory
    from fomaml import metrics as metrics
    from fomaml import models as models
    from fomaml import optimizers as optimizers
    from fomaml import outer as outer
    from fomaml import portions as portions
    from fomaml import ranks as ranks
    from fomaml import regular as regular
    from fomaml import scoring as scoring
    from fomaml import sealed as sealed
    from fomaml import serve as serve
    from fomaml import streams as streams
    from fomaml import tasks as tasks
    from fomaml import threads as threads
    from fomaml import trees as trees
    from fomaml import tuning as tuning
    from fomaml.app.estimators import FewShotClassifier as FewShotClassifier
    from fomaml.app.estimators import FewShotRegressor as FewShotRegressor
    from fomaml.app.meta_estimators import MetaClassifier as MetaClassifier
    from fomaml.app.meta_estimators import MetaRegressor as MetaRegressor
    from fomaml.app.serving import AdaptedModel as AdaptedModel
    from fomaml.app.serving import Run as Run
    from fomaml.app.serving import load_adapted as load_adapted
    from fomaml.app.serving import load_run as load_run
else:
    LATE = {
        "FewShotClassifier": ("app.estimators", "FewShotClassifier"),
        "FewShotRegressor": ("app.estimators", "FewShotRegressor"),
        "MetaClassifier": ("app.meta_estimators", "MetaClassifier"),
        "MetaRegressor": ("app.meta_estimators", "MetaRegressor"),
        "AdaptedModel": ("app.serving", "AdaptedModel"),
        "Run": ("app.serving", "Run"),
        "load_adapted": ("app.serving", "load_adapted"),
        "load_run": ("app.serving", "load_run"),
    }
    __getattr__, __dir__ = submodules(__name__, LATE)

__all__ = [
    "ANIL", "BOIL", "CAVIA", "FOMAML", "MAML", "MLP", "SGD", "Adam", "BatchNorm", "ClassSource", "Conv4",
    "Conv4Strided", "Episodes", "Estimate", "Examples", "FastModel", "GroupEpisodes", "GroupSource", "InputError",
    "MAMLPlusPlus", "MetaGradient", "MetaLearner", "MetaSGD", "Metric", "ProtoMAML", "RegressionEpisodes",
    "Reptile", "Sign", "SignMAML", "Sinusoids", "Task", "WithContext", "ZeroHeadMAML", "convert_batch_norm",
    "estimate", "evaluate", "fomaml_train", "iMAML", "meta_gradient", "train",
]  # fmt: skip
