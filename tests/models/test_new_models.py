"""Networks for series, tables and signals, and low-rank changes: against plain torch, and exact in every engine."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from family import assert_agrees, error
from fomaml.checkpoint import load_weights, save_weights
from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning.algorithms import CAVIA, FOMAML, MAML
from fomaml.models import SIREN, ConvNet1d, GRUNet, LoRALinear, TableMLP, lora
from fomaml.tasks import one
from zoo import draw


class Split(nn.Module):
    """A table network whose numbers and categories come in one tensor: two numbers, then two categories."""

    def __init__(self):
        super().__init__()
        self.table = TableMLP(2, [3, 4], 4, hidden=(8,))

    def forward(self, rows):
        codes = (rows[:, 2:] * 2).abs().floor().clamp(max=2).long()
        return self.table(rows[:, :2], codes)


def changed(model, **options):
    """A model with low-rank changes that change something already."""
    model = lora(model, **options)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b.weight)
    return model


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def modulated(**options):
    """A SIREN of low frequencies: after a step of LR those of the paper are anywhere."""
    model = SIREN(2, 1, hidden=8, layers=2, omega=2.0, **options)
    nn.init.normal_(model.context, std=0.1)
    return model


# name → (builder, shape of one input, criterion, what adapts, whether `factored` takes it)
MODELS = {
    "conv": (lambda: ConvNet1d(3, 4, widths=(8, 8), kernels=(5, 3), strides=(2, 1), groups=4), (3, 12),
             F.cross_entropy, "*", True),
    "gru": (lambda: GRUNet(3, 4, hidden=6), (3, 7), F.cross_entropy, "*", True),
    "table": (Split, (4,), F.cross_entropy, "*", True),
    "siren": (lambda: SIREN(2, 1, hidden=8, omega=2.0), (2,), F.mse_loss, "*", True),
    "siren, shifts": (lambda: modulated(modulation="shift"), (2,), F.mse_loss, "*", True),
    "siren, latent shifts": (lambda: modulated(modulation="shift", latent=3), (2,), F.mse_loss, "context", False),
    "siren, film": (lambda: modulated(modulation="film"), (2,), F.mse_loss, "context", False),
    "siren, latent film": (lambda: modulated(modulation="film", latent=3), (2,), F.mse_loss, "*", True),
    "lora": (lambda: changed(perceptron(), layers=["0", "2"], rank=2, alpha=3), (6,), F.cross_entropy, "*lora_*", True),
    "lora, all adapts": (lambda: changed(perceptron(), rank=2), (6,), F.cross_entropy, "*", True),
}  # fmt: skip
LR, STEPS = 0.1, 3


def made(name):
    build, shape, criterion, adapted, factored = MODELS[name]
    torch.manual_seed(1)
    return build().double(), draw(shape, criterion, tasks=2), criterion, adapted, factored


def rates(model, adapted):
    return dict.fromkeys(
        (n for n in reference.learned(model) if adapted == "*" or adapted.strip("*") in n), LR
    )


# --- the meta-gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("second", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize("name", MODELS)
def test_the_meta_gradient_of_each_engine_is_that_of_the_slow_loop(name, second):
    model, tasks, criterion, adapted, factored = made(name)
    slow = reference.maml if second else reference.fomaml
    expected = reference.over_tasks(
        lambda m, t: slow(m, t, criterion, rates(m, adapted), STEPS), model, tasks
    )
    learner = (MAML if second else FOMAML)(model, LR, STEPS, criterion, adapted=adapted)
    for engine in ("loop", "batched"):
        assert_agrees(meta_gradient(learner, tasks, engine=engine), expected)
    if factored and not second:
        assert_agrees(meta_gradient(learner, tasks, engine="factored"), expected)
    else:
        with pytest.raises(InputError, match="the factored engine does not take this learner"):
            meta_gradient(learner, tasks, engine="factored")


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("siren, ")])
def test_cavia_adapts_the_modulations_from_zero(name):
    model, tasks, criterion, *_ = made(name)
    expected = reference.over_tasks(
        lambda m, t: reference.cavia(m, t, criterion, LR, STEPS, "context", first_order=False), model, tasks
    )
    learner = CAVIA(model, LR, STEPS, criterion, first_order=False)
    assert learner.adapted == ["context"]
    for engine in ("loop", "batched"):
        assert_agrees(meta_gradient(learner, tasks, engine=engine), expected)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_is_saved_and_loaded(name, tmp_path):
    model, tasks, criterion, adapted, _ = made(name)
    task = one(tasks, 0)
    before = model(task.query.inputs)
    found = FOMAML(model, LR, STEPS, criterion, adapted=adapted).adapt(task.support)
    expected, _ = reference.adapt(model, task.support, criterion, rates(model, adapted), STEPS)
    outputs = found(task.query.inputs)
    torch.testing.assert_close(outputs, expected(task.query.inputs), rtol=1e-9, atol=1e-11)
    assert (outputs - before).abs().max() > 1e-4
    save_weights(tmp_path / "weights.safetensors", found)
    again = load_weights(tmp_path / "weights.safetensors", MODELS[name][0]().double())
    assert torch.equal(again(task.query.inputs), outputs)


# --- against plain torch --------------------------------------------------------------------------


def test_the_convolution_net_is_the_obvious_stack():
    model = ConvNet1d(6, 7).double()
    series = torch.randn(5, 6, 100, dtype=torch.float64)
    hidden = series
    for number, stride in ((0, 4), (3, 2), (6, 2)):
        layer, norm = model.body[number], model.body[number + 1]
        hidden = F.conv1d(hidden, layer.weight, layer.bias, stride, layer.kernel_size[0] // 2)
        hidden = F.relu(F.group_norm(hidden, 8, norm.weight, norm.bias))
    expected = F.linear(hidden.mean(2), model.head.weight, model.head.bias)
    torch.testing.assert_close(model(series), expected, rtol=0, atol=1e-12)
    assert model(series).shape == (5, 7) and model(series[:1, :, :1]).shape == (1, 7)
    # 6·9·64 + 64 + 2·(64·5·64 + 64) + 3·128 of the norms + 64·7 + 7
    assert sum(p.numel() for p in model.parameters()) == 45_447


def test_the_gru_is_torchs():
    model, torchs = GRUNet(3, 4, hidden=6).double(), nn.GRU(3, 6, batch_first=True).double()
    with torch.no_grad():
        for own, theirs in (
            (model.into.weight, torchs.weight_ih_l0), (model.into.bias, torchs.bias_ih_l0),
            (model.again.weight, torchs.weight_hh_l0), (model.again.bias, torchs.bias_hh_l0),
        ):  # fmt: skip
            theirs.copy_(own)
    series = torch.randn(5, 3, 11, dtype=torch.float64)
    expected = model.head(torchs(series.mT)[0][:, -1])
    torch.testing.assert_close(model(series), expected, rtol=0, atol=1e-12)
    drawn = torch.cat(
        [p.flatten() for n, p in GRUNet(1, 2, hidden=100).named_parameters() if "head" not in n]
    )
    assert 0.099 < drawn.abs().max() <= 0.1  # 1 / √hidden, as torch draws them


def test_the_table_network_is_an_mlp_on_what_is_looked_up():
    model = TableMLP(2, [3, 100], 4, hidden=(8, 5))
    numbers, categories = torch.randn(6, 2), torch.tensor([[0, 99], [1, 5], [2, 0], [0, 0], [1, 1], [2, 98]])
    assert [tuple(table.weight.shape) for table in model.embeddings] == [(3, 2), (100, 32)]
    joined = torch.cat([numbers, *(t.weight[categories[:, i]] for i, t in enumerate(model.embeddings))], 1)
    first, second, head = (m for m in model.modules() if isinstance(m, nn.Linear))
    expected = head(second(first(joined).relu()).relu())
    torch.testing.assert_close(model(numbers, categories), expected)
    torch.testing.assert_close(model(numbers=numbers, categories=categories), expected)
    assert TableMLP(2, [], 3, hidden=())(numbers).shape == (6, 3)
    assert TableMLP(0, [3], 1, width=7)(categories=categories[:, :1]).shape == (6, 1)


@pytest.mark.parametrize("latent", [None, 3])
@pytest.mark.parametrize("modulation", [None, "shift", "film"])
def test_the_siren_is_written_out(modulation, latent):
    options = {} if modulation is None else {"modulation": modulation, "latent": latent}
    model = SIREN(2, 3, hidden=16, layers=3, omega=5.0, **options).double()
    hidden = coordinates = torch.rand(7, 2, dtype=torch.float64) * 2 - 1
    plain = coordinates
    if modulation:
        nn.init.normal_(model.context)
        told = (
            model.context
            if latent is None
            else F.linear(model.context, model.modulate.weight, model.modulate.bias)
        )
        told = told.view(3, 16) if modulation == "shift" else told.view(3, 2, 16)
    for number, layer in enumerate(model.body):
        hidden, plain = layer(hidden), torch.sin(5 * layer(plain))
        if modulation == "shift":
            hidden = hidden + told[number]
        if modulation == "film":
            hidden = hidden * (1 + told[number, 0]) + told[number, 1]
        hidden = torch.sin(5 * hidden)
    torch.testing.assert_close(model(coordinates), model.head(hidden), rtol=0, atol=1e-12)
    if modulation and latent is None:
        nn.init.zeros_(model.context)
        torch.testing.assert_close(model(coordinates), model.head(plain), rtol=0, atol=1e-12)


def test_the_initialisation_of_a_siren():
    """Bounds of section 3.2, and theorem 1.8 of the supplement: what goes into the later sines is standard normal."""
    model = SIREN(2, 1, hidden=512, layers=5)
    bounds = [0.5, *[math.sqrt(6 / 512) / 30] * 5]
    for layer, bound in zip([*model.body, model.head], bounds):
        assert 0.98 * bound < layer.weight.abs().max() <= bound
    hidden = torch.rand(2000, 2) * 2 - 1
    spreads = []
    for layer in model.body:
        spreads.append((30 * F.linear(hidden, layer.weight)).std().item())
        hidden = torch.sin(30 * layer(hidden))
    assert all(0.9 < spread < 1.1 for spread in spreads[1:]) and spreads[0] > 5


# --- LoRA -----------------------------------------------------------------------------------------


def test_lora_changes_nothing_at_first_and_then_by_its_product():
    model = perceptron().double()
    inputs = torch.randn(5, 6, dtype=torch.float64)
    expected, names = model(inputs), [name for name, _ in model.named_parameters()]
    weight = model[0].weight
    assert lora(model, ["0", "4"], rank=2, alpha=6) is model and model[0].weight is weight
    assert torch.equal(model(inputs), expected)
    new = ["0.lora_a.weight", "0.lora_b.weight", "4.lora_a.weight", "4.lora_b.weight"]
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names + new)
    merged = perceptron().double()
    merged.load_state_dict({n: p for n, p in model.state_dict().items() if n in names})
    with torch.no_grad():
        for number in (0, 4):
            layer = model[number]
            layer.lora_b.weight.normal_()
            merged[number].weight += 6 / 2 * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(model(inputs), merged(inputs), rtol=0, atol=1e-12)
    assert (model(inputs) - expected).abs().max() > 0.1


def test_what_lora_adapts_and_what_is_meta_learned():
    model, tasks, criterion, *_ = made("lora")
    base = [name for name, _ in model.named_parameters() if "lora_" not in name]
    both = FOMAML(model, LR, STEPS, criterion, adapted="*lora_*")
    change = FOMAML(model, LR, STEPS, criterion, adapted="*lora_*", frozen=base)
    alone = CAVIA(model, LR, STEPS, criterion, context="*lora_b*", frozen="*lora_a*")
    assert both.adapted == change.adapted and all("lora_" in name for name in both.adapted)
    gradients = {
        n: meta_gradient(learner, tasks).gradients for n, learner in (("both", both), ("change", change))
    }
    assert gradients["both"].keys() == {n for n, _ in model.named_parameters()}
    own = {n: g for n, g in gradients["change"].items() if n not in base}
    assert error(own, {n: gradients["both"][n] for n in own}) < 1e-12
    assert not any(gradients["change"][name].any() for name in base if name in gradients["change"])
    moved = meta_gradient(alone, tasks).gradients
    assert {name for name, gradient in moved.items() if gradient.any()} == {*base}
    assert not alone.adapt(one(tasks, 0).support)[0].lora_b.weight.equal(model[0].lora_b.weight)


def test_a_layer_of_two_names_has_one_change_and_ties_stay():
    layer = nn.Linear(4, 4)
    model = lora(nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(4, 4)}), ["a", "b"])
    assert model["a"] is model["b"] and isinstance(model["a"], LoRALinear) and type(model["c"]) is nn.Linear
    assert isinstance(lora(nn.Linear(4, 2)), LoRALinear)
    half = lora(nn.Linear(4, 2).half().eval())
    assert half.lora_a.weight.dtype == torch.float16 and not half.lora_a.training


def test_the_fast_path_of_a_transformer_does_not_go_past_the_change():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    inputs = torch.randn(2, 3, 8)
    before = model(inputs)
    model = changed(model, layers="linear*")
    with torch.no_grad():
        found = model(inputs)
    torch.testing.assert_close(found, model(inputs))
    assert (found - before).abs().max() > 0.01


# --- what is refused ------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


SERIES, ROWS = torch.randn(5, 3, 9), torch.randn(5, 2)
REFUSED = {
    "a series of other channels": (
        lambda: ConvNet1d(6, 2)(SERIES), r"ConvNet1d takes \(examples, 6 channels, time\), got",
    ),
    "a series without time": (lambda: GRUNet(3, 2)(SERIES[..., :0]), r"GRUNet takes \(examples, 3 channels, time\)"),
    "a flat series": (lambda: GRUNet(3, 2)(ROWS), r"GRUNet takes .* got \(5, 2\)"),
    "groups": (
        lambda: ConvNet1d(3, 2, widths=(12,), kernels=(3,), strides=(1,)), "groups=8 does not divide a width of 12",
    ),
    "convolutions": (
        lambda: ConvNet1d(3, 2, widths=(8,)), "widths, kernels and strides say it for each .* 1, 3 and 3",
    ),
    "no columns": (lambda: TableMLP(0, [], 2), "a table needs columns"),
    "no categories": (
        lambda: TableMLP(2, [3], 1)(ROWS), r"the categories of a TableMLP are int64 \(examples, 1\), got none",
    ),
    "floating categories": (
        lambda: TableMLP(2, [3, 3], 1)(ROWS, ROWS), "the categories of .* got torch.float32 of shape",
    ),
    "other numbers": (
        lambda: TableMLP(3, [], 1)(ROWS), r"the numbers of a TableMLP are floating \(examples, 3\), got",
    ),
    "numbers too many": (
        lambda: TableMLP(0, [3], 1)(ROWS, ROWS[:, :1].long()), "the numbers of a TableMLP are floating",
    ),
    "other coordinates": (lambda: SIREN(3, 1)(ROWS), r"SIREN takes \(examples, 3 coordinates\), got \(5, 2\)"),
    "a latent of nothing": (lambda: SIREN(2, 1, latent=3), "latent is the size of what modulates"),
    "a modulation": (lambda: SIREN(2, 1, modulation="scale"), "unknown modulation 'scale'; there are: shift, film"),
    "no layer": (lambda: lora(perceptron(), "encoder.*"), "no nn.Linear layer matches encoder.*; there are: 0, 2, 4"),
    "no linear layer": (lambda: lora(nn.Conv1d(1, 1, 1)), "no nn.Linear layer matches .*; there are: none"),
    "twice": (lambda: lora(lora(perceptron()), "0"), "the layer '0' has a low-rank change already"),
    "its own layers": (lambda: lora(lora(perceptron(), "0"), "*lora_a"), "the layer '0.lora_a' has a low-rank change"),
    "attention": (
        lambda: lora(nn.TransformerEncoderLayer(8, 2)), "the layer 'self_attn.out_proj' is never called",
    ),
    "another forward pass": (lambda: lora(nn.Sequential(Doubled(2, 2))), "the layer '0', a Doubled, is more than an"),
    "a parametrised layer": (
        lambda: lora(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))), "the layer '0', a Para",
    ),
    "a lazy layer": (lambda: lora(nn.Sequential(nn.LazyLinear(2))), "the layer '0' has no shape yet"),
    "a rank": (lambda: lora(perceptron(), rank=0), "rank must be a whole number of 1 or more, got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, message):
    with pytest.raises(InputError, match=f"^{message}"):
        make()


def test_what_is_refused_leaves_the_model_as_it_was():
    model = nn.TransformerEncoderLayer(8, 2)
    before = copy.deepcopy(model)
    with pytest.raises(InputError):
        lora(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in before.named_modules()
    ]
