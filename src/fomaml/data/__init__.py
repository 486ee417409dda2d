"""Where examples come from: datasets, tables and arrays with a task key, folders, MNIST, Omniglot; augmentation."""

from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)
