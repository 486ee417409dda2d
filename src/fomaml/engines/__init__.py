"""How a whole meta-batch is computed: the same meta-gradient three ways."""

from fomaml.engines.common import MetaGradient
from fomaml.engines.plan import ENGINES, check_outputs, choose, curve, curve_at, meta_gradient

__all__ = ["ENGINES", "MetaGradient", "check_outputs", "choose", "curve", "curve_at", "meta_gradient"]
