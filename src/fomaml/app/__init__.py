"""The command line and run directories."""

from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)
