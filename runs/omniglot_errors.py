"""Which test images a finished Omniglot run gets wrong, and which share of the errors the worst of them make.

python -m runs.omniglot_errors docs/results/omniglot_best --ways 5 --shots 5 --data-root my/omniglot
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from fomaml.app.build import for_test, open_data
from fomaml.app.cli import told_in_one_line
from fomaml.app.parser import option, parse, positional
from fomaml.app.rundir import load_run
from fomaml.data.source import ClassSource
from fomaml.engines import curve
from fomaml.episodes import Episodes
from fomaml.evaluate import estimate
from runs.omniglot_plot import pyplot

TOGETHER = 50  # tasks
BESIDE = 8  # images of the same class, in the plot


@dataclass(frozen=True)
class Options:
    """Judge a run on its test tasks, count the errors by query image, and show the images that are wrong most often
    beside others of their class.
    """

    run: Path = positional("the run directory, or a folder kept under docs/results/", metavar="RUN")
    ways: int | None = option("N, for heads that do not depend on it; default: the run's")
    shots: int | None = option("K; default: the run's")
    query_shots: int | None = option("query images per class; default: K")
    tasks: int = option("the number of test tasks", 4000)
    seed: int = option("the seed of the test tasks", 1)
    worst: int = option("how many images to show", 20)
    weights: str = option("the best weights by validation, or the last", "best")
    data_root: Path | None = option("the folder of Omniglot's archives; default: the run's")
    plot: Path | None = option("a PNG file of the worst images; default: none")


def main(options: Options) -> None:
    queries = options.query_shots or options.shots
    changes = {"ways": options.ways, "shots": options.shots, "test_query_shots": queries, "test_copies": 1}
    changes = {name: number for name, number in changes.items() if number}
    config, learner = load_run(options.run, options.weights, data_root=options.data_root, **changes)
    learner, episodes = for_test(config, learner), open_data(config, options.seed).test
    errors, scores = count_errors(learner, episodes, options.tasks, config.test_steps[-1])
    accuracy, total = estimate(scores), errors.total()
    protocol = f"{config.ways}-way {config.shots}-shot, {config.test_query_shots} query images a class"
    print(
        f"{protocol}, {options.tasks} tasks: {100 * accuracy.mean:.2f} ± {100 * accuracy.interval:.2f} %, "
        f"{total} errors"
    )
    source = episodes.source
    worst = errors.most_common(options.worst)
    share = sum(number for _, number in worst) / max(total, 1)
    print(
        f"{len(worst)} of {len(source.inputs)} images make {100 * share:.0f} % of the errors; "
        f"without these errors: {100 * (1 - (1 - accuracy.mean) * (1 - share)):.2f} %"
    )
    for row, number in worst:
        name, place = where(source, row)
        print(f"{number:6d}  {name}, image {place}")
    if options.plot is not None:
        draw(source, worst, options.plot)
        print(f"saved {options.plot}")


def count_errors(learner, episodes: Episodes, tasks: int, steps: int) -> tuple[Counter[int], torch.Tensor]:
    """How often each image, by its row of the source, was a query image that was wrong; and (tasks,) accuracies."""
    numbered = ClassSource(torch.arange(len(episodes.source.inputs)), episodes.source.labels())
    sizes = {name: getattr(episodes, name) for name in ("ways", "shots", "query_shots", "seed")}
    rows = Episodes(numbered, **sizes)  # draws what `episodes` draws
    errors: Counter[int] = Counter()
    scores = []
    for start in range(0, tasks, TOGETHER):
        number = min(TOGETHER, tasks - start)
        batch = episodes.batch(start, number)
        [(_, outputs)] = curve(learner, batch, [steps])
        wrong = outputs.argmax(-1) != batch.query.targets
        errors.update(rows.batch(start, number).query.inputs[wrong].tolist())
        scores.append(1 - wrong.double().mean(1))
    return errors, torch.cat(scores)


def where(source: ClassSource, row: int) -> tuple[str, int]:
    """The class of a row, and its place among the images of the class."""
    number = int(source.labels()[row])
    return source.names[number], row - int(source.offsets[number])


def draw(source: ClassSource, worst: list[tuple[int, int]], path: Path) -> None:
    """A line for each image: itself, how often it was wrong, and others of its class."""
    plots = pyplot()
    height = len(worst) * 0.5 + 0.3
    figure, axes = plots.subplots(len(worst), 1 + BESIDE, figsize=(6, height), squeeze=False)
    for line, (row, number) in zip(axes, worst):
        first = row - where(source, row)[1]
        others = [other for other in range(first, first + BESIDE + 1) if other != row]
        for axis, each in zip(line, [row, *others]):
            axis.imshow(source.inputs[each, 0].numpy(), cmap="gray_r")
            axis.set_axis_off()
        line[0].set_title(f"{number} times", fontsize=7, pad=1)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=72)
    plots.close(figure)


if __name__ == "__main__":
    with told_in_one_line():
        main(parse(Options))
