"""Intents of a domain that was never seen, from one or five utterances each: the text table of docs/results.md.

python -m runs.text --data-root FOLDER      # FOLDER/text holds CLINC150; needs pip install wordllama, for its vectors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from fomaml import Examples, GroupEpisodes, GroupSource, ProtoMAML, Task, evaluate, train
from fomaml.app.parser import option, parse
from fomaml.baselines import nearest_centroid
from fomaml.errors import InputError
from fomaml.learning.learner import MetaLearner
from fomaml.models import lora
from fomaml.tasks import one
from fomaml.train import cosine
from runs.study import ROOT, Parts, best, estimate, keep, table, verdict

OUT = ROOT / "runs" / "text"
WAYS, STEPS = 5, 3
SHOTS, FOLDS, SEEDS = (1, 5), range(5), range(3)
TUNING, TEST = 40, 100  # tasks of each domain
SCALE = 2.0  # of the vectors, whose length is 1
# the trials of each, tuned on the validation domains of a fold: as many for a baseline as for a learner
RATES = ((1.0, 3e-4), (1.0, 1e-3), (10.0, 3e-4), (10.0, 1e-3))  # inner and outer step size
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C of the logistic regression
FORMS = ("raw", "unit", "centred", "centred, unit")  # of the vectors, for the nearest centroid
POOLED_STEPS = (30, 100, 300, 1000)  # of the pooled classifier
LEARNERS = ("head only", "LoRA and head", "all")


@dataclass(frozen=True)
class Options:
    """CLINC150, 5-way, from word vectors: Proto-MAML that adapts the head, LoRA or all, beside baselines."""

    data_root: Path = option("the folder that holds text/clinc150_full.json", ROOT.parent / "shared" / "data")
    iterations: int = option("outer steps of each training", 80)


def embedded(texts: list[str]) -> Tensor:
    """(texts, 256) means of the vectors of their tokens, as wordllama's `embed` gives them: by the tokenizer and the
    vectors in the package itself, whose own loader would look for a download.
    """
    package = find_spec("wordllama")
    if package is None or not package.submodule_search_locations:
        raise InputError("the vectors come from the package wordllama: pip install wordllama")
    from tokenizers import Tokenizer

    folder = Path(package.submodule_search_locations[0])
    [vectors] = load_file(folder / "weights" / "l2_supercat_256.safetensors").values()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
    ids = [torch.tensor(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return torch.stack([vectors[own].float().mean(0) for own in ids])


class Fold:
    """The sources of one fold: two domains for the test, the next two for validation, six to train on."""

    def __init__(self, data_root: Path, fold: int):
        self.means, self.intents, self.domains, names = read(data_root)
        turned = names[2 * fold :] + names[: 2 * fold]
        self.test_names, self.validation_names, self.training = turned[:2], turned[2:4], turned[4:]
        self.rows = torch.from_numpy(np.isin(self.domains, self.training))
        self.centre = F.normalize(self.means, dim=-1)[self.rows].mean(0)

    def source(self, names: list[str], form: str) -> GroupSource:
        """Domains are the groups, and each has intents of its own. form: of the vectors."""
        return GroupSource(self.vectors(form), self.intents, self.domains).select(names)

    def vectors(self, form: str) -> Tensor:
        if form == "raw":
            return self.means
        vectors = F.normalize(self.means, dim=-1)
        if form.startswith("centred"):
            vectors = vectors - self.centre
        return (F.normalize(vectors, dim=-1) if form == "centred, unit" else vectors) * SCALE

    def tasks(
        self, names: list[str], shots: int, form: str, seed: int = 1, query_shots: int = 10
    ) -> GroupEpisodes:
        source, in_turn = self.source(names, form), names != self.training
        own = {"shots": shots, "query_shots": query_shots, "seed": seed, "in_turn": in_turn}
        return GroupEpisodes(source, ways=WAYS, **own)


@cache
def read(data_root: Path) -> tuple[Tensor, np.ndarray, np.ndarray, list[str]]:
    """The vectors of all utterances, their intents and domains, and the names of the domains, sorted."""
    folder = data_root / "text"
    utterances = json.loads((folder / "clinc150_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "clinc150_domains.json").read_text(encoding="utf-8"))
    domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
    pairs = [pair for part in ("train", "val", "test") for pair in utterances[part]]
    vectors = embedded([text for text, _ in pairs])
    intents = np.array([intent for _, intent in pairs])
    return vectors, intents, np.array([domain_of[each] for each in intents]), sorted(domains)


class Net(nn.Module):
    """A linear map of the vectors, which starts as the identity, and a head of intents."""

    def __init__(self, intents: int = WAYS):
        super().__init__()
        self.body = nn.Linear(256, 256)
        self.head = nn.Linear(256, intents)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(256))
            self.body.bias.zero_()

    def forward(self, vectors: Tensor) -> Tensor:
        return self.head(self.body(vectors))


def learner_of(what: str, inner_lr: float) -> MetaLearner:
    """Each starts a task from the head of prototypes; what adapts differs."""
    net = Net()
    if what == "LoRA and head":
        lora(net, "body", rank=4)
        return ProtoMAML(net, inner_lr, STEPS, adapted=["*lora_*", "head.*"])
    return ProtoMAML(net, inner_lr, STEPS, adapted="head.*" if what == "head only" else "*")


def trained(
    fold: Fold, what: str, shots: int, rates: tuple[float, float], seed: int, iterations: int
) -> MetaLearner:
    inner_lr, meta_lr = rates
    torch.manual_seed(seed)
    learner = learner_of(what, inner_lr)
    episodes = fold.tasks(fold.training, shots, "unit", seed=100 + seed, query_shots=5)
    arguments = {"iterations": iterations, "meta_batch_size": 4, "schedule": cosine(iterations)}
    optimizer = torch.optim.Adam(learner.parameters(), meta_lr)
    for _ in train(learner, episodes, optimizer, measure_every=iterations, **arguments):
        pass
    return learner


def by_domain(episodes: GroupEpisodes, scores: Tensor) -> list[float]:
    return (100 * episodes.by_group(scores)).tolist()


def pooled(fold: Fold, steps: int, seed: int) -> nn.Module:
    """The same network, trained to tell all 90 intents of the training domains apart."""
    torch.manual_seed(seed)
    labels = torch.from_numpy(np.unique(fold.intents[fold.rows.numpy()], return_inverse=True)[1])
    vectors, net = fold.vectors("unit")[fold.rows], Net(int(labels.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(labels), (128,))
        optimizer.zero_grad()
        F.cross_entropy(net(vectors[rows]), labels[rows]).backward()
        optimizer.step()
    return net.body.requires_grad_(False)


class Through:
    """Episodes whose inputs are the outputs of a map."""

    copies = 1

    def __init__(self, episodes: GroupEpisodes, map: nn.Module):
        self.episodes, self.map, self.ways = episodes, map, episodes.ways

    def batch(self, start: int, tasks: int):
        found = self.episodes.batch(start, tasks)
        return Task(*(Examples(self.map(part.inputs), part.targets) for part in found))


def logistic(episodes: GroupEpisodes, tasks: int, strength: float) -> Tensor:
    """(tasks,) accuracies of scikit-learn's logistic regression, fitted on each support set."""
    found = []
    drawn = episodes.batch(0, tasks)
    for number in range(tasks):
        support, query = one(drawn, number)
        model = LogisticRegression(C=strength, max_iter=1000).fit(support.inputs.numpy(), support.targets)
        found.append(float((model.predict(query.inputs.numpy()) == query.targets.numpy()).mean()))
    return torch.tensor(found)


def baselines(fold: Fold, shots: int, parts: Parts, name: str) -> dict[str, list[float]]:
    validation, test = fold.validation_names, fold.test_names
    tuning, tests = 2 * TUNING, 2 * TEST

    def centroid() -> list[float]:
        found = {
            form: nearest_centroid(fold.tasks(validation, shots, form), tasks=tuning).mean().item()
            for form in FORMS
        }
        episodes = fold.tasks(test, shots, best(found, 1))
        return by_domain(episodes, nearest_centroid(episodes, tasks=tests))

    def regression() -> list[float]:
        own = fold.tasks(validation, shots, "unit")
        found = {str(c): logistic(own, tuning, c).mean().item() for c in STRENGTHS}
        episodes = fold.tasks(test, shots, "unit")
        return by_domain(episodes, logistic(episodes, tests, float(best(found, 1))))

    def transfer() -> list[float]:
        own = fold.tasks(validation, shots, "unit")
        found = {
            str(steps): nearest_centroid(Through(own, pooled(fold, steps, 0)), tasks=tuning).mean().item()
            for steps in POOLED_STEPS
        }
        episodes, steps = fold.tasks(test, shots, "unit"), int(best(found, 1))
        scores = [nearest_centroid(Through(episodes, pooled(fold, steps, s)), tasks=tests) for s in SEEDS]
        return by_domain(episodes, torch.stack(scores).mean(0))

    rows = {
        "nearest centroid": centroid,
        "logistic regression": regression,
        "pooled classifier, nearest centroid": transfer,
    }
    return {row: parts.get(f"{name} {row}", function) for row, function in rows.items()}


def learned(fold: Fold, what: str, shots: int, parts: Parts, name: str, iterations: int) -> dict:
    """{steps: [[a score of each test domain], by seed]} of the step sizes that are best on the validation domains."""

    def trial(rates: tuple[float, float]) -> float:
        learner = trained(fold, what, shots, rates, 0, iterations // 3)
        own = fold.tasks(fold.validation_names, shots, "unit")
        return evaluate(learner, own, tasks=2 * TUNING, at_steps=STEPS)[STEPS].mean().item()

    def run(rates: tuple[float, float], seed: int) -> dict[str, list[float]]:
        learner = trained(fold, what, shots, rates, seed, iterations)
        episodes = fold.tasks(fold.test_names, shots, "unit")
        found = evaluate(learner, episodes, tasks=2 * TEST, at_steps=(0, STEPS))
        return {str(steps): by_domain(episodes, scores) for steps, scores in found.items()}

    tried = {str(own): parts.get(f"{name} {what} trial {own}", lambda own=own: trial(own)) for own in RATES}
    chosen = best(tried, 1)
    rates = next(own for own in RATES if str(own) == chosen)
    runs = [
        parts.get(f"{name} {what} {rates} seed {seed}", lambda seed=seed: run(rates, seed)) for seed in SEEDS
    ]
    return {"rates": list(rates), **{steps: [each[steps] for each in runs] for steps in runs[0]}}


def main(options: Options) -> None:
    torch.set_num_threads(1)
    parts = Parts(ROOT / "out" / "text-parts.json")
    units: dict[str, dict[int, list[float]]] = {}  # row → shots → a value of each domain
    chosen: dict[str, list[list[float]]] = {}
    for shots in SHOTS:
        for number in FOLDS:
            fold, name = Fold(options.data_root, number), f"{shots}-shot fold {number}"
            for row, found in baselines(fold, shots, parts, name).items():
                units.setdefault(row, {}).setdefault(shots, []).extend(found)
            for what in LEARNERS:
                result = learned(fold, what, shots, parts, name, options.iterations)
                chosen.setdefault(f"{what}, {shots}-shot", []).append(result["rates"])
                for steps in ("0", str(STEPS)):
                    mean = torch.tensor(result[steps], dtype=torch.float64).mean(0).tolist()
                    units.setdefault(f"{what}, {steps} steps", {}).setdefault(shots, []).extend(mean)
    names = read(options.data_root)[-1]
    report(units, chosen, names)


def report(units: dict[str, dict[int, list[float]]], chosen: dict, names: list[str]) -> None:
    values = {row: {s: torch.tensor(v) for s, v in by.items()} for row, by in units.items()}
    against = list(values)[:3]
    tables = []
    for shots in SHOTS:
        rows = []
        for row, by in values.items():
            cells = [row, estimate(by[shots]).text()]
            for baseline in against:
                difference = estimate(by[shots] - values[baseline][shots])
                text = f"{difference.text(sign='+')} {verdict(difference, 1)}"
                cells.append("" if row in against else text)
            rows.append(cells)
        heads = [
            f"{WAYS}-way {shots}-shot",
            "accuracy in %",
            *(f"against {baseline}" for baseline in against),
        ]
        tables.append(table(heads, rows))
    result = {
        "domains": names,
        "accuracy by domain": units,
        "step sizes by fold": chosen,
        "seeds": len(SEEDS),
    }
    keep(OUT, "\n\n".join(tables), result)


if __name__ == "__main__":
    main(parse(Options))
