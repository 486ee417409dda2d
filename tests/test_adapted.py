"""An adapted module comes back: into a fresh one of its kind, with the same outputs, by every way of a state."""

import copy
import io
from functools import partial

import pytest
import safetensors.torch
import torch
from torch import nn

from fomaml.checkpoint import load_weights, save_weights
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML, ProtoMAML, ZeroHeadMAML
from fomaml.models import (
    MLP,
    BatchNorm,
    Conv4,
    Conv4Strided,
    Conv4StridedFlat,
    WithContext,
    convert_batch_norm,
)
from fomaml.tasks import Examples

IMAGE = (1, 16, 16)
LIBRARY = {
    "conv4": partial(Conv4, channels=3, image=IMAGE),
    "conv4-strided": partial(Conv4Strided, channels=3),
    "conv4-strided-flat": partial(Conv4StridedFlat, channels=3, image=IMAGE),
    "no scale": partial(Conv4, channels=3, image=IMAGE, scale=False),
}
POLICIES = {
    "batch": {}, "support": {}, "running": {}, "per-step": {"steps": 2}, "frozen": {},
}  # fmt: skip


def own(outputs, policy="batch", affine=True, shared=False, **options):
    """A net of torch's layers, converted; `shared`: one batch norm stands under two names."""
    norms = [nn.BatchNorm2d(3, affine=affine) for _ in range(2)]
    norms[0].running_mean.fill_(0.3)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 5, 3), norms[0], nn.ReLU(), nn.Conv2d(3, 3, 1), norms[not shared], nn.Flatten(),
        nn.Linear(48, outputs),
    )  # fmt: skip
    return convert_batch_norm(net, policy, **options)


KINDS = {
    **{f"{name}, {policy}": partial(build, policy=policy, **options)
       for name, build in LIBRARY.items() for policy, options in POLICIES.items()},
    **{f"converted, {policy}": partial(own, policy=policy, **options) for policy, options in POLICIES.items()},
    "converted, without affine": partial(own, affine=False),
    "converted, shared": partial(own, shared=True),
    "mlp": lambda outputs: MLP(256, 4, outputs),
    "context": lambda outputs: nn.Sequential(nn.Flatten(), WithContext(MLP(258, 4, outputs), 2)),
}  # fmt: skip


def support(ways=3):
    return Examples(torch.randn(2 * ways, *IMAGE), torch.arange(2 * ways) % ways)


def adapted(build, statistics, ways=3, algorithm=FOMAML, **choices):
    model = build(ways)
    return algorithm(model, 0.1, 2, **choices).adapt(support(ways), statistics=statistics)


def by_torch(module, fresh, path):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def by_safetensors(module, fresh, path):
    safetensors.torch.save_model(module, path)
    safetensors.torch.load_model(fresh, path)
    return fresh


def by_checkpoint(module, fresh, path):
    save_weights(path, module)
    return load_weights(path, fresh)


def by_state(module, fresh, path):
    fresh.load_state_dict(module.state_dict())
    return fresh


def by_assigning(module, fresh, path):
    fresh = fresh.to("meta")
    fresh.load_state_dict(module.state_dict(), assign=True)
    return fresh


def by_copy(module, fresh, path):
    return copy.deepcopy(module)


def by_a_copy_of_the_fresh_one(module, fresh, path):
    return by_state(by_state(module, fresh, path), copy.deepcopy(fresh), path)


WAYS = [
    by_state, by_torch, by_safetensors, by_checkpoint, by_assigning, by_copy, by_a_copy_of_the_fresh_one,
]  # fmt: skip


# safetensors looks for tensors under two names before it loads, and those of a layer that is to be frozen are not there
BOTH = [(kind, way) for kind in KINDS for way in WAYS if "shared" not in kind or way is not by_safetensors]


@pytest.mark.parametrize("statistics", ["own", "support"])
@pytest.mark.parametrize(("kind", "way"), BOTH, ids=lambda value: getattr(value, "__name__", value))
def test_an_adapted_module_comes_back(kind, statistics, way, tmp_path):
    if "shared" in kind and way is by_safetensors:
        pytest.skip(
            "safetensors looks for tensors under two names before it loads: those frozen are not yet there"
        )
    module = adapted(KINDS[kind], statistics)
    fresh = way(module, KINDS[kind](3), tmp_path / "weights.safetensors")
    for training in (True, False):
        for inputs in (torch.randn(4, *IMAGE), torch.randn(1, *IMAGE)):
            assert torch.equal(fresh.train(training)(inputs), module.train(training)(inputs))
    assert [str(layer) for layer in fresh.modules()] == [str(layer) for layer in module.modules()]
    if statistics == "support":
        assert {m.policy for m in fresh.modules() if isinstance(m, BatchNorm)} <= {"frozen"}


@pytest.mark.parametrize("algorithm", [ProtoMAML, ZeroHeadMAML])
@pytest.mark.parametrize("kind", ["conv4, batch", "conv4-strided, running", "converted, support"])
def test_a_head_of_another_width_fits_a_fresh_one_of_that_width_alone(kind, algorithm):
    build = KINDS[kind]
    head = "6" if "converted" in kind else "head"
    module = algorithm(build(3), 0.1, 2, head=head).adapt(support(ways=4), statistics="support")
    fresh = build(4)
    fresh.load_state_dict(module.state_dict())
    inputs = torch.randn(5, *IMAGE)
    assert torch.equal(fresh(inputs), module(inputs))
    with pytest.raises(RuntimeError, match=rf"size mismatch for {head}\.weight: .*\[4, .*\[3, "):
        build(3).load_state_dict(module.state_dict())


def state(policy, statistics="own"):
    return adapted(KINDS[f"conv4, {policy}"], statistics).state_dict()


def without(state, word):
    return {name: tensor for name, tensor in state.items() if word not in name}


@pytest.mark.parametrize(
    ("given", "policy", "message"),
    [
        *((partial(state, learned), other, r'Unexpected key\(s\).*"body\.0\.1\.mean"')
          for learned in ("running", "per-step", "frozen") for other in ("batch", "support")),
        (partial(state, "batch"), "running", r'Missing key\(s\).*"body\.0\.1\.mean"'),
        (partial(state, "per-step"), "running", r"size mismatch for body\.0\.1\.mean: .*\[3, 3\].*\[1, 3\]"),
        (partial(state, "per-step"), "frozen", r"size mismatch for body\.0\.1\.mean"),
        (lambda: without(state("batch", "support"), "0.1.frozen_variance"), "batch",
         r'Missing key\(s\).*"body\.0\.1\.frozen_variance"'),
        (lambda: state("batch", "support") | {"body.0.1.mean": torch.zeros(1, 3)}, "running",
         r'Unexpected key\(s\).*"body\.0\.1\.mean"'),
        (lambda: state("batch", "support") | {"body.0.1.frozen_mean": torch.zeros(1, 4)}, "batch",
         r"size mismatch for body\.0\.1\.frozen_mean: .*\[1, 4\].*\[1, 3\]"),
        (lambda: state("batch", "support") | {"more": torch.zeros(1)}, "batch", r'Unexpected key\(s\).*"more"'),
    ],
)  # fmt: skip
def test_mistakes_stay_mistakes(given, policy, message, tmp_path):
    with pytest.raises(RuntimeError, match=message):
        KINDS[f"conv4, {policy}"](3).load_state_dict(given())
    safetensors.torch.save_file(given(), tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match="does not fit the model"):
        load_weights(tmp_path / "weights.safetensors", KINDS[f"conv4, {policy}"](3))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_state_of_a_meta_model_freezes_nothing(policy):
    model, fresh = (KINDS[f"conv4, {policy}"](3) for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    assert {m.policy for m in fresh.modules() if isinstance(m, BatchNorm)} == {policy}
    found = KINDS[f"conv4, {policy}"](3).load_state_dict(state("batch", "support"), strict=False)
    assert found.missing_keys == found.unexpected_keys == []
    # what has been frozen keeps its statistics: those of another policy are none
    frozen = adapted(KINDS["conv4, running"], "support")
    with pytest.raises(RuntimeError, match="Missing key"):
        frozen.load_state_dict(state("running"))


def test_states_of_the_policy_frozen_have_their_names_of_old():
    layer = BatchNorm(3, policy="frozen")
    assert list(layer.state_dict()) == ["weight", "bias", "mean", "variance"]
    layer.load_state_dict(
        {
            "weight": torch.ones(3),
            "bias": torch.zeros(3),
            "mean": torch.ones(1, 3),
            "variance": torch.ones(1, 3),
        }
    )
    assert layer(torch.ones(2, 3)).abs().max() == 0


def test_an_adapted_module_is_learned_on_from_and_frozen_anew():
    module = adapted(KINDS["conv4, batch"], "support")
    again = FOMAML(module, 0.1, 1).adapt(support(), statistics="support")
    assert torch.equal(again.body[0][1].frozen_mean, module.body[0][1].frozen_mean)
    fresh = KINDS["conv4, batch"](3)
    fresh.load_state_dict(again.state_dict())
    other = adapted(KINDS["conv4, batch"], "support")
    fresh.load_state_dict(other.state_dict())
    inputs = torch.randn(3, *IMAGE)
    assert torch.equal(fresh(inputs), other(inputs))
