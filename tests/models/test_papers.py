"""The papers' networks: shapes, numbers of parameters, and the obvious stack of layers."""

import pytest
import torch
import torch.nn.functional as F

from fomaml.errors import InputError
from fomaml.models import MLP, Conv4, Conv4Strided


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "shape", "outputs", "number"),
    [
        (MLP(784, 256, 10), (1, 28, 28), 10, 203_530),  # 784·256 + 256 + 256·10 + 10
        (MLP(1, 40, 40, 1), (1,), 1, 1_761),
        (Conv4(5), (1, 28, 28), 5, 112_261),  # 640 + 3·36 928 + 4·128 + 64·5 + 5
        (Conv4(5, scale=False), (1, 28, 28), 5, 112_005),
        (Conv4(5, channels=32, image=(3, 84, 84)), (3, 84, 84), 5, 32_901),
        (Conv4(3, channels=2, image=(2, 16, 40)), (2, 16, 40), 3, 38 + 3 * 38 + 4 * 4 + 4 * 3 + 3),
        (Conv4Strided(20), (1, 28, 28), 20, 640 + 3 * 36_928 + 4 * 128 + 64 * 20 + 20),
        (Conv4Strided(5, channels=8, in_channels=3, scale=False), (3, 30, 17), 5, 224 + 3 * 584 + 4 * 8 + 45),
    ],
)
def test_shapes_and_numbers_of_parameters(model, shape, outputs, number):
    assert model(torch.randn(2, *shape)).shape == (2, outputs)
    assert parameters(model) == number


@pytest.mark.parametrize(
    ("model", "expected"),
    [(Conv4(5), 64), (Conv4(5, channels=32, image=(3, 84, 84)), 800), (Conv4Strided(5), 64)],
)
def test_the_width_of_the_head(model, expected):
    assert model.head.in_features == expected


def test_conv4_is_the_obvious_stack():
    model = Conv4(5, channels=3, image=(1, 20, 20)).double()
    inputs = hidden = torch.randn(6, 1, 20, 20, dtype=torch.float64)
    for conv, norm, *_ in model.body:
        hidden = F.conv2d(hidden, conv.weight, conv.bias, padding=1)
        hidden = F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True)
        hidden = F.max_pool2d(F.relu(hidden), 2)
    expected = F.linear(hidden.flatten(1), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-11)


def test_conv4_strided_is_the_obvious_stack():
    model = Conv4Strided(5, channels=3).double()
    inputs = hidden = torch.randn(6, 1, 28, 28, dtype=torch.float64)
    for conv, norm, *_ in model.body:
        hidden = F.conv2d(hidden, conv.weight, conv.bias, stride=2, padding=1)
        hidden = F.relu(F.batch_norm(hidden, None, None, norm.weight, norm.bias, training=True))
    expected = F.linear(hidden.mean((2, 3)), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-11)


def test_conv4_refuses_images_that_vanish():
    with pytest.raises(InputError, match="15x28 is less than 16x16"):
        Conv4(5, image=(1, 15, 28))
