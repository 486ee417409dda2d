"""How a whole meta-batch is computed: the same meta-gradient three ways, and the plan that says by which."""

from fomaml.engines.adaptation import Adapter, adapt, adapter
from fomaml.engines.common import Engine, MetaGradient
from fomaml.engines.plan import ENGINES, Plan, choose, plan
from fomaml.engines.probes import check_outputs
from fomaml.engines.short import curve, curve_at, meta_gradient
from fomaml.submodules import submodules

__all__ = [
    "ENGINES", "Adapter", "Engine", "MetaGradient", "Plan", "adapt", "adapter",
    "check_outputs", "choose", "curve", "curve_at", "meta_gradient",
    "plan",
]  # fmt: skip

__getattr__, __dir__ = submodules(__name__)
