"""What was learned, in use: raw inputs made ready as in training, adapted models, calibrated probabilities."""

from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)
