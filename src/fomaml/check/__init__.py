"""Does a module of one's own go with this library? Tries it; says in plain words what would go wrong, and the cure."""

from fomaml.check.findings import Finding, Report
from fomaml.check.verdict import check
from fomaml.submodules import submodules

__all__ = ["Finding", "Report", "check"]

__getattr__, __dir__ = submodules(__name__)
