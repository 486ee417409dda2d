import dataclasses
import json
import math
import os
import signal

import pytest
import torch

import characters
from fomaml.app import compare
from fomaml.app import isolated as isolating
from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import build_learner, build_optimizer, open_data
from fomaml.app.cli import main
from fomaml.app.commands import CompareOptions
from fomaml.app.compare import describe, expand, first_order_cosine, gradient_evaluations, isolated, run_one
from fomaml.app.judge import told
from fomaml.app.networks import build_model, head_name
from fomaml.app.settings import Settings
from fomaml.app.settle import settle
from fomaml.errors import InputError
from fomaml.sealed import unsealed
from fomaml.tasks import Examples, Task, one
from fomaml.train import train
from moments import TICK, Ticking

SMALL = {
    "source": "sinusoid", "iterations": 4, "meta_batch_size": 2, "test_tasks": 5, "test_steps": (0, 1),
    "baselines": False,
}  # fmt: skip


def settings(algorithm, **choices):
    return settle(**{"source": "sinusoid", "algorithm": algorithm, **choices})


def options(**choices):
    """The options of a small comparison, each in its group."""

    def made(kind):
        return kind(
            **{
                field.name: made(field.default_factory)
                if dataclasses.is_dataclass(field.default_factory)
                else chosen.pop(field.name, field.default)
                for field in dataclasses.fields(kind)
            }
        )

    chosen = {**SMALL, **choices}
    options = made(CompareOptions)
    assert not chosen
    return options


def alone(settings, out, cosine_every=None):
    return run_one(settings, out, cosine_every, threads=1)


@pytest.fixture
def in_this_process(monkeypatch):
    """No process per algorithm: torch takes seconds to import."""

    def here(function, *arguments):
        try:
            return function(*arguments, threads=1)
        except InputError as error:
            return {"failed": str(error)}

    monkeypatch.setattr(compare, "isolated", here)


# ── every algorithm has a preset, and it learns


def test_every_algorithm_has_a_title_of_its_own():
    assert len({algorithm.title for algorithm in ALGORITHMS.values()}) == len(ALGORITHMS)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in ANY_WAYS])
def test_preset_learns_sinusoids(algorithm):
    """Its recipe, from an error above 2.5 down by a quarter within a few hundred iterations."""
    iterations = 60 if algorithm in ("imaml", "maml++", "meta-sgd") else 120
    config = settings(algorithm, iterations=iterations, schedule="constant")
    meta_lr = config.meta_lr * (1 if algorithm == "reptile" else 5)
    data, learner = open_data(config), build_learner(config, build_model(config))
    optimizer = build_optimizer(dataclasses.replace(config, meta_lr=meta_lr), learner)
    records = train(
        learner, data.train, optimizer, iterations=iterations, meta_batch_size=25, measure_every=iterations
    )
    losses = torch.stack([record.meta_loss for record in records])
    assert losses[:5].mean() > 2.5
    assert losses[-20:].mean() < 0.9 * losses[:5].mean()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_preset_takes_images(algorithm):
    config = settle(source="mnist", algorithm=algorithm, iterations=10)
    model = build_model(config)
    learner = build_learner(config, model)
    examples = Examples(torch.randn(10, 1, 28, 28), torch.arange(5).repeat(2))
    outputs = learner.adapt(examples, 1)(examples.inputs)
    assert outputs.shape[0] == 10 and outputs.shape[1] >= 5


@pytest.mark.parametrize("name", ["mlp", "conv4", "conv4-strided"])
def test_head_is_the_last_linear_layer(name):
    config = settle(source="mnist", algorithm="anil", model=name)
    model = build_model(config)
    head = head_name(model)
    assert model.get_submodule(head).out_features == 10
    assert build_learner(config, model).adapted == [f"{head}.weight", f"{head}.bias"]


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"algorithm": "proto-maml"}, "proto-maml needs classes"),
        ({"algorithm": "zero-head"}, "zero-head needs classes"),
        (
            {"algorithm": "mamal"},
            "unknown algorithm 'mamal', did you mean maml",
        ),
        ({"source": "mnist", "algorithm": "cavia", "model": "conv4"}, "cavia goes with the model mlp"),
    ],
)
def test_what_does_not_go_together(choices, words):
    with pytest.raises(InputError, match=words):
        settle(**{"source": "sinusoid", **choices})


# ── the settings of a comparison


def test_fomaml_is_first_and_each_algorithm_once():
    configs = expand(options(algorithms=("maml", "reptile", "maml")))
    assert [config.algorithm for config in configs] == ["fomaml", "maml", "reptile"]
    assert {type(config) for config in configs} == {Settings}
    assert len({(c.seed, c.iterations, c.meta_batch_size, c.shots, c.test_tasks) for c in configs}) == 1
    assert configs[2].meta_lr == 1.0


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (
            {"algorithms": ("fomaml", "anli")},
            "unknown algorithm 'anli', did you mean anil",
        ),
        ({"algorithms": ("proto-maml",)}, "proto-maml needs classes"),
        ({"seconds": 0.0, "iterations": None}, "seconds must be a positive finite number, got 0.0"),
        ({"seconds": math.nan, "iterations": None}, "seconds must be a positive"),
        ({"iterations": -1}, "iterations must be a whole number of 1 or more, got -1"),
        ({"seconds": 5.0}, "--iterations 4 or --seconds 5, not both"),
        ({"cosine_every": 0}, "--cosine-every must be a whole number"),
        ({"test_tasks": 0}, "--test-tasks must be a whole number"),
    ],
)
def test_bad_settings(choices, words, tmp_path):
    with pytest.raises(InputError, match=words):
        compare.compare(options(**choices), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "old.txt").write_text("")
    with pytest.raises(InputError, match="already holds results; give another --out"):
        compare.compare(options(), tmp_path, say=lambda line: None)


# ── one algorithm


GRADIENTS = {  # algorithm → (gradients, Hessian-vector products) of one task with 3 inner steps
    "fomaml": (4, 0),
    "maml": (4, 3),
    "reptile": (3, 0),
    "anil": (4, 0),
    "boil": (4, 0),
    "meta-sgd": (4, 3),
    "maml++": (6, 3),
    "imaml": (5, 5),
    "cavia": (4, 0),
    "sign-maml": (4, 0),
    "zero-head": (4, 0),
    "proto-maml": (5, 0),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_evaluations_are_those_autograd_computes(algorithm, monkeypatch):
    source = "mnist" if algorithm in ANY_WAYS else "sinusoid"
    choices = {"choices": {"strength": 2.0, "cg_steps": 5}} if algorithm == "imaml" else {}
    config = settle(source=source, algorithm=algorithm, inner_steps=3, **choices)
    learner = build_learner(config, build_model(config))
    if source == "mnist":
        labels = torch.arange(5)
        task = Task(*(Examples(torch.randn(5, 1, 28, 28), labels) for _ in range(2)))
    else:
        task = one(open_data(config).train.batch(0, 1), 0)
    calls = []
    grad = torch.autograd.grad

    def spy(outputs, inputs, grad_outputs=None, **choices):
        calls.append("product" if grad_outputs is not None else "gradient")
        if choices.get("create_graph") and algorithm != "imaml":
            calls.append("product")  # the meta-gradient goes back through this gradient
        return grad(outputs, inputs, grad_outputs, **choices)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    found = gradient_evaluations(learner, task)
    assert found == GRADIENTS[algorithm]
    # The last call is the meta-gradient: of the query losses (all K at once for MAML++, the features too for
    # Proto-MAML), but of no model's loss for Reptile and iMAML.
    last = {"reptile": 0, "imaml": 0, "maml++": 3, "proto-maml": 2}.get(algorithm, 1)
    assert (calls.count("gradient") - 1 + last, calls.count("product")) == found


def test_seconds_end_the_training(tmp_path, monkeypatch):
    Ticking(monkeypatch)
    config = settings(
        "fomaml", meta_batch_size=2, test_tasks=5, test_steps=(0, 1), seconds=0.3, baselines=False
    )
    found = alone(config, tmp_path / "fomaml", cosine_every=200)
    assert 300 <= found["iterations"] <= 301  # the recipe's do not count
    assert found["seconds"] == pytest.approx(found["iterations"] * TICK)
    assert found["tasks_per_second"] == pytest.approx(2 * found["iterations"] / found["seconds"])
    assert [entry["iteration"] for entry in found["cosines"]] == [0, 200, found["iterations"]]


def test_what_a_run_costs_and_leaves(tmp_path):
    config = settings("maml", inner_steps=2, **{k: v for k, v in SMALL.items() if k != "source"})
    found = alone(config, tmp_path / "maml")
    assert found["iterations"] == 4
    assert found["gradient_evaluations"] == 4 * 2 * 3
    assert found["hessian_products"] == 4 * 2 * 2
    assert found["peak_memory_mb"] >= 0
    assert {steps: len(scores) for steps, scores in found["scores"].items()} == {0: 5, 1: 5}
    assert found["cosines"] == []


def test_same_seed_same_scores(tmp_path):
    config = settings("reptile", inner_steps=2, **{k: v for k, v in SMALL.items() if k != "source"})
    first, second = (alone(config, tmp_path / name)["scores"] for name in "ab")
    assert first == second


def test_memory_is_that_of_the_peak():
    memory = compare.Memory(torch.device("cpu"))
    block = torch.ones(25_000_000)  # 100 MB, freed before anyone looks
    del block
    assert 90 < memory.peak() < 200


# ── the cosine


def test_cosine_is_one_where_second_order_adds_nothing():
    config = settings("fomaml", inner_lr=1e-9)
    model, tasks = build_model(config).double(), open_data(config).train.batch(0, 4).to(dtype=torch.float64)
    assert first_order_cosine(config, model, tasks) == pytest.approx(1, abs=1e-6)


def test_cosine_of_a_model_with_a_known_answer():
    """One weight and a bias: ∇ of MAML is (I - αH)ᵀ ∇ of FOMAML, H the Hessian of the support loss."""
    config = settings("fomaml", inner_lr=0.1, inner_steps=1)
    model = torch.nn.Linear(1, 1).double()
    tasks = open_data(config).train.batch(0, 1).to(dtype=torch.float64)
    x, y = tasks.support.inputs[0], tasks.support.targets[0]
    joined = torch.cat([x, torch.ones_like(x)], 1)
    theta = torch.cat([model.weight.detach().flatten(), model.bias.detach()])
    hessian = 2 * joined.T @ joined / len(x)
    phi = theta - 0.1 * 2 * joined.T @ (joined @ theta - y[:, 0]) / len(x)
    query = torch.cat([tasks.query.inputs[0], torch.ones_like(x)], 1)
    first = 2 * query.T @ (query @ phi - tasks.query.targets[0, :, 0]) / len(x)
    second = (torch.eye(2) - 0.1 * hessian).double() @ first
    expected = (first @ second / first.norm() / second.norm()).item()
    assert first_order_cosine(config, model, tasks) == pytest.approx(expected, abs=1e-12)


# ── the whole


def test_comparison_is_saved_and_told(in_this_process, tmp_path):
    lines = []
    config = options(algorithms=("fomaml", "maml"), cosine_every=2)
    result = compare.compare(config, tmp_path / "out", say=lines.append)
    saved = unsealed((tmp_path / "out" / "compare.json").read_text(), required=True)
    assert saved == result
    text = (tmp_path / "out" / "compare.txt").read_text()
    assert text == describe(result)
    fomaml, maml = result["rows"]
    assert "difference" not in fomaml
    assert maml["difference"]["mean"] == pytest.approx(maml["mean"] - fomaml["mean"])
    assert [entry["iteration"] for entry in result["cosines"]] == [0, 2, 4]
    assert all(-1 <= entry["cosine"] <= 1 for entry in result["cosines"])
    assert f"{maml['mean']:.3f} ± {maml['interval']:.3f}" in text
    assert "MAML (2/2)" in " ".join(lines)
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("statistics", "transductive"),
    [("own", True), ("support", False), ("with-query", False)],
)
def test_a_comparison_names_the_batch_statistics_it_was_tested_by(
    statistics, transductive, in_this_process, tmp_path, monkeypatch
):
    characters.shrink(monkeypatch)
    data = {"source": "omniglot", "data_root": characters.write(tmp_path / "data")}
    network = {"model": "conv4-strided", "channels": (4,), "ways": 3, "shots": 1, "norm_policy": "batch"}
    config = options(**data, **network, algorithms=(), statistics=statistics)
    result = compare.compare(config, tmp_path / "out", say=lambda line: None)
    protocol = result["protocol"]
    assert (protocol["statistics"], protocol["transductive"]) == (statistics, transductive)
    assert told(protocol) in describe(result).splitlines()[1]


def test_each_algorithm_is_a_run_to_evaluate_again(in_this_process, tmp_path, capsys):
    config = options(algorithms=("cavia",))
    result = compare.compare(config, tmp_path / "out", say=lambda line: None)
    main(["evaluate", str(tmp_path / "out" / "cavia"), "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(result["rows"][1]["mean"])


def test_a_failing_algorithm_is_a_row(in_this_process, tmp_path):
    """With this step size the inner loop explodes, for everyone but Sign-MAML."""
    config = options(inner_lr=1e9, inner_steps=8, algorithms=("fomaml", "sign-maml"))
    result = compare.compare(config, tmp_path / "out", say=lambda line: None)
    assert "at iteration 1" in result["rows"][0]["failed"]
    text = describe(result)
    assert "FAILED: the meta-loss is " in text and " at iteration 1, task 0: the inner loop diverges" in text
    assert "difference" not in result["rows"][1]


def test_an_error_that_is_no_longer_finite_diverges(in_this_process, tmp_path):
    config = options(inner_lr=1.0, test_steps=(0, 300), algorithms=())
    result = compare.compare(config, tmp_path / "out", say=lambda line: None)
    row = result["rows"][0]
    assert row["mean"] is None and math.isfinite(row["curve"]["0"]["mean"])
    assert "diverges" in describe(result)
    json.loads((tmp_path / "out" / "compare.json").read_text(), parse_constant=pytest.fail)


def test_a_process_of_its_own():
    assert isolated(_killed) == {"failed": f"its process ended with status {-signal.SIGKILL}"}


def _killed(threads):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("error", [InputError, RuntimeError])
def test_what_a_process_answers(error, monkeypatch):
    monkeypatch.setattr(isolating, "_end_with_parent", lambda: None)  # which this process has not
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # in this process Ctrl-C goes on to work
    answers = []

    def work(number, threads):
        if number:
            raise error("no such\nthing")
        return {"threads": threads}

    sender = type("Sender", (), {"send": staticmethod(answers.append)})
    isolating._answer(sender, work, (0,), threads=1)
    isolating._answer(sender, work, (1,), threads=1)
    said = r"no such\nthing" if error is InputError else "no such thing"
    assert answers == [{"threads": 1}, {"failed": said}]


def test_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (
        f"compare sinusoid --algorithms fomaml --iterations 3 --test-tasks 5 --test-steps 0 1 --out {out}"
    )
    main(arguments.split())
    assert (out / "compare.txt").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fomaml: error:") and "already holds results" in error
