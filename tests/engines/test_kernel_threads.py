"""Kernels whose tasks are shared out among threads, and the memory that they write into."""

import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch

from blocks import EPS
from fomaml.blocks import ALIGNMENT
from fomaml.engines.cpu import kernels
from fomaml.engines.cpu.kernels import norm_relu_pool, norm_relu_pool_backward


def everything():
    """What each kernel finds for a stack of seven tasks, wide and narrow, with weights of each and of all."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=random)

    found = []
    for (channels, outputs), tasks in product(((16, 5), (16, 32), (1, 16)), (7, 1)):
        inputs = draw(tasks, 3, channels, 9, 8)
        for weights, bias in (
            (draw(tasks, outputs, channels, 3, 3), draw(tasks, outputs)),
            (draw(outputs, channels, 3, 3), draw(outputs)),
        ):
            slope = kernels.convolution(inputs, weights, bias, (2, 2), (1, 1))
            wanted = (channels == 16, True, True)
            found += [slope, *kernels.convolution_backward(slope, inputs, weights, (2, 2), (1, 1), wanted)]
    for pool in (False, True):
        inputs, gamma, beta = draw(7, 3, 5, 9, 8), draw(7, 5), draw(5)
        outputs, *kept = norm_relu_pool(inputs, gamma, beta, EPS, pool)
        found += [outputs, *norm_relu_pool_backward(outputs, outputs, *kept, gamma, pool)]
    lefts, rights = [draw(90, 100), draw(7, 3)], [draw(7, 90, 100), draw(7, 3)]
    found += [*kernels.sums(rights), *kernels.subtract(lefts, rights, 0.3)]
    return [each for each in found if each is not None]


def assert_same(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5, 9])
def test_tasks_shared_out_give_the_same_bits(threads):
    expected = everything()
    memory = kernels.Memory()
    with kernels.sharing(threads, memory):
        for _ in range(20):
            assert_same(everything(), expected)
    assert_same(everything(), expected)


def test_several_threads_share_tasks_out_at_once():
    expected = everything()

    def work(number):
        with kernels.sharing(3, kernels.Memory()):
            for _ in range(20):
                assert_same(everything(), expected)
        return number

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(work, range(8))] == [*range(8)]


def test_a_child_process_shares_tasks_out_among_threads_of_its_own():
    code = """
import os, sys, torch
from fomaml.engines.cpu import kernels
inputs, weights = torch.randn(6, 2, 16, 9, 9), torch.randn(4, 16, 3, 3)
expected = kernels.convolution(inputs, weights, None, (1, 1), (1, 1))
def check():
    with kernels.sharing(2, kernels.Memory()):
        for _ in range(50):
            assert torch.equal(kernels.convolution(inputs, weights, None, (1, 1), (1, 1)), expected)
check()
child = os.fork()
check()
if not child:
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=environment)


def test_the_threads_are_forgotten_after_an_error():
    for _ in range(2):
        with pytest.raises(ValueError), kernels.sharing(2, kernels.Memory()):
            raise ValueError
        assert kernels._own.memory is None


def test_memory_comes_back_when_a_tensor_and_its_views_are_gone():
    memory = kernels.Memory()
    first = memory.empty((3, 4), torch.float32)
    second = memory.empty((4, 3), torch.float32)
    assert first.shape == (3, 4) and second.shape == (4, 3) and first.is_contiguous()
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    place, view = first.data_ptr(), first[1:].t()
    assert second.data_ptr() != place
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    del first
    third = memory.empty((2, 6), torch.float32)
    assert third.data_ptr() != place  # the view still holds it
    third.fill_(3)
    assert (view == 1).all()
    del view
    assert memory.empty((12,), torch.float32).data_ptr() == place
    assert memory.empty((6,), torch.float64).data_ptr() == place  # as many bytes
    assert memory.empty((13,), torch.float32).data_ptr() != place


def test_what_is_lent_outlives_the_memory():
    memory = kernels.Memory()
    tensor = memory.empty((1000,), torch.float64).fill_(7)
    gone = weakref.ref(memory)
    del memory
    assert gone() is None and (tensor == 7).all()


def test_no_more_blocks_are_kept_than_one_run_takes():
    """Somebody who holds the results of many runs and then lets them go does not leave all their memory behind."""
    memory = kernels.Memory()
    held = []
    for _ in range(50):
        with kernels.sharing(1, memory):
            passing, result = (memory.empty((1000,), torch.float32) for _ in range(2))
            held.append(result)
            del passing
    assert len(held) == len({each.data_ptr() for each in held}) == 50
    del held, result
    assert memory.kept == 2 * (4000 + ALIGNMENT)
