"""First-order MAML and its relatives on any PyTorch module."""

from fomaml.adapt import SGD, Adam, FastModel, Sign
from fomaml.algorithms import FOMAML, MAML, MetaLearner, Reptile
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.engines import MetaGradient, meta_gradient
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.evaluate import Estimate, estimate, evaluate
from fomaml.models import MLP, BatchNorm, Conv4, Conv4Strided
from fomaml.tasks import Examples, Task
from fomaml.train import fomaml_train, train

__version__ = "0.1.0"

__all__ = [
    "FOMAML", "MAML", "MLP", "SGD", "Adam", "BatchNorm", "ClassSource", "Conv4", "Conv4Strided", "Episodes",
    "Estimate", "Examples", "FastModel", "InputError", "MetaGradient", "MetaLearner", "RegressionEpisodes",
    "Reptile", "Sign", "Sinusoids", "Task", "estimate", "evaluate", "fomaml_train", "meta_gradient", "train",
]  # fmt: skip
