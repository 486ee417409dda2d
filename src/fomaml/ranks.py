"""The processes of a group on torch.distributed: who takes which tasks, and what they tell each other.

No wrapper around the module: replicas of it and `torch.func` do not meet the hooks of `DistributedDataParallel`.
Nothing is sent as a pickle: tensors of numbers, and texts as bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch import Tensor, distributed

from fomaml.devices import forked_random
from fomaml.draws import generator
from fomaml.errors import InputError, in_one_line, positive

LINE = 512  # bytes of the text of an error that are sent
BLOCK = 1 << 22  # numbers that are gathered at once
PIECES = 8  # that a meta-batch is cut into, where the bits are to be the same for any number of processes
OTHERS = 1 << 20  # of the streams of random numbers, from here on those that are no piece's


class RankError(RuntimeError):
    """Another process of the group has failed by no fault of the input, or has ended."""


class Ranks:
    """The processes of a group, each a rank from 0, and what they tell each other.

    group: of torch.distributed, such as `torch.distributed.group.WORLD`; None for this process alone.
    same_bits: the same bits for any number of processes, on one kind of processor and one torch: tasks are computed in
        pieces of their global range, each by one rank on `threads` threads, and added up in the order of the pieces.
    threads: of each process, where same_bits is asked for. piece: so many tasks of a meta-batch in a piece of it, by
        default an eighth of it.
    notes: called once in each outer step, as late as can be: numbers of 0 or more, as many on each rank, to be added up
        over the ranks, such as whether this process was asked to stop. Their sums are then `noted`, equal on all ranks.

    Raises:
        InputError: no group, or one without this process.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        same_bits: bool = False,
        threads: int = 1,
        piece: int | None = None,
        notes: Callable[[], Sequence[float]] = lambda: (),
    ):
        self.group, self.same_bits, self.notes = group, same_bits, notes
        self.threads = positive("threads", threads, integer=True)
        self.piece = None if piece is None else positive("piece", piece, integer=True)
        self.noted: list[float] = []
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")  # where what is sent lies
        if group is None:
            return
        if group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise InputError("this process is none of the group: call it in the processes that are")
        if not isinstance(group, distributed.ProcessGroup):
            kind = type(group).__name__
            raise InputError(
                f"group is one of torch.distributed, such as torch.distributed.group.WORLD, got a {kind}"
            )
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        backends = dict(each.split(":") for each in distributed.get_backend_config(group).split(","))
        if "cpu" not in backends:
            kind = next(iter(backends))
            self.device = torch.device(kind, torch.get_device_module(kind).current_device())

    # --- shares -------------------------------------------------------------------------------------

    def share(self, number: int, rank: int | None = None) -> range:
        """Which of so many things in a row a rank takes, this one by default: the first are rank 0's."""
        rank = self.rank if rank is None else rank
        each, rest = divmod(number, self.size)
        first = rank * each + min(rank, rest)
        return range(first, first + each + (rank < rest))

    def pieces(self, tasks: int) -> list[range]:
        """The pieces of so many tasks: one for each rank that gets any; for the same bits whatever the ranks are."""
        if self.same_bits:
            size = self.piece or math.ceil(tasks / PIECES)
            return [range(start, min(start + size, tasks)) for start in range(0, tasks, size)]
        return [own for rank in range(self.size) if (own := self.share(tasks, rank))]

    def portions(self, tasks: int, most: int) -> list[range]:
        """The pieces of so many tasks that are evaluated, of at most so many tasks each."""
        if self.same_bits:
            most = min(most, math.ceil(tasks / PIECES))
        elif self.size > 1:
            most = min(most, math.ceil(tasks / self.size))
        return [range(start, min(start + most, tasks)) for start in range(0, tasks, most)]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it the number of threads is the one that the bits depend on."""
        before = torch.get_num_threads()
        if not self.same_bits or before == self.threads:
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def drawing(self, seed: int, index: int, piece: int) -> Iterator[None]:
        """Within it torch's random numbers are a function of the three alone, and none are taken from outside of it."""
        with forked_random():
            torch.manual_seed(int(generator(seed, index, piece).integers(2**63)))
            yield

    # --- what is told -------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on the device of what is given."""
        if self.group is None:
            return values
        sent = values.to(self.device, copy=True)
        with _reached():
            distributed.all_reduce(sent, group=self.group)
        return sent.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """That of each rank, of one shape and dtype, in their order."""
        if self.group is None:
            return [values]
        sent = values.to(self.device).contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)]
        with _reached():
            distributed.all_gather(found, sent, group=self.group)
        return [each.to(values.device) for each in found]

    def in_order(self, parts: Sequence[Tensor], number: int, like: Tensor) -> Tensor:
        """The sum of flat tensors, one for each of so many pieces, added in their order, whoever has which.

        parts: those of this rank's share, in order. like: of the same size, dtype and device.
        """
        most, total = len(self.share(number, 0)), torch.empty_like(like)
        for start in range(0, len(like), BLOCK):
            block = slice(start, start + BLOCK)
            own = like.new_zeros(most, len(like[block]))
            for row, part in zip(own, parts):
                row.copy_(part[block])
            gathered = self.gather(own)
            rows = chain.from_iterable(each[: len(self.share(number, r))] for r, each in enumerate(gathered))
            whole = next(rows).clone()
            for row in rows:
                whole += row
            total[block] = whole
        return total

    @torch.no_grad()
    def take_over(self, tensors: Sequence[Tensor]) -> None:
        """Set tensors to what rank 0 has in them."""
        if self.group is None or not tensors:
            return
        flat = torch.cat(
            [t.detach().contiguous().reshape(-1).view(torch.uint8).to(self.device) for t in tensors]
        )
        with _reached():
            distributed.broadcast(flat, src=distributed.get_global_rank(self.group, 0), group=self.group)
        if self.rank:
            sizes = [t.numel() * t.element_size() for t in tensors]
            for tensor, found in zip(tensors, flat.split(sizes)):
                tensor.copy_(found.clone().view(tensor.dtype).reshape(tensor.shape))

    def take_over_bytes(self, content: bytes) -> bytes:
        """What rank 0 has."""
        length = torch.tensor([len(content)])
        self.take_over([length])
        if not int(length):
            return b""
        own = torch.frombuffer(bytearray(content if self.rank == 0 else int(length)), dtype=torch.uint8)
        self.take_over([own])
        return own.numpy().tobytes()

    # --- agreement ----------------------------------------------------------------------------------

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Each rank does its own within it; what fails on one of them is then an error on all, so that none waits."""
        if self.group is None:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as found:  # whatever a module raises
            error = found
        if self.sum(torch.tensor([float(error is not None)])).item():
            self.fail(error)

    def fail(self, error: Exception | None) -> None:
        """Raise this rank's error, or, with the number of the rank, that of the first rank that has one.

        All ranks call it once one of them is known to have failed.
        """
        if self.group is None:
            assert error is not None
            raise error
        line = b"" if error is None else in_one_line(error).encode()[: LINE - 1]
        kind = 0 if error is None else 1 + isinstance(error, InputError)
        sent = torch.zeros(LINE, dtype=torch.uint8)
        sent[: len(line) + 1] = torch.tensor([kind, *line], dtype=torch.uint8)
        told = [bytes(each.tolist()) for each in self.gather(sent)]
        if error is not None:
            raise error
        rank, found = next((rank, each) for rank, each in enumerate(told) if each[0])
        text = found[1:].rstrip(b"\0").decode(errors="ignore")
        raise (InputError if found[0] == 2 else RankError)(f"{text} (rank {rank} of {self.size})")

    def check_same(self, given: Mapping[str, Any]) -> None:
        """Raise `InputError` on all ranks where they were not given the same. given: by name, what has a `repr`."""
        digests = [sha256(repr(value).encode()).digest()[:8] for value in given.values()]
        own = torch.tensor([int.from_bytes(each, "big", signed=True) for each in digests])
        for name, *values in zip(given, *(each.tolist() for each in self.gather(own))):
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                raise InputError(
                    f"{name} of rank {other} is not that of rank 0: give all {self.size} ranks the same"
                )

    def fewest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return min(int(each) for each in self.gather(torch.tensor([number])))

    def union(self, keys: Set[str]) -> set[str]:
        """All ranks' keys, each of 16 hexadecimal digits."""
        number = -self.fewest(-len(keys))
        own = [int.from_bytes(bytes.fromhex(key), "big", signed=True) for key in sorted(keys)]
        found = self.gather(
            torch.tensor([[1, key] for key in own] + [[0, 0]] * (number - len(own))).reshape(number, 2)
        )
        return {
            key.to_bytes(8, "big", signed=True).hex()
            for each in found
            for is_key, key in each.tolist()
            if is_key
        }


@contextmanager
def _reached() -> Iterator[None]:
    """Within it processes are told something: one that has ended, or cannot be reached, is a `RankError`."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"a process of the group has ended, or cannot be reached: {in_one_line(error)}"
        ) from error


def as_ranks(group: Any) -> Ranks:
    """Those that `group` stands for, see `train`."""
    return group if isinstance(group, Ranks) else Ranks(group)


def digest_of(state: Any) -> str:
    """Of nested containers of tensors and plain values, as an optimiser's state is."""
    found = sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            found.update(repr((value.dtype, value.shape)).encode())
            found.update(flat.numpy().tobytes())
        elif isinstance(value, Mapping):
            for key, own in value.items():
                found.update(repr(key).encode())
                add(own)
        elif isinstance(value, list | tuple):
            for own in value:
                add(own)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()
