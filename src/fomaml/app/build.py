"""What the settings of a run stand for: its data, its model, its learner and its optimiser."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fomaml.app.settings import TrainConfig
from fomaml.data.augment import rotated, warped
from fomaml.data.folder import load_folder
from fomaml.data.mnist import MNIST, load_mnist
from fomaml.data.omniglot import load_omniglot
from fomaml.data.source import ClassSource
from fomaml.data.synthetic import Sinusoids
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.learning import adapt, algorithms
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import MultiStepLoss
from fomaml.models import MLP, BatchNorm, Conv4, Conv4Strided, Conv4StridedFlat, WithContext
from fomaml.train import cosine, linear

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
    """The episodes of a run: to train on, to tune baselines on (training classes too), and unseen ones.

    validation: episodes of validation classes; None where there are none, and `unvalidated` says why.
    """

    train: Episodes | RegressionEpisodes
    tuning: Episodes | RegressionEpisodes
    test: Episodes | RegressionEpisodes
    own_classes: ClassSource | None
    classes: ClassSource | None
    name: str
    origin: str
    validation: Episodes | None = None
    unvalidated: str = "the source sinusoid has no validation classes"


def open_data(config: TrainConfig, test_seed: int | None = None, allow_download: bool = True) -> Data:
    """Load the source and draw its episodes, on the run's device; training and test seeds never meet."""
    device = check_device(config.device)
    other = config.seed if test_seed is None else test_seed
    seeds = [3 * config.seed, 3 * config.seed + 1, 3 * other + 2]
    if config.source == "sinusoid":
        counts = [
            {"shots": config.train_shots, "query_shots": config.query_shots},
            *2 * [{"shots": config.shots, "query_shots": config.test_query_shots}],
        ]
        episodes = [
            RegressionEpisodes(Sinusoids(), **own, seed=seed, device=device)
            for own, seed in zip(counts, seeds)
        ]
        return Data(*episodes, None, None, "sinusoids", "y = A sin(x - p), A in [0.1, 5], p in [0, π]")
    found = _classes(config, allow_download)
    train_source, test_source = found.train.to(device), found.test.to(device)
    augment = {
        "none": lambda source: source,
        "rotations": rotated,
        "turns": lambda source: source,
        "warps": lambda source: warped(source, 600),
    }
    many = augment[config.augment](train_source)
    training = {"ways": config.train_ways, "shots": config.train_shots, "query_shots": config.query_shots}
    testing = {
        "ways": config.ways,
        "shots": config.shots,
        "query_shots": config.test_query_shots,
        "turns": config.test_augment == "turns",
        "copies": config.test_copies,
        "jitter": config.test_jitter if config.test_copies > 1 else 0.0,
    }
    validation, unvalidated = None, f"{found.name} has no validation classes"
    if found.validation is not None:
        try:
            validation = Episodes(found.validation.to(device), seed=3 * other + 1, **testing)
        except InputError as error:
            unvalidated = f"the validation classes do not suffice: {error}"
    return Data(
        Episodes(many, seed=seeds[0], turns=config.augment == "turns", jitter=config.jitter, **training),
        Episodes(train_source, seed=seeds[1], **testing),
        Episodes(test_source, seed=seeds[2], **testing),
        train_source,
        many,
        found.name,
        found.origin,
        validation,
        unvalidated,
    )


class _Classes(NamedTuple):
    """The classes to train, to validate and to test on, and the name and origin of the data."""

    train: ClassSource
    validation: ClassSource | None
    test: ClassSource
    name: str
    origin: str


def _classes(config: TrainConfig, allow_download: bool) -> _Classes:
    kind, _, path = config.source.partition(":")
    if kind == "folder":
        folder = load_folder(path, size=config.image_size, colour="rgb" if config.rgb else "grey")
        return _Classes(folder.train, folder.validation, folder.test, Path(path).name, folder.origin)
    if kind == "omniglot":
        omniglot = load_omniglot(
            config.data_root, split=config.split, resize=config.resize, allow_download=allow_download
        )
        return _Classes(*omniglot[:3], "Omniglot", f"{omniglot.origin}, split {omniglot.split}")
    mnist = _mnist(config.data_root, allow_download)
    if config.question == "new-digits":
        train, test = mnist.train.select(DIGITS[:5]), mnist.test.select(DIGITS[5:])
        return _Classes(train, None, test, mnist.name, mnist.origin)
    return _Classes(mnist.train, None, mnist.test, mnist.name, mnist.origin)


def with_image(config: TrainConfig, data: Data) -> TrainConfig:
    """The settings with the shape of the images that the data has, which the models are built for."""
    if data.classes is None:
        return config
    return dataclasses.replace(config, image=tuple(data.classes.inputs.shape[1:]))


def with_precision(config: TrainConfig) -> TrainConfig:
    """The settings with the precision that "auto" means on the run's device."""
    if config.autocast != "auto":
        return config
    return dataclasses.replace(config, autocast="bfloat16" if has_bfloat16(config.device) else "none")


def has_bfloat16(name: str) -> bool:
    """Whether a device is known to calculate in bfloat16. A CPU that has to imitate it takes thirty times as long as in
    float32 (convolutions on AVX2).
    """
    device = check_device(name)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return False


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
            model = Conv4(outputs, image=image, **_convolutions(config))
        elif config.model == "conv4-strided-flat":
            model = Conv4StridedFlat(outputs, image=image, **_convolutions(config))
        else:
            model = Conv4Strided(outputs, in_channels=image[0], **_convolutions(config))
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
        choices["multi_step_iterations"] = config.multi_step_iterations or max(1, config.iterations // 10)
    elif config.multi_step_iterations is not None:
        choices["objective"] = MultiStepLoss(config.multi_step_iterations)
    if config.adapt == "no-norm":
        choices["adapted"] = _without_norms(model)
    if config.learn_rates != "none":
        choices["learn_rates"] = config.learn_rates
    if config.inner_optimizer != "sgd":
        carried = config.inner_optimizer == "carried-adam"
        choices["optimizer"] = adapt.Adam(betas=(config.inner_momentum, 0.999), carried=carried)
    elif config.inner_momentum:
        choices["optimizer"] = adapt.SGD(momentum=config.inner_momentum)
    if config.inner_batch_size is not None:
        choices["inner_batch_size"] = config.inner_batch_size
    return PRESETS[config.algorithm](model, inner_lr(config), config.inner_steps, criterion, **choices)


def inner_lr(config: TrainConfig) -> float:
    """The step size as this library takes it, whose losses are means. Where the loss is "summed", divided by the
    shots and summed over the examples, its gradient is as many times larger as there are classes.
    """
    return config.inner_lr * (config.ways if config.inner_loss == "summed" else 1)


def for_test(config: TrainConfig, learner: MetaLearner) -> MetaLearner:
    """The same learner with the mini-batches of the test; it shares all parameters with `learner`."""
    if config.test_inner_batch_size == learner.inner_batch_size:
        return learner
    found = copy.copy(learner)
    found.inner_batch_size = config.test_inner_batch_size
    return found


def build_optimizer(config: TrainConfig, learner: MetaLearner) -> torch.optim.Optimizer:
    """The run's outer optimiser: Adam, and for Reptile SGD, whose step size is then the paper's ε.

    Learned inner step sizes move at meta_lr times inner_lr: Adam's steps do not shrink with what they move,
    and at meta_lr itself the step sizes of the sinusoid's Meta-SGD grew until ten steps gave nan.
    """
    if config.algorithm == "reptile":
        return torch.optim.SGD(learner.parameters(), lr=config.meta_lr, weight_decay=config.weight_decay)
    parameters = learner.meta_parameters()
    rates = [parameter for name, parameter in parameters.items() if name.startswith("inner_lr.")]
    others = [parameter for name, parameter in parameters.items() if not name.startswith("inner_lr.")]
    rates_lr = config.meta_lr * inner_lr(config) if config.rates_lr is None else config.rates_lr
    groups = [
        {"params": others, "weight_decay": config.weight_decay},
        {"params": rates, "lr": rates_lr, "weight_decay": 0.0},  # a step size of 0 is no simpler than another
    ]
    groups = [group for group in groups if group["params"]]
    if config.weight_decay:
        return torch.optim.AdamW(groups, lr=config.meta_lr)
    return torch.optim.Adam(groups, lr=config.meta_lr)


def build_schedule(config: TrainConfig):
    """Iteration → factor of the meta_lr; None if it is constant."""
    schedules = {"constant": lambda iterations: None, "cosine": cosine, "linear": linear}
    return schedules[config.schedule](config.iterations)


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


def _convolutions(config: TrainConfig) -> dict:
    """The arguments of the convolutional networks, those of their batch norms included."""
    return {
        "channels": config.channels[0] if len(config.channels) == 1 else config.channels,
        "scale": config.norm_parameters == "scale-shift",
        "policy": config.norm_policy,
        "steps": config.inner_steps if config.norm_policy == "per-step" else None,
    }


def _without_norms(model: nn.Module) -> list[str]:
    """The names of all parameters but those of batch norms."""
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BatchNorm))
    return [name for name, _ in model.named_parameters() if not name.startswith(norms)]


def _mlp(config: TrainConfig, context: int, *sizes: int) -> nn.Module:
    """An MLP; for CAVIA with context parameters joined to its inputs (Zintgraf et al. 2019, section 4)."""
    if config.algorithm != "cavia":
        return MLP(*sizes)
    return nn.Sequential(nn.Flatten(), WithContext(MLP(sizes[0] + context, *sizes[1:]), context))
