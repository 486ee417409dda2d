"""What the settings of a run stand for: its data, its model, its learner and its optimiser."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fomaml import algorithms
from fomaml.config import TrainConfig
from fomaml.data.augment import rotated, warped
from fomaml.data.folder import load_folder
from fomaml.data.mnist import MNIST, load_mnist
from fomaml.data.omniglot import load_omniglot
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.learner import MetaLearner
from fomaml.models import MLP, Conv4, Conv4Strided, WithContext

PRESETS = {
    "fomaml": algorithms.FOMAML,
    "maml": algorithms.MAML,
    "reptile": algorithms.Reptile,
    "anil": algorithms.ANIL,
    "boil": algorithms.BOIL,
    "meta-sgd": algorithms.MetaSGD,
    "maml++": algorithms.MAMLPlusPlus,
    "imaml": algorithms.iMAML,
    "cavia": algorithms.CAVIA,
    "sign-maml": algorithms.SignMAML,
    "zero-head": algorithms.ZeroHeadMAML,
    "proto-maml": algorithms.ProtoMAML,
}
NAMES = {name: preset.__name__ for name, preset in PRESETS.items()} | {
    "meta-sgd": "Meta-SGD",
    "maml++": "MAML++",
    "sign-maml": "Sign-MAML",
    "zero-head": "zero-head MAML",
    "proto-maml": "Proto-MAML",
}
HEADS = {"anil": "{}.*", "boil": "{}.*", "zero-head": "{}", "proto-maml": "{}"}  # globs, or the module
DIGITS = [str(digit) for digit in range(10)]


@functools.lru_cache(maxsize=1)
def _mnist(root: Path | None, allow_download: bool) -> MNIST:
    return load_mnist(root, allow_download)


class Data(NamedTuple):
    """The episodes of a run: to train on, to tune baselines on (training classes too), and unseen ones."""

    train: Episodes | RegressionEpisodes
    tuning: Episodes | RegressionEpisodes
    test: Episodes | RegressionEpisodes
    own_classes: ClassSource | None
    classes: ClassSource | None
    name: str
    origin: str


def open_data(config: TrainConfig, test_seed: int | None = None, allow_download: bool = True) -> Data:
    """Load the source and draw its episodes, on the run's device; training and test seeds never meet."""
    device = check_device(config.device)
    seeds = [
        3 * config.seed,
        3 * config.seed + 1,
        3 * (config.seed if test_seed is None else test_seed) + 2,
    ]
    if config.source == "sinusoid":
        counts = {"shots": config.shots, "query_shots": config.query_shots, "device": device}
        episodes = [RegressionEpisodes(Sinusoids(), seed=seed, **counts) for seed in seeds]
        return Data(*episodes, None, None, "sinusoids", "y = A sin(x - p), A in [0.1, 5], p in [0, π]")
    train_source, test_source, name, origin = _classes(config, allow_download)
    train_source, test_source = train_source.to(device), test_source.to(device)
    augment = {
        "none": lambda source: source,
        "rotations": rotated,
        "warps": lambda source: warped(source, 600),
    }
    many = augment[config.augment](train_source)
    counts = {"ways": config.ways, "shots": config.shots, "query_shots": config.query_shots}
    episodes = [
        Episodes(source, seed=seed, **counts)
        for source, seed in zip((many, train_source, test_source), seeds)
    ]
    return Data(*episodes, train_source, many, name, origin)


def _classes(config: TrainConfig, allow_download: bool) -> tuple[ClassSource, ClassSource, str, str]:
    """The classes to train and to test on, and the name and origin of the data."""
    kind, _, path = config.source.partition(":")
    if kind == "folder":
        folder = load_folder(path, size=config.image_size, colour="rgb" if config.rgb else "grey")
        return folder.train, folder.test, Path(path).name, folder.origin
    if kind == "omniglot":
        omniglot = load_omniglot(config.data_root, split=config.split, allow_download=allow_download)
        return omniglot.train, omniglot.test, "Omniglot", f"{omniglot.origin}, split {omniglot.split}"
    mnist = _mnist(config.data_root, allow_download)
    if config.question == "new-digits":
        return mnist.train.select(DIGITS[:5]), mnist.test.select(DIGITS[5:]), mnist.name, mnist.origin
    return mnist.train, mnist.test, mnist.name, mnist.origin


def with_image(config: TrainConfig, data: Data) -> TrainConfig:
    """The settings with the shape of the images that the data has, which the models are built for."""
    if data.classes is None:
        return config
    return dataclasses.replace(config, image=tuple(data.classes.inputs.shape[1:]))


def build_model(config: TrainConfig, seed: int | None = None) -> nn.Module:
    """The run's network with random weights that depend on the seed alone, on the run's device."""
    image = config.image or (1, 28, 28)
    outputs = 10 if config.source == "mnist" else config.ways  # the tutorial's network has ten
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed if seed is None else seed)
        if config.source == "sinusoid":
            model = _mlp(config, 5, 1, 40, 40, 1)
        elif config.model == "mlp":
            model = _mlp(config, 100, math.prod(image), 256, outputs)
        elif config.model == "conv4":
            model = Conv4(outputs, image=image)
        else:
            model = Conv4Strided(outputs, in_channels=image[0])
    if config.source != "sinusoid" and config.algorithm not in ("boil", "cavia"):  # their heads do not adapt
        zero_head(model)
    return model.to(check_device(config.device))


def build_learner(config: TrainConfig, model: nn.Module) -> MetaLearner:
    """The run's algorithm around a model."""
    criterion = F.mse_loss if config.source == "sinusoid" else F.cross_entropy
    choices = dict(config.choices or {})
    if config.algorithm in HEADS:
        choices["head"] = HEADS[config.algorithm].format(head_name(model))
    if config.algorithm == "maml++":
        choices["multi_step_iterations"] = max(1, config.iterations // 10)
    return PRESETS[config.algorithm](model, config.inner_lr, config.inner_steps, criterion, **choices)


def build_optimizer(config: TrainConfig, learner: MetaLearner) -> torch.optim.Optimizer:
    """The run's outer optimiser: Adam, and for Reptile SGD, whose step size is then the paper's ε.

    Learned inner step sizes move at meta_lr times inner_lr: Adam's steps do not shrink with what they move,
    and at meta_lr itself the step sizes of the sinusoid's Meta-SGD grew until ten steps gave nan.
    """
    if config.algorithm == "reptile":
        return torch.optim.SGD(learner.parameters(), lr=config.meta_lr)
    parameters = learner.meta_parameters()
    rates = [parameter for name, parameter in parameters.items() if name.startswith("inner_lr.")]
    others = [parameter for name, parameter in parameters.items() if not name.startswith("inner_lr.")]
    groups = [{"params": others}, {"params": rates, "lr": config.meta_lr * config.inner_lr}]
    return torch.optim.Adam([group for group in groups if group["params"]], lr=config.meta_lr)


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        InputError: no such device, or not on this machine.
    """
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"the device {name!r} is not there: no CUDA device on this machine")
        torch.empty(0, device=device)
    except InputError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"the device {name!r} is not there; try cpu, cuda or mps") from None
    return device


def zero_head(model: nn.Module) -> None:
    """Set the last Linear layer to zero. Labels are shuffled anew in each task, so no label is to be preferred
    before adaptation.
    """
    head = model.get_submodule(head_name(model))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


def head_name(model: nn.Module) -> str:
    """The name of the model's last `nn.Linear`."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _mlp(config: TrainConfig, context: int, *sizes: int) -> nn.Module:
    """An MLP; for CAVIA with context parameters joined to its inputs (Zintgraf et al. 2019, section 4)."""
    if config.algorithm != "cavia":
        return MLP(*sizes)
    return nn.Sequential(nn.Flatten(), WithContext(MLP(sizes[0] + context, *sizes[1:]), context))
