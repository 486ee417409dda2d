"""BatchNorm against torch's own, and the conversion of a model's."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fomaml.choices import Policy
from fomaml.engines import curve
from fomaml.errors import InputError
from fomaml.learning.algorithms import FOMAML
from fomaml.models import (
    BatchNorm,
    convert_batch_norm,
    native_batch_norms,
    normalising,
)
from zoo import draw

# --- BatchNorm ------------------------------------------------------------------------------------


def norm_and_inputs(shape, scale=True):
    layer = BatchNorm(shape[1], eps=1e-3, scale=scale).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, (torch.randn(shape, dtype=torch.float64) * 2 + 1).requires_grad_()


def by_torch(layer, inputs):
    weight = torch.ones_like(layer.bias) if layer.weight is None else layer.weight
    return F.batch_norm(inputs, None, None, weight, layer.bias, training=True, eps=layer.eps)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 2, 5), (2, 3, 2, 2, 2)])
def test_batch_norm_is_that_of_torch_in_value_gradient_and_second_gradient(shape, scale):
    layer, inputs = norm_and_inputs(shape, scale)
    wanted = [inputs, *layer.parameters()]
    weights = torch.randn(shape, dtype=torch.float64)
    found = []
    for outputs in (layer(inputs), by_torch(layer, inputs)):
        loss = (outputs.sin() * weights).sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        found.append([outputs.detach(), *(g.detach() for g in first), *second])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_batch_norm_passes_gradgradcheck():
    layer, inputs = norm_and_inputs((4, 2, 2, 2))
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_batch_norm_is_exact_under_vmap_in_both_orders():
    layer, _ = norm_and_inputs((4, 3, 2, 2))
    stack = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64)

    def squared_gradient(inputs):
        return torch.func.grad(lambda x: layer(x).sin().sum())(inputs).square().sum()

    for function in (
        layer,
        torch.func.grad(lambda x: layer(x).sin().sum()),
        torch.func.grad(squared_gradient),
    ):
        expected = torch.stack([function(inputs) for inputs in stack])
        torch.testing.assert_close(torch.func.vmap(function)(stack), expected, rtol=1e-10, atol=1e-12)


def test_batch_norm_keeps_its_accuracy_in_float32():
    """Inputs far from 0, as pixels of a bright image: within a few roundings of the float64 result."""
    layer = BatchNorm(1)
    inputs = torch.randn(64, 1) + 100
    expected = by_torch(layer.double(), inputs.double())
    error = (layer.float()(inputs) - expected).abs().max().item()
    assert error < 1e-4  # inputs themselves are rounded to 4e-6 of their spread


@pytest.mark.parametrize("policy", get_args(Policy))
@pytest.mark.parametrize("training", [True, False])
def test_no_forward_pass_changes_the_buffers(policy, training):
    layer = BatchNorm(3, policy=policy, steps=2).train(training)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert len(before) == (2 if policy in ("running", "per-step", "frozen") else 0)
    layer(torch.randn(5, 3))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_errors_of_batch_norm():
    with pytest.raises(InputError, match="unknown policy 'mean'; there are: batch, support, running"):
        BatchNorm(3, policy="mean")
    with pytest.raises(InputError, match="the policy per-step needs steps"):
        BatchNorm(3, policy="per-step")


def test_statistics_of_the_first_examples_only():
    layer, inputs = norm_and_inputs((9, 3, 2, 2))
    with normalising(first=4):
        joined = layer(inputs)
    torch.testing.assert_close(joined[:4], layer(inputs[:4]), rtol=0, atol=1e-12)
    changed = torch.cat([inputs[:5], inputs[5:] * 3])
    with normalising(first=4):
        torch.testing.assert_close(layer(changed)[4], joined[4], rtol=0, atol=1e-12)
    assert (layer(changed)[4] - layer(inputs)[4]).abs().max() > 0.01  # and outside of the block they do
    with pytest.raises(RuntimeError), normalising(first=4):
        raise RuntimeError
    torch.testing.assert_close(layer(inputs), by_torch(layer, inputs), rtol=0, atol=1e-12)


# --- convert_batch_norm ---------------------------------------------------------------------------


def test_convert_batch_norm_keeps_the_weights_and_the_function():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, eps=1e-2), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)),
        nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2),
    ).double()  # fmt: skip
    nn.init.normal_(model[1].weight)
    inputs = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    weight, expected = model[1].weight, model(inputs)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert native_batch_norms(model) == ["1", "2.1", "4"]
    assert convert_batch_norm(model) is model
    assert native_batch_norms(model) == []
    assert model[1].weight is weight
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-11)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in trainable]


@pytest.mark.parametrize("affine", [True, False])
def test_convert_batch_norm_keeps_the_dtype(affine):
    layer = convert_batch_norm(nn.BatchNorm1d(3, affine=affine).double())
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


def test_convert_batch_norm_replaces_the_model_itself_and_keeps_its_mode():
    layer = convert_batch_norm(nn.BatchNorm1d(3).eval())
    assert isinstance(layer, BatchNorm) and not layer.training


def test_convert_batch_norm_keeps_running_statistics():
    native = nn.BatchNorm1d(3).double()
    native(torch.randn(8, 3, dtype=torch.float64) * 3 + 2)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    expected = native.eval()(inputs)
    for policy in ("running", "frozen", "per-step"):
        layer = convert_batch_norm(nn.Sequential(native), policy, steps=2)
        torch.testing.assert_close(layer.eval()(inputs), expected, rtol=0, atol=1e-12)


def test_convert_batch_norm_reaches_a_layer_that_is_used_under_two_names():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3)})
    model["b"] = model["a"]
    convert_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in (model["a"], model["b"]))
    assert model["a"].weight is model["b"].weight


def test_a_converted_net_has_an_inductive_curve():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    learner = FOMAML(convert_batch_norm(model).double(), 0.1, 1)
    tasks = draw((1, 6, 6), F.cross_entropy)
    (_, inductive), (_, transductive) = (
        curve(learner, tasks, [1], statistics=s)[0] for s in ("support", "own")
    )
    assert (inductive - transductive).abs().max() > 1e-3


def test_the_norm_of_a_single_example_is_exactly_its_shift():
    norm = BatchNorm(3)
    norm.bias.data = torch.tensor([0.0, 0.5, -0.1])
    norm.weight.data = torch.tensor([1.7, 0.3, 2.9])
    for number in range(5):
        assert torch.equal(norm(torch.randn(1, 3) * 10**number), norm.bias[None])
