"""How a whole meta-batch is computed: the same meta-gradient three ways, and the plan that says by which."""

from fomaml.engines.common import Engine, MetaGradient
from fomaml.engines.plan import ENGINES, Plan, choose, curve, curve_at, meta_gradient, plan
from fomaml.engines.probes import check_outputs
from fomaml.submodules import submodules

__all__ = [
    "ENGINES", "Engine", "MetaGradient", "Plan", "check_outputs", "choose", "curve", "curve_at", "meta_gradient",
    "plan",
]  # fmt: skip

__getattr__, __dir__ = submodules(__name__)
