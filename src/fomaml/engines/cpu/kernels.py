"""Calls of the fused kernels for a CPU: of tensors, in the order of memory and with the memory that they want."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fomaml.blocks import Memory
from fomaml.engines.cpu.build import ARGUMENTS, library

NAMES = {torch.float32: "float32", torch.float64: "float64"}


@contextlib.contextmanager
def sharing(threads: int, memory: Memory) -> Iterator[None]:
    """The kernels that this thread calls share their tasks out to so many threads, and write into this memory."""
    memory.begin()
    _own.threads, _own.memory = threads, memory
    try:
        yield
    finally:
        _own.threads, _own.memory = 1, None


_own = threading.local()
SMALL = 16_000  # numbers, below which the system's allocator gives the same pages again


def _kernel(name: str, dtype: torch.dtype) -> Callable:
    """A kernel, to be called by this thread with the threads of `sharing`."""
    own = library(NAMES[dtype], stacked=name not in ARGUMENTS)
    own.use_threads(getattr(_own, "threads", 1))
    return getattr(own, f"{name}_{NAMES[dtype]}")


def _empty(like: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """For a kernel to write into, without gaps, in the memory of `sharing`."""
    memory = getattr(_own, "memory", None)
    if memory is None or shape.numel() < SMALL:
        return like.new_empty_strided(shape, strides)
    return memory.empty((shape.numel(),), like.dtype).as_strided(shape, strides)


def _images(like: Tensor, shape: torch.Size) -> Tensor:
    """Channels-last images for a kernel to write into."""
    return _empty(like, shape, _strides(shape))


def channels_last(images: Tensor) -> Tensor:
    """The images in that order of memory; with one channel `contiguous` keeps strides that convolutions take for the
    other.
    """
    return images.to(memory_format=torch.channels_last)


def misread(inputs: torch.Size, outputs: torch.Size) -> bool:
    """Whether torch 2.14 may make garbage of a float32 convolution of such images, if they or the weights are
    channels-last: it does for some of one channel, where the outputs are a column of single pixels.
    """
    return inputs[-3] == 1 and outputs[-1] == 1


def plain(images: Tensor) -> Tensor:
    """The images in the ordinary order of memory, also where they have one channel and `contiguous` does nothing."""
    return images.flatten().view(images.shape)


def norm_relu_pool(
    inputs: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of the batch (Ioffe & Szegedy 2015), ReLU and, with `pool`, a 2×2 max-pool.

    inputs: (examples, channels, height, width), float32 or float64, or with a leading axis of tasks, each a batch of
    its own; γ and β (channels,) or (tasks, channels). Returns the outputs, channels-last, and what
    `norm_relu_pool_backward` wants: the inputs channels-last, those that won their windows, mean, 1 / deviation.
    """
    inputs = in_order(inputs)
    *batch, channels, height, width = inputs.shape
    size = torch.Size([*batch, channels, height // 2, width // 2]) if pool else inputs.shape
    outputs = _images(inputs, size)
    won = _images(inputs, size) if pool else outputs
    mean, deviation = inputs.new_empty(2, *batch[:-1], channels)
    gamma, beta = _flat(gamma), _flat(beta)  # held until the kernel is done: it gets bare addresses
    pointers = _pointers(inputs, gamma, beta, outputs, won, mean, deviation)
    kernel = _kernel("forward", inputs.dtype)
    sizes = (*_batch(batch), height, width, channels, *map(_step, (gamma, beta)), pool)
    kernel(*pointers, _sizes(*sizes), eps)
    return outputs, inputs, won, mean, deviation


def norm_relu_pool_backward(
    slope: Tensor,
    outputs: Tensor,
    inputs: Tensor,
    won: Tensor,
    mean: Tensor,
    deviation: Tensor,
    gamma: Tensor | None,
    pool: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives by inputs, γ and β, given those by the outputs; `overwrite`: into the place of the inputs."""
    slope, outputs, inputs, won = map(in_order, (slope, outputs, inputs, won))
    *batch, channels, height, width = inputs.shape
    by_inputs = inputs if overwrite else _images(inputs, inputs.shape)
    by_gamma, by_beta = torch.empty_like(mean), torch.empty_like(mean)
    gamma = _flat(gamma)
    pointers = _pointers(slope, inputs, outputs, won, gamma, mean, deviation, by_inputs, by_gamma, by_beta)
    kernel = _kernel("backward", inputs.dtype)
    kernel(*pointers, _sizes(*_batch(batch), height, width, channels, _step(gamma), 0, pool))
    return by_inputs, by_gamma, by_beta


def convolution(
    inputs: Tensor, weights: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Convolutions of few pixels, task by task (convolution.cpp); `takes` says which.

    inputs: (tasks, examples, channels, height, width). weights: (tasks, outputs, channels, rows, columns) or, for
    all tasks the same, (outputs, channels, rows, columns); bias likewise. Of one task all without the axis of tasks.
    Outputs are channels-last.
    """
    inputs, weights, bias = in_order(inputs), in_order(weights), _flat(bias)
    sizes, size = _sizes_of(inputs.shape, weights.shape, _step(bias), tuple(stride), tuple(padding))
    outputs = _images(inputs, size)
    kernel = _kernel("convolve", inputs.dtype)
    kernel(*_pointers(inputs, weights, bias, outputs), sizes)
    return outputs


def convolution_backward(
    slope: Tensor,
    inputs: Tensor,
    weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The derivatives by inputs, weights and bias of each task, those that are `wanted`, given those by the outputs."""
    slope, inputs, weights = map(in_order, (slope, inputs, weights))
    sizes, _ = _sizes_of(inputs.shape, weights.shape, 0, tuple(stride), tuple(padding))
    tasks = inputs.shape[:-4]
    by_inputs = _images(inputs, inputs.shape) if wanted[0] else None
    by_weights = _images(weights, tasks + weights.shape[-4:]) if wanted[1] else None
    by_bias = slope.new_empty(tasks + slope.shape[-3:-2]) if wanted[2] else None
    kernel = _kernel("convolve_backward", inputs.dtype)
    kernel(*_pointers(slope, inputs, weights, by_inputs, by_weights, by_bias), sizes)
    return by_inputs, by_weights, by_bias


PIXELS = 60_000  # of the outputs of a task in a stack


def takes(
    inputs: Tensor,
    weights: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    by_inputs: bool = False,
    pixels: int = PIXELS,
) -> bool:
    """Whether `convolution` takes these, and is faster than torch's; by_inputs: for the derivatives by the inputs.

    pixels: at most so many of the outputs of a task. Of more torch's own are as quick in spite of what stacking theirs
        takes.
    """
    if inputs.dtype not in NAMES:
        return False
    return _takes(inputs.shape, weights.shape, tuple(stride), tuple(padding), by_inputs, pixels)


@functools.lru_cache(1000)  # asked at each call, where it would take as long as what stands around the kernel
def _takes(
    inputs: torch.Size,
    weights: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    by_inputs: bool,
    pixels: int,
) -> bool:
    height, width = (
        (size + 2 * around - kernel) // step + 1
        for size, kernel, step, around in zip(inputs[-2:], weights[-2:], stride, padding)
    )
    return inputs[-4] * height * width <= pixels and takes_channels(weights, by_inputs)


def sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over its first axis, the tasks."""
    if not all(tensor.dtype == tensors[0].dtype and _is_stack(tensor) for tensor in tensors):
        return [tensor.sum(0) for tensor in tensors]
    found = [tensor.new_empty_strided(tensor.shape[1:], tensor.stride()[1:]) for tensor in tensors]
    lengths = _sizes(*(tensor.numel() for tensor in found))
    kernel = _kernel("sums", tensors[0].dtype)
    kernel(_array(tensors), _array(found), lengths, len(tensors), len(tensors[0]))
    return found


def subtract(lefts: Sequence[Tensor], rights: Sequence[Tensor], scale: float) -> list[Tensor]:
    """left - scale · right of each pair; right (tasks, ...), left the same or of all tasks."""
    if not all(
        one.dtype == two.dtype == rights[0].dtype
        and _is_stack(two)
        and len(two) == len(rights[0])
        and (one.shape, one.stride()) in ((two.shape, two.stride()), (two.shape[1:], two.stride()[1:]))
        for one, two in zip(lefts, rights)
    ):
        return [torch.sub(one, two, alpha=scale) for one, two in zip(lefts, rights)]
    found = [_empty(right, right.shape, right.stride()) for right in rights]
    lengths = [right[0].numel() for right in rights]
    steps = [length if one.dim() == two.dim() else 0 for one, two, length in zip(lefts, rights, lengths)]
    kernel = _kernel("subtract", rights[0].dtype)
    arrays = map(_array, (lefts, rights, found))
    kernel(*arrays, _sizes(*lengths), _sizes(*steps), len(rights), len(rights[0]), scale)
    return found


def in_order(images: Tensor) -> Tensor:
    """The same images (..., channels, height, width), channels-last: themselves where they are."""
    if images.stride() == _strides(images.shape):
        return images
    return images.movedim(-3, -1).contiguous().movedim(-1, -3)


@functools.lru_cache(1000)
def _strides(images: torch.Size) -> tuple[int, ...]:
    """Of images that are channels-last."""
    *_, channels, height, width = images
    inner, found = channels * height * width, []
    for size in reversed(images[:-3]):
        found.append(inner)
        inner *= size
    return (*reversed(found), 1, width * channels, channels)


def takes_channels(weights: torch.Size, by_inputs: bool = False) -> bool:
    """Whether vectors run over the channels, or over the outputs where there are few of them."""
    return weights[-3] % 16 == 0 or (_is_narrow(weights) and not by_inputs)


def _is_narrow(weights: torch.Size) -> bool:
    """Whether vectors run over the outputs, as there are too few channels."""
    outputs, channels, rows, columns = weights[-4:]
    return channels % 16 != 0 and outputs % 16 == 0 and channels * rows * columns <= 64


@functools.lru_cache(1000)
def _sizes_of(
    inputs: torch.Size, weights: torch.Size, step: int, stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[ctypes.Array, torch.Size]:
    """What convolution.cpp wants to know, and the shape of the outputs."""
    *batch, channels, height, width = inputs
    outputs, _, rows, columns = weights[-4:]
    down = (height + 2 * padding[0] - rows) // stride[0] + 1
    across = (width + 2 * padding[1] - columns) // stride[1] + 1
    tasks, examples = _batch(batch)
    steps = (math.prod(weights[1:]) if len(weights) == 5 else 0, step)
    sizes = (examples, height, width, channels, outputs, rows, columns, *stride, *padding)
    return _sizes(tasks, *steps, _is_narrow(weights), *sizes), torch.Size([*batch, outputs, down, across])


def _is_stack(tensor: Tensor) -> bool:
    """Whether the numbers of one task after the other fill the tensor's memory, in any order of the other axes."""
    if tensor.dtype not in NAMES or not tensor.dim():
        return False
    length = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:])):
        if size != 1 and stride != length:
            return False
        length *= size
    return tensor.stride(0) == length


def _array(tensors: Sequence[Tensor]) -> ctypes.Array:
    """Their addresses."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _flat(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _batch(batch: Sequence[int]) -> tuple[int, int]:
    """Tasks and examples."""
    return (1, batch[0]) if len(batch) == 1 else (batch[0], batch[1])


def _step(vector: Tensor | None) -> int:
    """From one task's vector to the next."""
    return vector.shape[-1] if vector is not None and vector.dim() == 2 else 0


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@functools.lru_cache(1000)
def _sizes(*sizes: int) -> ctypes.Array:
    """For a kernel to read."""
    return (ctypes.c_longlong * len(sizes))(*sizes)
