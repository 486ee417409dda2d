"""What the settings make of data, model, learner and optimiser."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from characters import settings
from fomaml.app import build
from fomaml.app.build import build_learner, build_optimizer, build_schedule, for_test, open_data
from fomaml.app.cli import main
from fomaml.app.networks import build_model
from fomaml.learning.objectives import MultiStepLoss
from fomaml.models import BatchNorm, Conv4Strided, Conv4StridedFlat
from fomaml.tasks import one
from fomaml.train import linear, train

pytestmark = pytest.mark.usefixtures("small")


def built(config):
    model = build_model(config)
    return model, build_learner(config, model)


def test_the_models_options_reach_the_model():
    model, _ = built(settings(channels=(6,), norm_parameters="shift", norm_policy="per-step", inner_steps=2))
    assert isinstance(model, Conv4Strided) and model.head.in_features == 6
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    assert all(m.weight is None and m.policy == "per-step" and len(m.mean) == 3 for m in norms)
    model, _ = built(settings(model="conv4"))
    assert all(m.weight is not None for m in model.modules() if isinstance(m, BatchNorm))
    model, _ = built(settings(model="conv4-strided-flat"))
    assert isinstance(model, Conv4StridedFlat) and model.head.in_features == 4 * 2 * 2
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    assert Conv4StridedFlat(5, image=(3, 33, 17))(torch.rand(2, 3, 33, 17)).shape == (2, 5)


def test_no_norm_is_meta_learned_and_does_not_adapt():
    model, learner = built(settings(adapt="no-norm"))
    norms = {
        f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, BatchNorm) for p in ("weight", "bias")
    }
    assert len(norms) == 8
    assert norms <= set(learner.meta_learned)
    assert set(learner.adapted) == set(learner.meta_learned) - norms
    _, learner = built(settings())
    assert norms <= set(learner.adapted)


def test_the_summed_loss_is_the_original_codes(root):
    """One inner step on the sum of the losses over the shots only, by hand."""
    config = settings(inner_loss="summed", inner_lr=0.03, inner_steps=1, shots=3, ways=4, data_root=root)
    model, learner = built(config)
    support = open_data(config).train[0].support
    loss = F.cross_entropy(model(support.inputs), support.targets, reduction="sum") / 3
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    adapted = learner.adapt(support)
    for own, gradient, found in zip(model.parameters(), gradients, adapted.parameters()):
        torch.testing.assert_close(found, own - 0.03 * gradient)


def test_the_learners_options_reach_the_learner():
    _, learner = built(settings(inner_optimizer="adam", inner_batch_size=10))
    assert learner.optimizer.betas == (0.0, 0.999) and learner.inner_batch_size == 10
    assert not learner.optimizer.carried
    assert built(settings(inner_optimizer="carried-adam"))[1].optimizer.carried
    _, learner = built(settings(inner_momentum=0.5, multi_step_iterations=9))
    assert learner.optimizer.momentum == 0.5 and learner.objective == MultiStepLoss(9)
    _, learner = built(settings(algorithm="maml++", iterations=50))
    assert learner.objective == MultiStepLoss(5)
    config = settings(learn_rates="per-step", inner_steps=2, inner_lr=0.3, meta_lr=0.01)
    _, learner = built(config)
    assert learner.meta_parameters()["inner_lr.head.bias"].tolist() == pytest.approx([0.3, 0.3])
    optimizer = build_optimizer(config, learner)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, pytest.approx(0.003)]
    config = dataclasses.replace(config, rates_lr=0.5, weight_decay=0.1)
    optimizer = build_optimizer(config, learner)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.1), (0.5, 0.0)]
    assert isinstance(optimizer, torch.optim.AdamW)


def test_the_tests_mini_batches_do_not_touch_training():
    config = settings(algorithm="reptile", inner_batch_size=10, test_inner_batch_size=5)
    _, learner = built(config)
    other = for_test(config, learner)
    assert (learner.inner_batch_size, other.inner_batch_size) == (10, 5)
    assert all(a is b for a, b in zip(learner.parameters(), other.parameters()))
    assert for_test(settings(inner_batch_size=10), learner) is learner


def test_schedules():
    assert [linear(4)(i) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    assert build_schedule(settings(schedule="constant")) is None
    assert build_schedule(settings(schedule="linear", iterations=4))(1) == 0.75
    assert build_schedule(settings(schedule="cosine", iterations=4))(2) == pytest.approx(0.5)


def test_training_and_test_tasks_have_sizes_of_their_own(root):
    config = settings(
        algorithm="proto-maml",
        ways=3,
        train_ways=7,
        train_shots=2,
        query_shots=4,
        test_query_shots=6,
        augment="none",
        data_root=root,
    )
    data = open_data(config)
    assert data.train[0].support.inputs.shape[0] == 14
    assert data.train[0].query.inputs.shape[0] == 28
    for episodes in (data.test, data.validation, data.tuning):
        assert episodes[0].support.inputs.shape[0] == 3
        assert episodes[0].query.inputs.shape[0] == 18
    names = [set(e.source.names) for e in (data.train, data.validation, data.test)]
    assert [len(n) for n in names] == [24, 21, 21] and not set.intersection(*names)
    assert data.test.source.names != data.validation.source.names


@pytest.mark.parametrize("augment", ["none", "rotations", "turns"])
def test_rotations_and_turns_are_two_things(augment, root):
    data = open_data(settings(augment=augment, test_augment="turns", data_root=root))
    assert len(data.train.source) == (96 if augment == "rotations" else 24)
    assert data.train.turns == (augment == "turns")
    assert data.test.turns and data.validation.turns
    assert not open_data(settings(augment=augment, data_root=root)).test.turns


def test_jitter_is_of_training_alone(root):
    data = open_data(settings(jitter=0.2, data_root=root))
    assert data.train.jitter == 0.2
    assert data.test.jitter == data.validation.jitter == data.tuning.jitter == 0
    assert open_data(settings(data_root=root)).train.jitter == 0


def test_copies_are_of_the_test_alone(root):
    data = open_data(settings(jitter=0.2, test_copies=3, data_root=root))
    for episodes in (data.test, data.validation, data.tuning):
        assert (episodes.copies, episodes.jitter) == (3, 0.2)
    assert data.train.copies == 1
    assert open_data(settings(test_copies=2, test_jitter=0.1, data_root=root)).test.jitter == 0.1


def test_the_filter_reaches_the_images(root):
    size = {"data_root": root}
    near, smooth = (open_data(settings(resize=name, **size)) for name in ("nearest", "box"))
    assert "by nearest" in near.origin and "by box" in smooth.origin


def test_clipping_bounds_the_whole_gradient(root):
    def moved(clip):
        config = settings(data_root=root, ways=3, inner_steps=1)
        model, learner = built(config)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
        list(train(learner, open_data(config).train, optimizer, iterations=1, meta_batch_size=2, clip=clip))
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    free = moved(None)
    assert free.norm() > 0.05
    torch.testing.assert_close(moved(0.05), 0.05 * free / free.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(moved(1e6), free)


def test_the_engines_options_reach_the_plan(root, tmp_path, monkeypatch):
    seen = []

    def spy(learner, tasks, **options):
        seen.append(options)
        return real(learner, tasks, engine=options["engine"])

    real = build.plan
    monkeypatch.setattr(build, "plan", spy)
    quick = ["--iterations", "1", "--meta-batch-size", "2", "--test-tasks", "2", "--no-baselines"]
    options = ["--engine", "batched", "--tasks-at-once", "2", "--compile", "yes", "--autocast", "bfloat16"]
    base = ["train", "omniglot", "--channels", "4", "--data-root", str(root), "--validate-every", "0"]
    main([*base, *quick, *options, "--out", str(tmp_path / "a")])
    main([*base, *quick, "--out", str(tmp_path / "b")])
    both = {"iterations": 1, "decided": None}
    asked = {"engine": "batched", "tasks_at_once": 2, "compile": True, "autocast": torch.bfloat16, **both}
    plain = {"engine": "auto", "tasks_at_once": None, "compile": "auto", "autocast": None, **both}
    assert seen == [asked, plain]


@pytest.mark.parametrize(
    ("asked", "fast", "meant", "told"),
    [
        ("auto", True, "bfloat16", ["forward passes in bfloat16"]),
        ("auto", False, "none", []),
        (
            "bfloat16",
            False,
            "bfloat16",
            ["forward passes in bfloat16, which this device may only imitate, slowly"],
        ),
    ],
)
def test_the_precision_is_settled_when_a_run_begins(
    root, tmp_path, monkeypatch, capsys, asked, fast, meant, told
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    quick = ["--iterations", "1", "--meta-batch-size", "2", "--test-tasks", "2", "--no-baselines"]
    base = ["train", "omniglot", "--channels", "4", "--data-root", str(root), "--validate-every", "0"]
    main([*base, *quick, "--autocast", asked, "--out", str(tmp_path / "a")])
    assert json.loads((tmp_path / "a" / "config.json").read_text())["autocast"] == meant
    assert [line for line in capsys.readouterr().out.splitlines() if "forward passes" in line] == told


def test_one_task_keeps_its_examples_through_all_of_it(root):
    """Turned test tasks are the plain ones, turned: the same characters and drawings."""
    plain, turned = (
        open_data(settings(test_augment=name, data_root=root)).test for name in ("none", "turns")
    )
    a, b = one(plain.batch(0, 1), 0), one(turned.batch(0, 1), 0)
    assert torch.equal(a.support.inputs.flatten(1).sum(1), b.support.inputs.flatten(1).sum(1))
    assert not torch.equal(a.support.inputs, b.support.inputs)
