"""Networks: those of the papers, small ones for series, tables and signals, and a batch norm right under vmap."""

from fomaml.models.low_rank import LoRALinear, lora
from fomaml.models.norms import (
    NATIVE_BATCH_NORMS,
    NATIVE_NORMS,
    BatchNorm,
    Seen,
    convert_batch_norm,
    is_moving,
    native_batch_norms,
    normalising,
    refuse_native,
    takes_statistics,
    third_order_is_refused,
    unmoved_norms,
    warn_of_unmoved,
)
from fomaml.models.papers import MLP, Conv4, Conv4Strided, Conv4StridedFlat, WithContext
from fomaml.models.series import ConvNet1d, GRUNet
from fomaml.models.signals import SIREN
from fomaml.models.tables import TableMLP
from fomaml.submodules import submodules

__getattr__, __dir__ = submodules(__name__)

__all__ = [
    "MLP", "NATIVE_BATCH_NORMS", "NATIVE_NORMS", "SIREN", "BatchNorm", "Conv4", "Conv4Strided", "Conv4StridedFlat",
    "ConvNet1d", "GRUNet", "LoRALinear", "Seen", "TableMLP", "WithContext", "convert_batch_norm", "is_moving",
    "lora", "native_batch_norms", "normalising", "refuse_native", "takes_statistics", "third_order_is_refused",
    "unmoved_norms", "warn_of_unmoved",
]  # fmt: skip
