"""Judge a finished Omniglot run by every protocol, and keep what is small of it for docs/results/."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from fomaml.app.cli import told_in_one_line
from fomaml.app.judge import evaluate_run, told
from fomaml.app.presets import PRESETS
from fomaml.app.session import circumstances, load_config, load_run, weights_file
from fomaml.app.settings import WEIGHTS, TrainConfig, known, to_json
from fomaml.errors import InputError
from fomaml.files import write_text


@dataclass(frozen=True)
class Options:
    """Evaluate a finished run with 1 and 15 query images per class and those of its own test, by the statistics it
    was trained with and by those of the support set alone, by those with the query image where its figure was
    published so, and by further protocols where asked for, and copy it without its data's path.
    """

    run: tyro.conf.Positional[Path]
    """The run directory."""
    to: Path
    """The folder to write."""
    also: tuple[str, ...] = ()
    """Further tasks to judge the run on, such as 5w1s; for heads that do not depend on the ways."""
    weights: str = "best"
    """Keep the best weights by validation, or the last."""
    copies: int = 1
    """Judge K query images per class also with so many copies of each image; as what follows, after the inner steps of
    training alone."""
    jitter: float | None = None
    """What moves these copies; by default the jitter of the run's training."""
    turned: bool = False
    """Judge K query images per class also with each class of a task turned at random, as MAML's figures were, for runs
    that are not tested so."""
    balanced: bool = False
    """Judge K query images per class, turned where asked for, also with their number per class taken for known."""
    tasks: int = 1000
    """The number of test tasks."""
    seed: int = 1
    """The seed of the test tasks: others than those of the run's own result."""
    data_root: Path | None = None
    """The folder of Omniglot's archives; by default the run's."""


MANY = 15  # query images per class
FILES = ("result.json", "result.txt", "metrics.jsonl")


def main(options: Options) -> None:
    known("weights", options.weights, WEIGHTS)
    needed = (*FILES, "weights.safetensors")
    if missing := [name for name in needed if not (options.run / name).exists()]:
        raise InputError(f"{options.run} has no {missing[0]}: is the run finished?")
    config, here = load_config(options.run), circumstances()  # before anything is written: of a clean tree
    found = [judged(options, **changes) for changes in settings(options, config)]
    options.to.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(options.run / name, options.to / name)
    shutil.copyfile(weights_file(options.run, options.weights), options.to / "weights.safetensors")
    kept = dataclasses.replace(config, data_root=None, out=None)
    write_text(options.to / "config.json", to_json(kept))
    facts = {"seed": options.seed, "weights": options.weights, **here, "evaluations": found}
    write_text(options.to / "evaluations.json", json.dumps(facts, indent=2) + "\n")


def settings(options: Options, config: TrainConfig) -> list[dict]:
    """What each evaluation changes of the run's settings, and balanced."""
    tasks = {(config.ways, config.shots): (config.test_query_shots, 1, MANY)}
    for name in options.also:
        ways, shots = map(int, name.removesuffix("s").split("w"))
        tasks[ways, shots] = (*tasks.get((ways, shots), ()), shots, MANY)
    turned = {"test_augment": "turns"} if options.turned else {}
    further = []
    if options.copies > 1:
        further.append({"test_copies": options.copies, "test_jitter": options.jitter})
    if turned:
        further.append(turned)
    if options.balanced:
        further.append(turned | {"balanced": True})
    found = []
    for (ways, shots), queries in tasks.items():
        own = {"ways": ways, "shots": shots, "test_tasks": options.tasks}
        found += [own | {"test_query_shots": query} for query in dict.fromkeys(queries)]
        once = {"test_query_shots": queries[0], "test_steps": (config.inner_steps,)}
        found += [own | once | changes for changes in further]
    return found


def judged(options: Options, balanced: bool = False, **changes) -> dict:
    """The result of one evaluation, which is also printed."""
    config, learner = load_run(options.run, options.weights, data_root=options.data_root, **changes)
    preset = PRESETS.get(config.preset)
    published = preset and preset.statistics == "with-query" and changes["test_query_shots"] != MANY
    kinds = ("own", "support", "with-query") if published else ("own", "support")
    result = evaluate_run(config, learner, kinds, options.seed, balanced=balanced)
    for each in (result, *result["by_statistics"].values()):
        protocol = each["protocol"]
        choices = f", {protocol['copies']} copies" if protocol["copies"] > 1 else ""
        choices += ", turned" * (protocol["test_augment"] == "turns") + ", balanced" * protocol["balanced"]
        print(
            f"{protocol['ways']}-way {protocol['shots']}-shot, {protocol['query_shots']} query{choices}, "
            f"{told(protocol)}: {100 * each['accuracy']:.2f} ± {100 * each['interval']:.2f} %",
            flush=True,
        )
    return result


if __name__ == "__main__":
    with told_in_one_line():
        main(tyro.cli(Options))
