"""What the shell says speaks of options: many wrong command lines, and every message of the application."""

import ast
import re
from pathlib import Path

import pytest

import fomaml.app
from characters import settings
from commands import refused
from fomaml.app.wording import NAMES, in_python, option, spoken

QUICK = "--iterations 2 --meta-batch-size 2 --test-tasks 2 --no-baselines"
ARGUMENT = re.compile(r"(?<![\w-])[a-z_]+=\S|\w\((?!\w*\))")  # `name=value`, `call(arguments`
LONG = re.compile(rf"(?<![\w/'.-])({'|'.join(name for name in NAMES if '_' in name)})(?![\w/])")
SIZES = [name for name in NAMES if name in ("inner_lr", "meta_lr", "rates_lr", "clip", "seconds")]
COUNTS = (
    "shots query-shots train-shots test-query-shots ways inner-steps inner-batch-size iterations meta-batch-size "
    "validation-tasks patience checkpoint-every test-tasks tasks-at-once test-copies"
)
WRONG = [
    *(f"train sinusoid {option(name)} {value}" for name in SIZES for value in ("0", "-1", "nan", "inf")),
    *(f"train sinusoid --{name} 0" for name in COUNTS.split()),
    "train sinusoid --seed -1",
    "train sinusoid --seed 99999999999999999999999999",
    "train sinusoid --weight-decay -1",
    "train sinusoid --inner-momentum 1",
    "train sinusoid --test-steps 5 1",
    "train sinusoid --validate-every 3",
    "train sinusoid --validate-every -3",
    "train sinusoid --statistics nosuch",
    "train sinusoid --inner-loss summed",
    "train sinusoid --image-size 28 28",
    "train sinusoid --shares 0.5 0.2 0.3",
    "train sinusoid --skip-small-classes",
    "train sinusoid --baseline-size small",
    "train sinusoid --engine factored --algorithm maml",
    "train sinusoid --engine factored --algorithm anil --inner-momentum 0.5",
    "train sinusoid --compile yes --multi-step-iterations 5",
    "train sinusoid --iterations 2 --seconds 2",
    "train sinusoid --iterations 40 --inner-lr 1e30",
    "train mnist --jitter 1",
    "train mnist --test-jitter 0.1",
    "train mnist --channels 0",
    "train folder:FOLDER --ways 7",
    "train folder:FOLDER --image-size 0 3",
    "train folder:FOLDER --image-size 8 8 --model conv4",
    "train folder:FOLDER --shares 0.5 0.5 0.5",
    "train folder:FOLDER --shares 0.5 0.5 0",
    "train folder:FOLDER --shares 0.98 0.01 0.01",
    "train folder:FOLDER --shots 30",
    "train folder:FOLDER --shots 30 --skip-small-classes",
    "train folder:UNEVEN --ways 1",
    "compare sinusoid --cosine-every 0",
    "compare sinusoid --inner-lr 0",
    "check torch.nn:Linear --input 0",
    "check torch.nn:Identity --input 3 --ways 0",
    "check torch.nn:Identity --input 3 --inner-lr 0",
    "check torch.nn:Identity --input 3 --seed -1",
    "evaluate nosuch",
]  # fmt: skip


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_answered_in_options(command, images, tmp_path, capsys):
    arguments = (
        command.replace("FOLDER", str(images / "even")).replace("UNEVEN", str(images / "uneven")).split()
    )
    if arguments[0] == "train":
        quick = [*QUICK.split(), "--out", str(tmp_path / "out")]
        if "--iterations" in arguments or "--seconds" in arguments:
            quick = quick[2:]
        arguments[2:2] = quick
    said = refused(capsys, arguments)
    assert not ARGUMENT.search(said) and not LONG.search(said), said


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("use engine='batched' or 'loop'", "use --engine batched or loop"),
        ("engine='batched' does not take it", "--engine batched does not take it"),
        ("compile=True does not", "--compile yes does not"),
        ("compile=False goes on", "--compile no goes on"),
        ("try a smaller inner_lr or meta_lr", "try a smaller --inner-lr or --meta-lr"),
        ("with statistics='support', say", "with --statistics support, say"),
        ("give the size=(height, width) to resize to", "give --image-size HEIGHT WIDTH to resize them to"),
        ("give inputs.to(torch.float32), or decode images as pixels() does", "save them as float32"),
        ("take it without its classes (fewer_classes=True)", "take it without its classes (--fewer-classes)"),
        ("/data/inner_lr/test_tasks.json is damaged", "/data/inner_lr/test_tasks.json is damaged"),
        ("'inner_lr' is no class", "'inner_lr' is no class"),
        ("--inner-lr must be 1", "--inner-lr must be 1"),
    ],
)  # fmt: skip
def test_arguments_become_options(message, expected):
    assert spoken(message) == expected == spoken(expected)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("named again: add --model own.py:Net", "named again: add model='own.py:Net'"),
        ("add --loss losses.burgers:residual", "add loss='losses.burgers:residual'"),
        ("or give --accept-changed-code", "or give accept_changed_code=True"),
        ("give --model FILE.py:NAME, or another", "give model='FILE.py:NAME', or another"),
        ("/a--model/b is damaged", "/a--model/b is damaged"),
    ],
)  # fmt: skip
def test_options_become_arguments(message, expected):
    assert in_python(message) == expected == in_python(expected)


def raised():
    """The constant parts of every message that the application raises, or its readers of data for it."""
    root = Path(fomaml.app.__file__).parent
    for path in [*root.glob("*.py"), root.parent / "data" / "folder.py", root.parent / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError":
                parts = [
                    n.value
                    for n in ast.walk(node)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                yield from (pytest.param(part, id=f"{path.name}:{node.lineno}") for part in parts)


@pytest.mark.parametrize("part", list(raised()))
def test_no_message_speaks_of_arguments(part):
    assert not LONG.search(spoken(part)) and not re.search(r"(?<![\w-])[a-z_]+=[\w'(]", spoken(part))


def test_settle_itself_speaks_of_options():
    with pytest.raises(ValueError, match="--test-copies must be a whole number"):
        settings(test_copies=0)
