"""The options of what tasks are made of: data, and the sizes of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from fomaml.app.algorithms import ANY_WAYS
from fomaml.app.parser import option
from fomaml.app.settings import Augmentation, Decode, Filter, Question, Split, TestAugmentation
from fomaml.app.sources import names

SOURCE = (
    f"where tasks come from: {', '.join(names())}; PATH holds one directory of images per class; FILE is a csv, tsv or "
    "parquet table, or an .npz of arrays, whose rows belong to tasks by a key"
)
DATA_ROOT = (
    "the folder of the data: MNIST/raw/*-ubyte, or the archives of Omniglot; default: torchvision's download, or "
    "MNIST-5k without a network"
)


@dataclass(frozen=True)
class DataOptions:
    """Data."""

    question: Question | None = option(
        "for mnist: new-labels (all ten digits, labels shuffled in each task; default) or new-digits (meta-train on "
        "0-4, meta-test on 5-9)"
    )
    split: Split | None = option(
        "for omniglot: maml (1100, 100 and 423 characters; default), vinyals or background-evaluation"
    )
    resize: Filter | None = option(
        "for omniglot: the filter that shrinks the drawings (default: lanczos); nearest is what the original MAML code "
        "got"
    )
    image_size: tuple[int, int] | None = option(
        "for folder: the height and width to resize images to; default: as they are", metavar="PIXELS"
    )
    rgb: bool = option("for folder: keep the three colours instead of grey", False)
    shares: tuple[float, float, float] | None = option(
        "the shares for training, validation and test: for folder of its classes, where it has no directories that say "
        "so, for groups of rows of the tasks (default: 0.6 0.2 0.2); 0 for no validation",
        metavar="SHARE",
    )
    skip_small_classes: bool = option(
        "for folder: leave out classes with fewer images than a task takes, instead of refusing them", False
    )
    decode: Decode | None = option(
        "for folder: decode images once, and keep them, or whenever they are drawn, to the same bits; default: once, "
        "unless they take more than 2 GiB"
    )
    augment: Augmentation | None = option(
        "further training classes made of those there are: none (default), rotations (each class turned by 90, 180 and "
        "270 degrees is another class), turns (each class of a task is turned by a random one of these, anew in each "
        "task) or warps (600 pseudo-characters)"
    )
    jitter: float | None = option(
        "move each training image by a small random affine map of this strength: 0 for none (default), 0.1 for up to "
        "6 degrees and 10 % of stretch"
    )


@dataclass(frozen=True)
class TaskOptions:
    """Tasks."""

    query_shots: int | None = option("the query examples per class, or per sinusoid (default: 10)")
    train_ways: int | None = option(
        f"the classes of a training task, with {' or '.join(ANY_WAYS)}; default: as --ways"
    )
    train_shots: int | None = option("the support examples per class of a training task; default: as --shots")
    test_query_shots: int | None = option(
        "the query examples per class of a validation or test task; default: as --query-shots"
    )
    test_augment: TestAugmentation | None = option(
        "turn each class of a validation or test task by a random multiple of 90 degrees: none (default) or turns"
    )
    test_copies: int | None = option(
        "take each image of a validation or test task so many times, as it is and moved by the jitter of the test, and "
        "average the outputs of a query image over its copies (default: 1)"
    )
    test_jitter: float | None = option("the jitter of these copies; default: as --jitter")
