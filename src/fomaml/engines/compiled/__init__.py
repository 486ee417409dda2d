"""The meta-gradient compiled: traced once for each shape of the tasks, compared, cached."""

from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)
