"""Networks: those of the papers, small ones for series, tables and signals, and a batch norm right under vmap."""

from fomaml.models.norms import (
    NATIVE_BATCH_NORMS,
    NATIVE_NORMS,
    BatchNorm,
    Seen,
    convert_batch_norm,
    native_batch_norms,
    normalising,
    refuse_native,
    unmoved_norms,
    warn_of_unmoved,
)
from fomaml.models.papers import MLP, Conv4, Conv4Strided, Conv4StridedFlat, WithContext
from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)

__all__ = [
    "MLP", "NATIVE_BATCH_NORMS", "NATIVE_NORMS", "BatchNorm", "Conv4", "Conv4Strided", "Conv4StridedFlat", "Seen",
    "WithContext", "convert_batch_norm", "native_batch_norms", "normalising", "refuse_native", "unmoved_norms",
    "warn_of_unmoved",
]  # fmt: skip
