import torch

from fomaml.tasks import Examples, Task, chunks, count, one


def batch(tasks=5):
    """Every tensor's entries say which task and which example they are of."""
    numbers = torch.arange(tasks)[:, None] * 10 + torch.arange(4)
    support = Examples(numbers[:, :2, None].float(), numbers[:, :2])
    return Task(support, Examples(numbers[:, 2:, None].float(), numbers[:, 2:]))


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))


def test_one_takes_a_task_without_the_leading_axis():
    task = one(batch(), 3)
    assert task.support.inputs.tolist() == [[30.0], [31.0]]
    assert task.query.targets.tolist() == [32, 33]


def test_chunks_are_in_order_and_lose_nothing():
    tasks = batch(5)
    parts = list(chunks(tasks, 2))
    assert [count(part) for part in parts] == [2, 2, 1]
    joined = Task(*(Examples(*map(torch.cat, zip(*side))) for side in zip(*parts)))
    assert same(joined, tasks)
    assert [count(part) for part in chunks(tasks, 9)] == [5]


def test_to_casts_the_floating_tensors_only():
    tasks = batch().to("cpu", torch.float64)
    assert tasks.support.inputs.dtype == tasks.query.inputs.dtype == torch.float64
    assert tasks.support.targets.dtype == tasks.query.targets.dtype == torch.int64
    assert batch().to("meta").query.targets.device.type == "meta"
    assert same(batch().to(), batch())
