"""A device that is not the CPU, played by the CPU: it holds what a GPU or Apple's MPS holds against a program.

`with Elsewhere() as machine` lends torch's device "meta" numbers: a tensor that is moved there computes on the CPU,
and counts as being elsewhere. What fails on such a device fails here: float64, which MPS lacks, and tensors of two
devices in one operation. What waits for it, and what is copied to it, is counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from fomaml.data.source import ClassSource
from fomaml.episodes import Episodes

DEVICE = torch.device("meta")
aten = torch.ops.aten
# what a GPU has finished before the CPU goes on
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor, aten.is_nonzero.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MIXED = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, *INDEXING}


class Away(Tensor):
    """A tensor elsewhere. held: its numbers, on the CPU."""

    held: Tensor
    machine: Elsewhere

    @staticmethod
    def __new__(cls, held: Tensor, machine: Elsewhere) -> Away:
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )

    def __init__(self, held: Tensor, machine: Elsewhere):
        self.held, self.machine = held, machine

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_meta = False  # it holds numbers

    def __deepcopy__(self, memo: dict) -> Tensor:
        found = Away(self.held.clone(), self.machine).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            found = torch.nn.Parameter(found.detach(), self.requires_grad)
        memo[id(self)] = found
        return found

    def tolist(self) -> list:
        self.machine.waits["tolist"] += 1
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        machine = next(each.machine for each in tree_leaves((args, kwargs)) if isinstance(each, Away))
        return machine.run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """dead: whether an index or a label out of range has ended in an assertion of the device, after which nothing runs.
    waits: how often each operation has waited for the device. copies: how often numbers were copied to it: "copy",
    which waits, or "copy without waiting".
    """

    device = DEVICE

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.dead = False
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Elsewhere:
        tensor, as_tensor = torch.tensor, torch.as_tensor

        # of lists torch makes tensors on this device at once, without numbers
        def made(function: Any) -> Any:
            return lambda data, *rest, device=None, **more: (
                function(data, *rest, **more) if device is None else function(data, *rest, **more).to(device)
            )

        def new(own: Tensor, data: Any, dtype: Any = None, device: Any = None) -> Tensor:
            return tensor(data, dtype=own.dtype if dtype is None else dtype).to(device or own.device)

        self.patch.setattr(torch, "tensor", made(tensor))
        self.patch.setattr(torch, "as_tensor", made(as_tensor))
        self.patch.setattr(Tensor, "new_tensor", new)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        some_away = any(isinstance(each, Away) for each in given)
        asked = kwargs.get("device")
        away = some_away if asked is None else torch.device(asked).type == DEVICE.type
        self._look(func, args, kwargs, given, some_away, away)
        if self.dead and (some_away or away):
            raise RuntimeError("CUDA error: device-side assert triggered")
        try:
            found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        except (IndexError, RuntimeError) as error:
            self.dead = (some_away or away) and "out of" in str(error)
            raise
        if not away:
            return found
        found = tree_map(lambda each: Away(each, self) if isinstance(each, Tensor) else each, found)
        for each in tree_leaves(found):
            if isinstance(each, Away) and each.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func}: the device has no {each.dtype}")
        return return_and_correct_aliasing(func, args, kwargs, found) if some_away else found

    def _look(
        self, func: Any, args: tuple, kwargs: dict, given: list[Tensor], some_away: bool, away: bool
    ) -> None:
        here = [each for each in given if not isinstance(each, Away) and each.dim()]
        if some_away and here and func not in MIXED:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if not some_away and func is not aten._to_copy.default:
            return
        name = func._schema.name.removeprefix("aten::")
        if func in WAITS:
            self.waits[name] += 1
        if func in INDEXING:
            indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
            if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
                self.waits[f"{name} by a mask"] += 1
            if any(not isinstance(each, Away) and each.dim() for each in indices):
                self.copies["copy"] += 1
        source = args[1] if func is aten.copy_.default else args[0] if args else None
        if func in (aten.copy_.default, aten._to_copy.default):
            target_away = isinstance(args[0], Away) if func is aten.copy_.default else away
            if target_away and not isinstance(source, Away):
                quick = kwargs.get("non_blocking") or (
                    func is aten.copy_.default and len(args) > 2 and args[2]
                )
                self.copies["copy without waiting" if quick else "copy"] += 1
            elif isinstance(source, Away) and not target_away:
                self.waits["copy to the CPU"] += 1


def _held(each: Any) -> Any:
    if isinstance(each, Away):
        return each.held
    if isinstance(each, torch.device) and each.type == DEVICE.type:
        return torch.device("cpu")
    return each


# --- what is computed there ----

INPUTS = torch.randn(48, 1, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6).repeat_interleave(8)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3))


def classes(device, **more) -> Episodes:
    own = {"ways": 3, "shots": 1, "query_shots": 2, **more}
    return Episodes(ClassSource(INPUTS, LABELS).to(device), **own)
