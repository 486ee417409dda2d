"""A new image as a function of its coordinates, in one to ten steps: the signals table and picture of docs/results.md.

python -m runs.signals --data-root FOLDER       # FOLDER holds MNIST/raw and omniglot
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

from fomaml import CAVIA, FOMAML, MAML, Examples, Reptile, Task, evaluate, train
from fomaml.app.parser import option, parse
from fomaml.data.mnist import load_mnist
from fomaml.data.omniglot import load_omniglot
from fomaml.draws import generator
from fomaml.learning.adapt import SGD, Adam
from fomaml.learning.learner import MetaLearner
from fomaml.models import SIREN
from fomaml.train import cosine, linear
from runs.study import ROOT, Parts, best, estimate, keep, table, verdict

OUT, PICTURE = ROOT / "runs" / "signals", ROOT / "docs" / "results" / "signals.png"
POINTS = 256  # pixels of an image in a training task's support set, and in its query set
STEPS, AT, MANY = (
    3,
    (0, 1, 3, 10),
    100,
)  # inner steps in training and in the test; and of a random start once more
TRAINING, TUNING, TEST = 1000, 20, 40  # images
SEEDS = range(3)
KINDS = ("MNIST", "photograph", "Omniglot")
RANDOM = "random start"
TRIALS = {  # as many for the random start as for a learner
    RANDOM: [("GD", 0.03), ("GD", 0.1), ("Adam", 0.001), ("Adam", 0.003)],
    "FOMAML": [(0.01, 1e-3), (0.03, 1e-3), (0.03, 3e-4), (0.1, 1e-3)],  # inner and outer step size
    "MAML": [(0.01, 1e-3), (0.03, 1e-3), (0.03, 3e-4), (0.1, 1e-3)],
    "Reptile": [(0.01, 0.3), (0.01, 1.0), (0.03, 0.3), (0.03, 1.0)],
    "CAVIA": [(0.01, 1e-3), (0.1, 1e-3), (0.3, 1e-3), (1.0, 1e-3)],
}


@dataclass(frozen=True)
class Options:
    """SIREN: PSNR after 1, 3 and 10 steps from FOMAML's, MAML's, Reptile's and CAVIA's start and a random one."""

    data_root: Path = option("the folder that holds MNIST/raw and omniglot", ROOT.parent / "shared" / "data")
    iterations: int = option("outer steps of each training", 300)


@cache
def images(kind: str, data_root: Path) -> tuple[Tensor, Tensor, Tensor]:
    """(images, channels, height, width) in [0, 1] for training, validation and test.

    Of photographs they are patches of 32x32: overlapping ones of a flower for training, a strip below these for
    validation, and for the test such of a palace as do not overlap.
    """
    random = np.random.default_rng(0)
    if kind == "photograph":
        flower, palace = (patches(f"{name}.jpg", step) for name, step in (("flower", 8), ("china", 32)))
        test = palace.flatten(0, 1)
        return (
            flower[:-4].flatten(0, 1),
            flower[-1][: 2 * TUNING : 2],
            test[torch.from_numpy(random.permutation(len(test))[:TEST])],
        )
    if kind == "MNIST":
        digits = load_mnist(data_root, allow_download=False)
        sources = digits.train.inputs, digits.test.inputs
    else:
        characters = load_omniglot(data_root / "omniglot", allow_download=False)
        sources = characters.train.inputs, characters.test.inputs
    own = []
    for source, number in zip(sources, (TRAINING + TUNING, TEST)):
        drawn = source[torch.from_numpy(random.permutation(len(source))[:number])]
        own.append(drawn.float() / 255 if drawn.dtype == torch.uint8 else drawn.float())
    return own[0][:TRAINING], own[0][TRAINING:], own[1]


def patches(name: str, step: int) -> Tensor:
    """(rows, columns, 3, 32, 32) patches of a photograph of scikit-learn's at half its size."""
    whole = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None] / 255
    half = F.avg_pool2d(whole, 2)[0]
    return half.unfold(1, 32, step).unfold(2, 32, step).permute(1, 2, 0, 3, 4)


class Signals:
    """Images as tasks: coordinates in [-1, 1] to values in [0, 1].

    points: so many random pixels each of a random image for support and query; None for the whole of one image after
        the other in both.
    """

    copies, ways = 1, None

    def __init__(self, images: Tensor, points: int | None, seed: int = 0):
        self.values = images.flatten(2).transpose(1, 2)  # (images, pixels, channels)
        height, width = images.shape[2:]
        axes = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        self.coordinates = torch.cartesian_prod(*axes)
        self.points, self.seed = points, seed

    def batch(self, start: int, tasks: int) -> Task:
        if self.points is None:
            whole = Examples(self.coordinates.expand(tasks, -1, 2), self.values[start : start + tasks])
            return Task(whole, whole)
        number, pixels = self.values.shape[:2]
        found = []
        for index in range(start, start + tasks):
            random = generator(self.seed, index)
            image, rows = (
                random.integers(number),
                torch.from_numpy(random.permutation(pixels)[: 2 * self.points]),
            )
            found.append((self.coordinates[rows], self.values[image][rows]))
        inputs, values = (torch.stack(each).split(self.points, dim=1) for each in zip(*found))
        return Task(*map(Examples, inputs, values))


def net(channels: int, modulated: bool = False) -> SIREN:
    more = {"modulation": "shift", "latent": 64} if modulated else {}
    model = SIREN(2, channels, hidden=64, layers=3, **more)
    with torch.no_grad():
        model.head.bias.fill_(0.5)  # the middle of the values
    return model


def learner_of(name: str, inner_lr: float, channels: int) -> MetaLearner:
    make: dict[str, Callable] = {"FOMAML": FOMAML, "MAML": MAML, "Reptile": Reptile}
    if name == "CAVIA":
        return CAVIA(net(channels, True), inner_lr, STEPS, F.mse_loss, context="context", first_order=False)
    return make[name](net(channels), inner_lr, STEPS, F.mse_loss)


def trained(name: str, trial: tuple, source: Tensor, seed: int, iterations: int) -> MetaLearner:
    torch.manual_seed(seed)
    channels = source.shape[1]
    if name == RANDOM:
        kind, lr = trial
        return FOMAML(net(channels), lr, STEPS, F.mse_loss, optimizer=Adam() if kind == "Adam" else SGD())
    learner = learner_of(name, trial[0], channels)
    if name == "Reptile":
        optimizer, schedule = torch.optim.SGD(learner.parameters(), trial[1]), linear(iterations)
    else:
        optimizer, schedule = torch.optim.Adam(learner.parameters(), trial[1]), cosine(iterations)
    arguments = {"iterations": iterations, "meta_batch_size": 4, "measure_every": iterations}
    for _ in train(learner, Signals(source, POINTS, 100 + seed), optimizer, schedule=schedule, **arguments):
        pass
    return learner


def judge(learner: MetaLearner, images: Tensor, at: tuple[int, ...]) -> dict[int, Tensor]:
    own = Signals(images, None)
    return evaluate(learner, own, tasks=len(images), at_steps=at, metric="psnr", tasks_at_once=20)


def tuned(kind: str, name: str, options: Options, parts: Parts) -> tuple:
    """The trial that is best on the validation images, of a random start after ten steps."""
    training, validation, _ = images(kind, options.data_root)
    at = AT[-1] if name == RANDOM else STEPS

    def tried(trial: tuple) -> float:
        learner = trained(name, trial, training, 0, options.iterations // 4)
        return judge(learner, validation, (at,))[at].nan_to_num(nan=0.0).mean().item()

    trials = {
        str(own): parts.get(f"{kind} {name} trial {own}", lambda own=own: tried(own)) for own in TRIALS[name]
    }
    return next(own for own in TRIALS[name] if str(own) == best(trials, 1))


def study(kind: str, name: str, options: Options, parts: Parts) -> dict[str, list]:
    """{steps: [[PSNR of each test image], by seed]}, and two test images as the first seed renders them."""
    chosen = tuned(kind, name, options, parts)
    training, _, test = images(kind, options.data_root)

    def run(seed: int) -> dict:
        learner = trained(name, chosen, training, seed, options.iterations)
        at = (*AT, MANY) if name == RANDOM else AT
        found = {str(steps): own.tolist() for steps, own in judge(learner, test, at).items()}
        if seed:
            return found
        shown = []
        for number in to_show(test):
            image = Signals(test[number : number + 1], None).batch(0, 1).support
            support = Examples(image.inputs[0], image.targets[0])
            with torch.no_grad():
                shown.append([learner.adapt(support, steps)(support.inputs).tolist() for steps in AT])
        return {**found, "shown": shown}

    runs = [parts.get(f"{kind} {name} {chosen} seed {seed}", lambda seed=seed: run(seed)) for seed in SEEDS]
    return {"chosen": chosen, **{key: [own[key] for own in runs if key in own] for key in runs[0]}}


def to_show(images: Tensor) -> list[int]:
    """Two images for the picture: of middling contrast, and of more, so that none is bare sky."""
    by_contrast = images.flatten(1).std(1).argsort()
    return by_contrast[[len(images) // 2, len(images) * 9 // 10]].tolist()


def main(options: Options) -> None:
    torch.set_num_threads(1)
    parts = Parts(ROOT / "out" / "signals-parts.json")
    found: dict[str, dict[str, dict]] = {}
    for kind in KINDS:
        for name in TRIALS:
            found.setdefault(kind, {})[name] = study(kind, name, options, parts)
        report(found)
        picture(found, options)


def report(found: dict[str, dict[str, dict]]) -> None:
    rows, kept = [], {}
    for kind, by_name in found.items():
        units = {
            name: {steps: torch.tensor(own[str(steps)], dtype=torch.float64).mean(0) for steps in AT}
            for name, own in by_name.items()
        }
        many = torch.tensor(by_name[RANDOM][str(MANY)], dtype=torch.float64).mean(0)
        kept[kind] = {
            name: {"chosen": by_name[name]["chosen"], **{str(s): v.tolist() for s, v in own.items()}}
            for name, own in units.items()
        }
        kept[kind][RANDOM][str(MANY)] = many.tolist()
        for name, own in units.items():
            row = [f"{kind}, {name}", *(estimate(own[steps]).text() for steps in AT)]
            pairs = [(3, units[RANDOM][3]), (10, units[RANDOM][10]), (3, units[RANDOM][10])]
            for steps, baseline in pairs:
                difference = estimate(own[steps] - baseline)
                text = f"{difference.text(sign='+')} {verdict(difference, 1)}"
                row.append("" if name == RANDOM else text)
            rows.append([*row, " ".join(map(str, by_name[name]["chosen"]))])
        rows.append([f"{kind}, {RANDOM}, after {MANY} steps", "", "", "", estimate(many).text(), *[""] * 4])
    heads = ["PSNR in dB", *("1 step" if steps == 1 else f"{steps} steps" for steps in AT)]
    heads += ["3 steps against random's 3", "10 against its 10", "3 against its 10", "step sizes"]
    keep(OUT, table(heads, rows), {"images": TEST, "seeds": len(SEEDS), "by image": kept})


def picture(found: dict[str, dict[str, dict]], options: Options) -> None:
    """Two test images of each kind in rows; in columns the image, and each start after 0, 1, 3 and 10 steps."""
    import matplotlib.pyplot as plots

    names = list(TRIALS)
    height = 1.3 * len(found) + 0.4
    figure, axes = plots.subplots(2 * len(found), 1 + len(names) * len(AT), figsize=(13, height))
    for own in axes.flat:
        own.axis("off")
    for place, (kind, by_name) in enumerate(found.items()):
        test = images(kind, options.data_root)[-1]
        for number, own_image in enumerate(test[to_show(test)]):
            row, shape = axes[2 * place + number], test.shape[1:]
            tiles = [own_image.flatten(1).T]
            tiles += [torch.tensor(own) for name in names for own in by_name[name]["shown"][0][number]]
            for axis, tile in zip(row, tiles):
                axis.imshow(
                    tile.T.unflatten(1, shape[1:]).permute(1, 2, 0).clamp(0, 1), cmap="gray", vmin=0, vmax=1
                )
    axes[0, 0].set_title("image", fontsize=7)
    for column, name in enumerate(names):
        for number, steps in enumerate(AT):
            title = f"{name}\n{steps} steps" if not number else f"\n{steps}"
            axes[0, 1 + column * len(AT) + number].set_title(title, fontsize=7)
    figure.subplots_adjust(
        left=0.005, right=0.995, top=1 - 0.4 / height, bottom=0.01, wspace=0.05, hspace=0.05
    )
    drawn = BytesIO()
    figure.savefig(drawn, dpi=80)
    Image.open(drawn).convert("RGB").quantize(64).save(PICTURE, optimize=True)  # half the size
    print(f"saved {PICTURE}")


if __name__ == "__main__":
    main(parse(Options))
