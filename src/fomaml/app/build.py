"""What the settings of a run stand for: its episodes, its network, its learner and its optimiser."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fomaml.app import group_tasks
from fomaml.app.algorithms import ALGORITHMS
from fomaml.app.device import check_device, has_bfloat16
from fomaml.app.fits import check_tasks_fit
from fomaml.app.frozen import prepared, shape_of
from fomaml.app.grouped import Groups
from fomaml.app.named import own_of
from fomaml.app.networks import head_of
from fomaml.app.settings import Compiled, Settings
from fomaml.app.sources import Functions, source_of
from fomaml.data.augment import rotated, warped
from fomaml.data.source import ClassSource
from fomaml.engines import Plan, plan
from fomaml.engines.pays import Compile, calls_within
from fomaml.episodes import Episodes, RegressionEpisodes
from fomaml.errors import InputError
from fomaml.group_episodes import GroupEpisodes
from fomaml.learning import adapt
from fomaml.learning.learner import MetaLearner
from fomaml.learning.objectives import MultiStepLoss
from fomaml.models import NATIVE_BATCH_NORMS, BatchNorm
from fomaml.train import cosine, linear

PSEUDO_CLASSES = 600  # that warps makes


@dataclass
class Data:
    """The episodes of a run, and what it says of its data.

    train: to train on; tuning: of the training classes too, to tune baselines on; test: unseen ones.
    validation: of validation classes; None where there are none, and `unvalidated` says why.
    own_classes, classes: to train on, as the data have them and as augmented; None where there are none.
    facts: what a run records of groups of rows, see grouped.py.
    """

    name: str
    origin: str
    train: Episodes | RegressionEpisodes | GroupEpisodes
    tuning: Episodes | RegressionEpisodes | GroupEpisodes
    test: Episodes | RegressionEpisodes | GroupEpisodes
    validation: Episodes | GroupEpisodes | None = None
    unvalidated: str = ""
    own_classes: ClassSource | None = None
    classes: ClassSource | None = None
    facts: dict[str, Any] | None = None


def open_data(settings: Settings, test_seed: int | None = None, allow_download: bool = True) -> Data:
    """Load the source and draw its episodes, on the run's device; training and test seeds never meet."""
    check_tasks_fit(settings)
    device = check_device(settings.device)
    other = settings.seed if test_seed is None else test_seed
    training: dict[str, Any] = {
        "shots": settings.train_shots,
        "query_shots": settings.query_shots,
        "seed": 3 * settings.seed,
    }
    testing: dict[str, Any] = {"shots": settings.shots, "query_shots": settings.test_query_shots}
    tuning_seed, validation_seed, seed = 3 * settings.seed + 1, 3 * other + 1, 3 * other + 2
    loaded = source_of(settings).load(settings, allow_download)
    if isinstance(loaded, Functions):

        def draw(**facts) -> RegressionEpisodes:
            return RegressionEpisodes(loaded.family, **facts, device=device)

        return Data(
            name=loaded.name,
            origin=loaded.origin,
            train=draw(**training),
            tuning=draw(**testing, seed=tuning_seed),
            test=draw(**testing, seed=seed),
            unvalidated=f"the source {settings.source} has no validation classes",
        )
    found = prepared(settings, loaded)
    if isinstance(found, Groups):
        seeds = tuning_seed, validation_seed, seed
        return Data(**group_tasks.drawn(settings, found, training, testing, seeds, device))
    own_classes, test_classes = found.train.to(device), found.test.to(device)
    classes = own_classes
    if settings.augment == "rotations":
        classes = rotated(own_classes)
    elif settings.augment == "warps":
        classes = warped(own_classes, PSEUDO_CLASSES)
    testing |= {
        "ways": settings.ways,
        "turns": settings.test_augment == "turns",
        "copies": settings.test_copies,
        "jitter": settings.test_jitter if settings.test_copies > 1 else 0.0,
    }
    turns = settings.augment == "turns"
    data = Data(
        name=found.name,
        origin=found.origin,
        train=Episodes(classes, ways=settings.train_ways, turns=turns, jitter=settings.jitter, **training),
        tuning=Episodes(own_classes, seed=tuning_seed, **testing),
        test=Episodes(test_classes, seed=seed, **testing),
        unvalidated=found.unvalidated or f"{found.name} has no validation classes",
        own_classes=own_classes,
        classes=classes,
    )
    if found.validation is not None:
        try:
            data.validation = Episodes(found.validation.to(device), seed=validation_seed, **testing)
        except InputError as error:
            data.unvalidated = f"the validation classes do not suffice: {error}"
    return data


def with_data(settings: Settings, data: Data) -> Settings:
    """The settings with what the data tell: the shape of the images that the networks are built for, or their facts."""
    if data.facts is not None:
        tasks = group_tasks.task_numbers(settings, data.test, data.validation)
        return dataclasses.replace(settings, facts=data.facts, **tasks)
    if data.classes is None:
        return settings
    return dataclasses.replace(settings, image=shape_of(data.classes))


def with_precision(settings: Settings) -> Settings:
    """The settings with the precision that "auto" means on the run's device."""
    if settings.autocast != "auto":
        return settings
    return dataclasses.replace(settings, autocast="bfloat16" if has_bfloat16(settings.device) else "none")


def build_learner(settings: Settings, model: nn.Module) -> MetaLearner:
    """The run's algorithm around a model."""
    algorithm = ALGORITHMS[settings.algorithm]
    judged = judged_by(settings)
    criterion = judged.pop("criterion", None)
    choices: dict[str, Any] = dict(settings.choices or {}) | judged
    if algorithm.head is not None:
        choices["head"] = _head(settings, model, algorithm.head)
    if settings.algorithm == "maml++":
        choices["multi_step_iterations"] = settings.multi_step_iterations
    elif settings.multi_step_iterations is not None:
        choices["objective"] = MultiStepLoss(settings.multi_step_iterations)
    if settings.adapt == "no-norm":
        choices["adapted"] = _without_norms(model)
    if settings.learn_rates != "none":
        choices["learn_rates"] = settings.learn_rates
    if settings.inner_optimizer != "sgd":
        carried = settings.inner_optimizer == "carried-adam"
        choices["optimizer"] = adapt.Adam(betas=(settings.inner_momentum, 0.999), carried=carried)
    elif settings.inner_momentum:
        choices["optimizer"] = adapt.SGD(momentum=settings.inner_momentum)
    if settings.inner_batch_size is not None:
        choices["inner_batch_size"] = settings.inner_batch_size
    return algorithm.make(model, inner_lr(settings), settings.inner_steps, criterion, **choices)


def judged_by(settings: Settings) -> dict[str, Any]:
    """The arguments of `MetaLearner` that say what is learned from: a criterion or a loss, and which output."""
    judged: dict[str, Any] = {}
    if settings.loss is not None:
        judged["loss"] = own_of(settings, "loss").value
    else:
        judged["criterion"] = F.mse_loss if source_of(settings).kind == "regression" else F.cross_entropy
    if settings.output is not None:
        judged["output"] = settings.output
    return judged


def _head(settings: Settings, model: nn.Module, pattern: str) -> str:
    """The head as an algorithm takes it. pattern: see `Algorithm`."""
    head = head_of(settings, model)
    if head is None:
        raise InputError(
            f"the algorithm {settings.algorithm} needs a head, and {settings.model} has no nn.Linear: name the layer, "
            "--head NAME"
        )
    return head if "*" in head and pattern.endswith("*") else pattern.format(head)


def inner_lr(settings: Settings) -> float:
    """The step size as this library takes it, whose losses are means. Where the loss is "summed", divided by the
    shots and summed over the examples, its gradient is as many times larger as there are classes.
    """
    return settings.inner_lr * (settings.ways if settings.inner_loss == "summed" else 1)


def for_test(settings: Settings, learner: MetaLearner) -> MetaLearner:
    """The same learner with the mini-batches of the test; it shares all parameters with `learner`."""
    if settings.test_inner_batch_size == learner.inner_batch_size:
        return learner
    tested = copy.copy(learner)
    tested.inner_batch_size = settings.test_inner_batch_size
    return tested


def build_optimizer(settings: Settings, learner: MetaLearner) -> torch.optim.Optimizer:
    """The run's outer optimiser.

    Learned inner step sizes move at meta_lr times inner_lr: Adam's steps do not shrink with what they move,
    and at meta_lr itself the step sizes of the sinusoid's Meta-SGD grew until ten steps gave nan.
    """
    if ALGORITHMS[settings.algorithm].outer == "sgd":
        return torch.optim.SGD(learner.parameters(), lr=settings.meta_lr, weight_decay=settings.weight_decay)
    parameters = learner.meta_parameters()
    rates = [parameter for name, parameter in parameters.items() if name.startswith("inner_lr.")]
    others = [parameter for name, parameter in parameters.items() if not name.startswith("inner_lr.")]
    rates_lr = settings.meta_lr * inner_lr(settings) if settings.rates_lr is None else settings.rates_lr
    groups = [
        {"params": others, "weight_decay": settings.weight_decay},
        {"params": rates, "lr": rates_lr, "weight_decay": 0.0},  # a step size of 0 is no simpler than another
    ]
    groups = [group for group in groups if group["params"]]
    if settings.weight_decay:
        return torch.optim.AdamW(groups, lr=settings.meta_lr)
    return torch.optim.Adam(groups, lr=settings.meta_lr)


COMPILE: dict[Compiled, Compile] = {"auto": "auto", "yes": True, "no": False}


def build_plan(
    settings: Settings,
    learner: MetaLearner,
    data: Data,
    tasks_at_once: int | None = None,
    decided: bool | None = None,
) -> Plan:
    """How the whole run's meta-gradients are computed.

    tasks_at_once: other than the settings', as memory ran out. decided: whether it was compiled, where a run goes on.
    """
    tasks, iterations = data.train.batch(0, settings.meta_batch_size), settings.iterations
    if settings.seconds is not None:
        iterations = calls_within(settings.seconds, learner, tasks)
    return plan(
        learner,
        tasks,
        engine=settings.engine,
        tasks_at_once=tasks_at_once or settings.tasks_at_once,
        compile=COMPILE[settings.compile],
        iterations=iterations,
        decided=decided,
        autocast=None if settings.autocast == "none" else getattr(torch, settings.autocast),
    )


def build_schedule(settings: Settings, spent: Callable[[], float] = float) -> Callable[[int], float] | None:
    """Iteration → factor of the meta_lr; None if it is constant.

    spent: the seconds of training so far, which count instead of iterations where the run is limited by them.
    """
    if settings.schedule == "constant":
        return None
    schedule, seconds = {"cosine": cosine, "linear": linear}[settings.schedule], settings.seconds
    if seconds is None:
        return schedule(settings.iterations)
    pace = schedule(seconds)
    return lambda iteration: pace(min(spent(), seconds))


def _without_norms(model: nn.Module) -> list[str]:
    """The names of all parameters but those of batch norms."""
    kinds = (BatchNorm, *NATIVE_BATCH_NORMS)
    norms = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
    return [name for name, _ in model.named_parameters() if not name.startswith(norms)]
