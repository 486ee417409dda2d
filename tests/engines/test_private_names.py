"""The package on a torch whose private names have moved: all of it runs but what is compiled, which is eager then."""

import ast
import builtins
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fomaml.errors
from compiling import untouched, without_loops
from convolutions import convolutional
from family import LR, assert_agrees
from fomaml.engines import _torch, meta_gradient
from fomaml.engines.compiled.cache import OLDEST, too_old
from fomaml.learning.algorithms import FOMAML
from moved_names import broken, gone
from zoo import draw, example

compiles = pytest.mark.skipif(bool(too_old()), reason=too_old())
ROOT = Path(fomaml.errors.__file__).parent
COMPILING = [name for name, without in _torch.NAMES.items() if without == _torch.COMPILING]
OTHERS = [name for name in _torch.NAMES if name not in COMPILING]


def every_engine(**options):
    """(engine, learner, tasks) of modules with convolutions, buffers that change, and random numbers."""
    for engine in ("loop", "batched", "factored"):
        model, tasks, criterion = example("drift")
        yield engine, FOMAML(model, LR, 2, criterion), tasks
    model = nn.Sequential(nn.Linear(36, 8), nn.Dropout(), nn.Linear(8, 4)).double()
    yield "factored", FOMAML(model, LR, 2), draw((36,), F.cross_entropy)
    model, tasks, _ = convolutional("in-place")
    yield "loop", FOMAML(model, LR, 2), tasks


def answers(**options):
    """The meta-gradient of each."""
    found = []
    for engine, learner, tasks in every_engine():
        torch.manual_seed(5)
        found.append(meta_gradient(learner, tasks, engine=engine, tasks_at_once=2, **options))
    return found


@cache
def whole(**options):
    """The answers where no name is missing."""
    return answers(**options)


def hindrances(names):
    called = [
        name
        for name in names
        if "Exception" not in name and "Module._" not in name and "Tensor._" not in name
    ]
    return [(name, gone) for name in names] + [(name, broken) for name in called if "_schema" not in name]


def test_names_are_looked_up():
    tensor = torch.zeros(2)
    assert _torch.find("torch:Tensor._version", tensor) == _torch.version(tensor) == 0
    assert _torch.find("torch:_foreach_add") is _torch.find("torch:_foreach_add", torch) is torch._foreach_add
    for name, owner in [("torch:_none", None), ("torch._none:x", None), ("torch:Tensor._none", tensor)]:
        with pytest.raises(_torch.Missing, match=name.replace(":", ".")):
            _torch.find(name, owner)
    owners = {
        "Tensor": tensor,
        "Module": nn.ReLU(),
        "OpOverload": torch.ops.aten.relu.default,
        "Optimizer": torch.optim.SGD([tensor]),
    }
    for name in _torch.NAMES:
        assert _torch.find(name, owners.get(name.partition(":")[2].partition(".")[0])) is not None


@pytest.mark.parametrize(("name", "hindrance"), hindrances(_torch.NAMES))
def test_eager_engines_do_without_every_private_name(name, hindrance, monkeypatch):
    expected = whole()
    hindrance(name, monkeypatch)
    for found, known in zip(answers(), expected, strict=True):
        assert_agrees(found, known, 1e-12)


@pytest.mark.parametrize("hindrance", [gone, broken])
def test_a_cpu_that_does_not_tell_counts_as_one_that_imitates_bfloat16(hindrance, monkeypatch):
    names = [name for name in OTHERS if "torch:cpu." in name]
    for name in names:
        monkeypatch.setattr(torch.cpu, name.rpartition(".")[2], lambda: True)
    assert len(names) == 2 and _torch.cpu_has_bfloat16()
    for name in names:
        hindrance(name, monkeypatch)
    assert not _torch.cpu_has_bfloat16()


@compiles
@pytest.mark.parametrize(("name", "hindrance"), hindrances(COMPILING))
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_without_a_name_that_compiling_needs_it_warns_and_goes_on(engine, name, hindrance, monkeypatch):
    model, tasks, _ = convolutional("in-place") if engine == "loop" or "_schema" in name else example("mlp")
    expected = meta_gradient(FOMAML(model, LR, 1), tasks, engine=engine)
    hindrance(name, monkeypatch)
    if "inductor" in name:
        without_loops(monkeypatch)
    learner = FOMAML(model, LR, 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [meta_gradient(learner, tasks, engine=engine, compile=True) for _ in range(2)]
    if engine == "loop" and "inductor" in name:  # fused by kernels of our own
        assert told == []
    else:
        [warning] = told
        reason = f"torch {torch.__version__} has no {name.replace(':', '.')}"
        if hindrance is broken:
            reason = "unexpected arguments"
        assert str(warning.message) == f"compile=True runs uncompiled: {reason}"
        assert warning.filename == __file__
    for each in found:
        assert_agrees(each, expected, 1e-12)


@compiles
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in OTHERS if "Exception" not in name])
def test_what_is_compiled_does_without_the_others(name, monkeypatch):
    untouched(monkeypatch)
    expected = whole(compile=True)
    gone(name, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found, known in zip(answers(compile=True), expected, strict=True):
            assert_agrees(found, known, 1e-10)


@compiles
@pytest.mark.parametrize("name", [name for name in OTHERS if "Exception" in name])
def test_without_the_names_of_exceptions_the_reason_is_torchs_own(name, monkeypatch):
    class Depends(nn.Linear):
        def forward(self, inputs):
            depends = inputs[inputs[:, 0] > 0].mean(0) if "Shape" in name else inputs.sum().item()
            return super().forward(inputs * depends)

    def reason():
        learner, tasks = FOMAML(Depends(6, 4).double(), LR, 1), draw((6,), F.cross_entropy)
        with pytest.warns(RuntimeWarning) as told:
            meta_gradient(learner, tasks, engine="loop", compile=True)
        return str(told[0].message)

    assert "depends on values" in reason()
    gone(name, monkeypatch)
    assert reason().startswith("compile=True runs uncompiled: ") and "depends on values" not in reason()


def test_a_torch_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    model, tasks, criterion = example("mlp")
    learner = FOMAML(model, LR, 1, criterion)
    with pytest.warns(RuntimeWarning) as told:
        found = meta_gradient(learner, tasks, compile=True)
    [text] = [str(warning.message) for warning in told]
    oldest = ".".join(map(str, OLDEST))
    assert text == f"compile=True needs torch >= {oldest}, this is 2.6.0+cpu: runs uncompiled"
    assert told[0].filename == __file__
    assert_agrees(found, meta_gradient(learner, tasks), 1e-12)


DELETED = """
import importlib, sys, torch
import torch.utils.flop_counter, torch.fx.experimental.symbolic_shapes
torch.func.vmap(torch.nn.functional.cross_entropy)(torch.zeros(2, 3, 4), torch.zeros(2, 3).long())
before = set(sys.modules)  # with what torch loads itself when it is used
for name in {names!r}:
    module, attribute = name.split(":")
    delattr(importlib.import_module(module), attribute)
deleted = set(sys.modules) - before
import fomaml
loaded = set(sys.modules) - before - deleted
assert not [name for name in loaded if name.startswith("torch.")], loaded
assert not [name for name in loaded if "compiled" in name or ".cpu." in name], loaded
{numbers}loaded = set(sys.modules) - before - deleted
assert not [name for name in loaded if name.startswith(("torch._inductor", "torch._dynamo"))], loaded
assert not [name for name in loaded if "compiled" in name or ".cpu." in name], loaded
print(*(format(each, ".9g") for each in sums))
"""
NUMBERS = """
import fomaml, torch
from fomaml import FOMAML, meta_gradient
inputs = torch.linspace(-1, 1, 3 * 8 * 36).view(3, 8, 36).double().sin()
labels = torch.arange(8).expand(3, -1) % 4
tasks = fomaml.Task(fomaml.Examples(inputs, labels), fomaml.Examples(inputs.cos(), labels))
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(36, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4)).double()
sums = []
for engine in ("loop", "batched", "factored", "auto"):
    found = meta_gradient(FOMAML(model, 0.1, 2), tasks, engine=engine)
    sums.append(sum((g * torch.arange(g.numel()).view_as(g)).sum().item() for g in found.gradients.values()))
"""


def in_a_new_process(names):
    code = DELETED.format(names=names, numbers=NUMBERS)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_and_eager_engines_on_a_torch_without_them():
    """Those that a module of torch holds, which none of its own eager code needs once it is loaded."""
    names = [name for name in _torch.NAMES if "." not in name.partition(":")[2] and "inductor" not in name]
    found, here = in_a_new_process(names), {}
    exec(NUMBERS, here)
    assert len(set(found)) == 1 and found == [format(each, ".9g") for each in here["sums"]]


# --- no other private names -------------------------------------------------------------------------

OF_SAVED_MODULES = {"_parameters", "_buffers", "_modules"}
OF_OTHERS = {
    "_replace",
    "_fields",
    "_asdict",
    "_make",
    "_field_defaults",
    "_actions",
}  # of named tuples and argparse


def private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def defined(tree):
    """The names that a file defines, as functions, classes, variables or attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def used(tree):
    """The private names that a file reads of others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and private(node.attr):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("fomaml"):
            yield from filter(private, (*node.module.split("."), *(alias.name for alias in node.names)))
        elif isinstance(node, ast.Import):
            yield from filter(private, (part for alias in node.names for part in alias.name.split(".")))


TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in ROOT.rglob("*.py")
}
OWN = {name for tree in TREES.values() for name in defined(tree)} | set(dir(builtins))


@pytest.mark.parametrize("file", TREES)
def test_no_private_name_of_torch_elsewhere(file):
    assert set(used(TREES[file])) - OWN - OF_OTHERS - OF_SAVED_MODULES - {"__future__"} == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch._guards", {"_guards"}),
        ("from torch._guards import tracing", {"_guards"}),
        ("from torch.nn.modules.conv import _ConvNd", {"_ConvNd"}),
        ("torch.x._foreach_add(a)", {"_foreach_add"}),
        ("self._own = 1", set()),
        ("x.__class__", set()),
    ],
)
def test_the_rule_itself(source, names):
    assert set(used(ast.parse(source))) == names
