"""Kernels for CPUs, their build, and the threads they run on."""

from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)
