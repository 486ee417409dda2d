"""Each kind of finding has a module that triggers it, and a plain one that does not."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fomaml.check import Finding, Report, check
from fomaml.check.findings import LOOP
from fomaml.errors import InputError, in_one_line
from fomaml.models import MLP, convert_batch_norm
from recomputed import MODULES
from suspects import (
    TRIGGERS,
    Attention,
    Branch,
    Detour,
    Encoder,
    Plain,
    Recurrent,
    VmapOnly,
    native,
    old_norm,
    ours,
)


def report_on(build, shape=(6,), **choices):
    torch.manual_seed(1)
    return check(build(), shape, **choices)


@pytest.fixture(scope="module")
def plain():
    return report_on(Plain)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("build", TRIGGERS, ids=lambda build: build.__name__)
def test_finds_it_and_says_the_cure(build, plain):
    level, what, cure = TRIGGERS[build]
    report = report_on(build)
    found = [finding for finding in report.findings if what in finding.what]
    assert [finding.level for finding in found] == [level], report.text()
    assert cure in found[0].cure
    assert report.exit_status == (level == "wrong"), report.text()
    assert not any(what in finding.what for finding in plain.findings)


def test_a_plain_module_has_nothing_but_ok():
    model = Plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    report = check(model, [6], ways=3)
    assert {finding.level for finding in report.findings} == {"ok"}
    assert report.exit_status == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(hasattr(p, "grad") and p.grad is not None for p in model.parameters())


def test_compares_every_engine_in_both_orders(plain):
    found = [finding.what for finding in plain.findings]
    for engine in ("loop", "batched", "factored"):
        assert any(what.startswith(f"first order, {engine}: equals the plain reference") for what in found)
    for engine in ("loop", "batched"):
        assert any(what.startswith(f"second order, {engine}: equals finite differences") for what in found)


NONE = [
    *(lambda: MLP(6, 8, 5), Recurrent, Attention, lambda: ours("running")),
    *(partial(old_norm, norm) for norm in (nn.utils.weight_norm, parametrizations.weight_norm)),
    *(partial(old_norm, norm) for norm in (nn.utils.spectral_norm, parametrizations.spectral_norm)),
    *(partial(build, True) for build in MODULES),
]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("build", NONE)
def test_no_false_alarm(build):
    assert report_on(build).exit_status == 0


def test_the_cure_of_batch_norm_cures():
    for statistics in ("batch", "support", "running", "frozen", "per-step"):
        steps = 3 if statistics == "per-step" else None
        assert report_on(lambda s=statistics, k=steps: convert_batch_norm(native(), s, k)).exit_status == 0


def test_the_cure_of_attention_cures():
    class Cured(Attention):
        kernel = SDPBackend.MATH

    for build in (Cured, Encoder):
        assert "refused" not in {finding.level for finding in report_on(build).findings}


def test_names_the_parameter_that_forward_does_not_read():
    found = [f.what for f in report_on(Detour).findings if f.level == "wrong"]
    assert found[0].endswith("forward does not read its current into.weight")


def test_the_engine_that_auto_takes_is_told():
    [found] = [f for f in report_on(Branch).findings if "engine='auto'" in f.what]
    reason = "something in the model that vmap does not take"
    assert found == Finding("ok", f"engine='auto' takes 'loop': {reason}", "")
    [found] = [f for f in report_on(VmapOnly).findings if "engine='auto'" in f.what]
    assert found.level == "wrong"


def test_recurrent_layers_are_told_about_cudnn():
    assert any("cuDNN has no double backward for: LSTM cell" in f.what for f in report_on(Recurrent).findings)


def test_dropout_rates_that_layers_hold_themselves():
    def build():
        return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.TransformerEncoderLayer(3, 1, 4, 0.5), nn.Flatten(1))

    [found] = [f.what for f in report_on(build).findings if "dropout" in f.what and f.level == "note"]
    assert "MultiheadAttention 1.self_attn" in found


def test_token_inputs():
    class Tokens(Plain):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 6)

        def forward(self, inputs):
            assert inputs.dtype == torch.int64 and inputs.max() < 11
            return super().forward(self.embedding(inputs).mean(1))

    assert report_on(Tokens, (7,), vocabulary=11).exit_status == 0


class Embedded(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(6, 5)

    def forward(self, inputs):
        hidden = self.embedding(inputs)
        return self.head(hidden.mean(1) if hidden.dim() == 3 else hidden)


@pytest.mark.parametrize(
    ("options", "batched"), [({"sparse": True}, "refused"), ({"padding_idx": 0}, "ok")], ids=str
)
def test_sparse_and_padded_embeddings(options, batched):
    report = report_on(lambda: Embedded(nn.Embedding(11, 6, **options)), (3,), vocabulary=11)
    found = {f.what.split(":")[0]: f.level for f in report.findings}
    assert found["first order, loop"] == "ok" and found["first order, batched"] == batched
    assert report.exit_status == 0


def test_the_cure_is_not_an_engine_that_refuses_too():
    report = report_on(lambda: Embedded(nn.EmbeddingBag(11, 6)), (3,), vocabulary=11)
    found = [f for f in report.findings if f.level == "refused"]
    assert [f.what.split(":")[0] for f in found] == ["second order, loop", "second order, batched"]
    assert {f.cure for f in found} == {"first order"}


class Recomputed(Plain):
    """The backward pass runs forward again."""

    def forward(self, inputs):
        hidden = checkpoint(lambda x: self.into(x).tanh(), inputs, use_reentrant=False)
        return self.head(hidden)


def test_checkpointing_is_told():
    found = {f.what.split(":")[0]: f for f in report_on(Recomputed).findings}
    assert found["first order, loop"].level == found["second order, loop"].level == "ok"
    assert found["first order, batched"].level == "refused"
    assert found["first order, batched"].cure == LOOP


def test_bfloat16_modules_are_compared_in_float64():
    assert any("equals the plain reference" in f.what for f in report_on(lambda: Plain().bfloat16()).findings)


class Pair(Plain):
    def forward(self, inputs):
        return super().forward(inputs), inputs


class Summed(Plain):
    def forward(self, inputs):
        return super().forward(inputs).sum(0)


class Labels(Plain):
    def forward(self, inputs):
        return super().forward(inputs).argmax(1)


@pytest.mark.parametrize(
    ("build", "choices", "message"),
    [
        (
            Pair,
            {},
            "the module must return one floating tensor, not a tuple: give output=, the part that is judged",
        ),
        (Labels, {}, "the module must return one floating tensor, not a torch.int64 tensor"),
        (Summed, {}, "float32 inputs (10, 6) gave outputs (5,); expected 10 rows"),
        (
            lambda: nn.LazyLinear(5),
            {},
            "the module has lazy parameters without a shape; run it once on a batch before",
        ),
        (nn.Tanh, {}, "the module has no parameter that requires gradients: there is nothing to learn"),
        (
            Plain,
            {"shape": (7,)},
            "the module does not run on float32 inputs (10, 7): RuntimeError: mat1 and mat2 shapes cannot be "
            "multiplied (10x7 and 6x8)",
        ),
        (Plain, {"shape": (0,)}, "a size of the input must be a whole number of 1 or more, got 0"),
        (Plain, {"shots": 0}, "shots must be a whole number of 1 or more, got 0"),
        (Plain, {"inner_lr": -1.0}, "inner_lr must be a positive finite number, got -1.0"),
        (Plain, {"vocabulary": 0}, "vocabulary must be a whole number of 1 or more, got 0"),
    ],
)
def test_bad_input(build, choices, message):
    with pytest.raises(InputError) as raised:
        report_on(build, **choices)
    assert str(raised.value) == message


def test_text_of_a_report():
    report = Report("net", [Finding("ok", "fine"), Finding("note", "hm", "so"), Finding("refused", "no")])
    assert report.text() == (
        "net\n\nok       fine\nnote     hm\n         → so\nrefused  no\n\n"
        "Nothing would be silently wrong (1 note, 1 refused)."
    )
    report = Report("net", [Finding("wrong", "word " * 40, "do")])
    lines = report.text().splitlines()
    assert lines[2].startswith("WRONG    word word") and lines[3].startswith("         word")
    assert lines[-1] == "1 thing would be silently wrong: see WRONG above."
    assert max(map(len, lines)) <= 110


def test_short_is_one_line():
    assert in_one_line(ValueError("first. Second\nthird")) == "ValueError: first"
    assert in_one_line(KeyError()) == "KeyError: no message"
    assert len(in_one_line(ValueError("word " * 100))) < 180
