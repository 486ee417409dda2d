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
# # Your own pictures
#
# From a folder of pictures to a saved model of classes that it was never trained on: train, adapt, predict, save, load.
# The pictures are drawn here, so that it runs anywhere. Everything goes into the folder `own_pictures_out`.
#
# **To use your own**, leave out the cell that draws. Set `PHOTOS` to a folder with a directory for each class, 15 or
# more, each with at least 8 pictures of any size; `EXAMPLES` to one with a directory for each class that you care
# about; and `NEW` to other pictures of these, again with a directory for each.

# %%
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw

import fomaml
from fomaml.app.cli import main
from fomaml.app.serving import save_model

torch.manual_seed(0)
OUT = Path("own_pictures_out")
PHOTOS, EXAMPLES, NEW = OUT / "photos", OUT / "examples", OUT / "new"

# %%
shutil.rmtree(OUT, ignore_errors=True)
random = np.random.default_rng(0)


def draw(folder, colour, corners, pictures):
    """Polygons of a colour, in pictures of mixed sizes."""
    folder.mkdir(parents=True)
    for number in range(pictures):
        width, height = (int(size) for size in random.integers(40, 120, 2))
        picture = Image.new(
            "RGB", (width, height), tuple(int(value) for value in random.integers(200, 256, 3))
        )
        circle = (width / 2, height / 2, random.uniform(0.25, 0.45) * min(width, height))
        ImageDraw.Draw(picture).regular_polygon(circle, corners, int(random.integers(360)), fill=colour)
        picture.save(folder / f"{number}.png")


for colour in ("red", "green", "blue", "gold", "black"):
    for corners in (3, 4, 6):
        draw(PHOTOS / f"{colour} {corners}", colour, corners, 10)
for colour, corners in (("purple", 3), ("orange", 4), ("teal", 6)):  # colours that are in no training picture
    draw(EXAMPLES / f"{colour} {corners}", colour, corners, 3)
    draw(NEW / f"{colour} {corners}", colour, corners, 10)

# %% [markdown]
# ## Train
#
# What `fomaml train` does in the shell. Classes are split, so that validation and test have none of the training's.
# For your own pictures leave out the options from `--iterations` on, take `--image-size 84 84`, and give it an hour.
# `proto-maml` makes its head of the classes at hand, so that any number of them may be asked for later.

# %%
options = (
    "--rgb --image-size 28 28 --ways 3 --shots 3 --query-shots 5 --algorithm proto-maml --model conv4-strided "
    "--iterations 30 --meta-batch-size 4 --channels 16 --validate-every 30 --validation-tasks 10 --test-tasks 20 "
    "--no-baselines"
)
main(["train", f"folder:{PHOTOS}", *options.split(), "--out", str(OUT / "run")])

# %% [markdown]
# ## Adapt and predict
#
# Three examples of each new class. Pictures are decoded, coloured, resized and scaled as in training.

# %%
run = fomaml.load_run(OUT / "run")
model = run.adapt(EXAMPLES)
accuracy, interval = model.score(NEW).value
print(f"{100 * accuracy:.0f} ± {100 * interval:.0f} % of the new pictures are right")

# %%
pictures = sorted(NEW.rglob("*.png"))[::5]
found = model.predict(pictures)
figure, axes = plt.subplots(1, len(pictures), figsize=(1.5 * len(pictures), 2))
for axis, path, record in zip(axes, pictures, found.records()):
    axis.imshow(Image.open(path))
    axis.set_title(f"{record['class']}\n{record['probability']:.2f}", fontsize=9)
    axis.axis("off")
figure.tight_layout()
figure.savefig(OUT / "predictions.png")

# %% [markdown]
# The run has fitted the temperature of these probabilities on its validation tasks, which are few here.
#
# ## Save and load
#
# The saved folder needs neither the run nor its data.
# `fomaml predict own_pictures_out/model FILE` asks it in the shell.

# %%
save_model(model, OUT / "model")
again = fomaml.load_adapted(OUT / "model")
assert again.predict(pictures).probabilities.equal(found.probabilities)
print(sorted(path.name for path in (OUT / "model").iterdir()))
