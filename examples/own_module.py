"""Any module, any labelled dataset: meta-train, adapt to a new task, use the adapted model."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fomaml

# Your data: 40 classes of 20 points each. Any dataset of (input, integer label) pairs will do.
torch.manual_seed(0)
labels = torch.arange(40).repeat_interleave(20)
inputs = torch.randn(40, 8)[labels] + 0.5 * torch.randn(800, 8)

source = fomaml.ClassSource.from_dataset(TensorDataset(inputs, labels))
train_tasks = fomaml.Episodes(source.select(range(30)), ways=5, shots=1, query_shots=10)
new_tasks = fomaml.Episodes(source.select(range(30, 40)), ways=5, shots=1, query_shots=10)

model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 5))  # your module
learner = fomaml.FOMAML(model, inner_lr=0.1, inner_steps=5)
optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
for record in fomaml.train(learner, train_tasks, optimizer, iterations=200, meta_batch_size=16):
    if record.iteration % 50 == 0:
        print(f"{record.iteration}: accuracy {record.before:.2f} -> {record.after:.2f}")

for steps, scores in fomaml.evaluate(learner, new_tasks, tasks=500).items():
    accuracy, interval = fomaml.estimate(scores)
    print(f"new classes, {steps:2d} inner steps: {100 * accuracy:.1f} ± {100 * interval:.1f} %")

task = new_tasks[0]
adapted = learner.adapt(task.support, steps=10)  # an independent nn.Module that has learned the task
print("predicted:", adapted(task.query.inputs).argmax(1)[:5].tolist())
