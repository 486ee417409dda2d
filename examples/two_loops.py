"""A loop that looks like FOMAML and learns nothing, beside FOMAML: how far the meta-parameters move in each."""

import copy

import torch
import torch.nn.functional as F

import fomaml

torch.manual_seed(0)
labels = torch.arange(10).repeat_interleave(30)
inputs = torch.randn(10, 784)[labels] + torch.randn(300, 784)
source = fomaml.ClassSource(inputs, labels)
tasks = fomaml.Episodes(source, ways=5, shots=5, query_shots=10)


def gradient_of_a_copy(model, iterations=20):
    """The copy learns and gets the gradient; the optimiser holds the original, whose .grad stays None."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for iteration in range(iterations):
        clone = copy.deepcopy(model)
        inner = torch.optim.SGD(clone.parameters(), lr=0.05)
        task = tasks[iteration]
        for _ in range(5):
            inner.zero_grad()
            F.cross_entropy(clone(task.support.inputs), task.support.targets).backward()
            inner.step()
        optimizer.zero_grad()
        F.cross_entropy(clone(task.query.inputs), task.query.targets).backward()
        optimizer.step()


def first_order_maml(model, iterations=20):
    """The query gradient at the adapted parameters is handed to the meta-parameters, and they move."""
    fomaml.fomaml_train(
        model, source, iterations, 5, 0.05, 0.1, query_shots=10, meta_batch_size=1, report=lambda line: None
    )


for loop in (gradient_of_a_copy, first_order_maml):
    model = fomaml.MLP(784, 256, 10)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    loop(model)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    print(f"{loop.__name__}: the meta-parameters moved by {(after - before).norm():.4f}")
