"""How one task is learned: the inner loop, step sizes, starts, objectives, `MetaLearner`, the algorithms."""

from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)
