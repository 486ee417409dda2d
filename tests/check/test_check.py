"""Each kind of finding has a module that triggers it, and a plain one that does not; then the command."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fomaml.app.cli import main
from fomaml.app.modules import load_module
from fomaml.check import Finding, Report, check
from fomaml.errors import InputError, in_one_line
from fomaml.models import MLP, BatchNorm, convert_batch_norm

LOOP = "engine='loop'"


class Plain(nn.Module):
    """Nothing to find."""

    def __init__(self):
        super().__init__()
        self.into, self.head = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, inputs):
        return self.head(self.into(inputs).tanh())


# --- modules with something to find -----------------------------------------------------------------


class Tied(Plain):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, inputs):
        return super().forward(self.second(self.first(inputs)))


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.into.bias.requires_grad_(False)


class Unused(Plain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(3, 3)


class Detached(Plain):
    def forward(self, inputs):
        return self.head(F.linear(inputs, self.into.weight.detach(), self.into.bias).tanh())


class Data(Plain):
    def forward(self, inputs):
        return self.head(F.linear(inputs, self.into.weight.data, self.into.bias).tanh())


class NoGrad(Plain):
    def forward(self, inputs):
        with torch.no_grad():
            hidden = self.into(inputs)
        return self.head(hidden.tanh())


class AllNoGrad(Plain):
    @torch.no_grad()
    def forward(self, inputs):
        return super().forward(inputs)


class Copied(Plain):
    def __init__(self):
        super().__init__()
        self.copied = self.into.weight.detach().clone()

    def forward(self, inputs):
        return self.head(F.linear(inputs, self.copied, self.into.bias).tanh())


class Computed(Plain):
    def __init__(self):
        super().__init__()
        self.computed = 2 * self.into.weight

    def forward(self, inputs):
        return self.head(F.linear(inputs, self.computed, self.into.bias).tanh())


class Alias(Plain):
    def __init__(self):
        super().__init__()
        self.alias = [self.into.weight]

    def forward(self, inputs):
        return self.head(F.linear(inputs, self.alias[0], self.into.bias).tanh())


class Hidden(Plain):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 6)]

    def forward(self, inputs):
        return super().forward(self.layers[0](inputs))


class InPlace(Plain):
    def forward(self, inputs):
        self.into.weight.data.mul_(0.9)
        return super().forward(inputs)


class Counter(Plain):
    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) * self.calls


class Buffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls.add_(1)
        return super().forward(inputs) * self.calls.clone()


class Assigned(Buffer):
    def forward(self, inputs):
        self.calls = self.calls + 1
        return Plain.forward(self, inputs) * self.calls


class Dropout(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 5))


class Noise(Plain):
    def forward(self, inputs):
        return super().forward(inputs + torch.randn_like(inputs))


class Branch(Plain):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return 2 * outputs if outputs.sum() > 0 else outputs


class Item(Plain):
    def forward(self, inputs):
        return super().forward(inputs) * inputs.abs().max().item()


class Written(Plain):
    def forward(self, inputs):
        outputs = torch.zeros(len(inputs), 5, dtype=inputs.dtype)
        outputs[:] = super().forward(inputs)
        return outputs


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return 2 * inputs

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OwnFunction(Plain):
    def forward(self, inputs):
        return Double.apply(super().forward(inputs))


class WrongDouble(torch.autograd.Function):
    """sin with the right derivative, whose own derivative is taken to be 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs):
        return inputs.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].detach().cos()


class WrongSecond(Plain):
    def forward(self, inputs):
        return self.head(WrongDouble.apply(self.into(inputs)))


class VmapOnly(Plain):
    """Wrong where it runs under vmap, with no error."""

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs * outputs if torch._C._functorch.is_batchedtensor(outputs) else outputs


class Rounded(Plain):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs + (outputs.round() - outputs).detach()


class Float32(Plain):
    def forward(self, inputs):
        return super().forward(inputs.float())


class NotFinite(Plain):
    def forward(self, inputs):
        return super().forward(inputs) / 0


class Recurrent(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 5)

    def forward(self, inputs):
        return self.head(self.cell(inputs.unflatten(-1, (2, 3)))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, inputs):
        return self.head(self.layer(inputs.unflatten(-1, (3, 2)).repeat(1, 1, 2)).mean(1))


class Attention(Encoder):
    """Insists on a kernel."""

    kernel = SDPBackend.FLASH_ATTENTION

    def forward(self, inputs):
        with sdpa_kernel(self.kernel):
            return super().forward(inputs)


def native(**choices):
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **choices), nn.Linear(8, 5))


def ours(statistics):
    return nn.Sequential(nn.Linear(6, 8), BatchNorm(8, policy=statistics), nn.Linear(8, 5))


def report_on(build, shape=(6,), **choices):
    torch.manual_seed(1)
    return check(build(), shape, **choices)


# module: level, part of the finding, part of the cure
TRIGGERS = {
    Tied: ("note", "learned as one tensor: first.weight = second.weight", ""),
    Frozen: ("note", "frozen, neither adapted nor meta-learned: into.bias", "requires_grad_"),
    Unused: ("note", "no output depends on: spare.weight, spare.bias", "delete"),
    Detached: ("wrong", "no gradient reaches, so never learned: into.weight", ".detach()"),
    Data: ("wrong", "no gradient reaches, so never learned: into.weight", ".data"),
    NoGrad: ("wrong", "no gradient reaches, so never learned: into.weight, into.bias", "torch.no_grad"),
    AllNoGrad: ("wrong", "no gradient reaches any parameter", "torch.no_grad"),
    Copied: ("wrong", "holds a copy, which never learns: into.weight", "self.weight"),
    Computed: (
        "wrong",
        "computed from parameters before forward, so adapted ones do not reach it: computed",
        "in",
    ),
    Alias: ("wrong", "first order, loop: differs from the plain reference", "self.weight, not from a list"),
    Hidden: ("wrong", "so never learned, of shape: (6, 6), (6,)", "nn.ModuleList"),
    InPlace: (
        "wrong",
        "forward changes parameters in place, and so the meta-model in every task: into.weight",
        "new",
    ),
    Counter: ("wrong", "forward keeps state on self that is no buffer", "register_buffer"),
    Buffer: (
        "note",
        "buffers that forward changes; each task starts from the meta-model's, which stay: calls",
        "",
    ),
    Assigned: ("wrong", "first order, loop: differs from the plain reference", "keep no state on self"),
    Dropout: ("note", "dropout is active", "model.eval()"),
    Noise: ("note", "forward draws random numbers of its own", ""),
    Branch: ("refused", "first order, batched: its forward branches on the values of a tensor", LOOP),
    Item: ("refused", "first order, batched: its forward takes a number out of a tensor", LOOP),
    Written: ("refused", "first order, batched: its forward writes in place into what all tasks share", LOOP),
    OwnFunction: (
        "refused",
        "first order, batched: vmap does not take its autograd.Function",
        "setup_context",
    ),
    Recurrent: ("refused", "first order, batched: vmap has no rule for one of its operations", LOOP),
    Attention: (
        "refused",
        "second order, loop: the fused attention kernel has no double backward",
        "sdpa_kernel",
    ),
    WrongSecond: ("wrong", "second order, loop: what it adds to first order is off by", "gradgradcheck"),
    VmapOnly: ("wrong", "first order, batched: differs from the plain reference", LOOP),
    Rounded: ("note", "second order, loop: runs, not compared (autograd's gradient is not the slope", ""),
    Float32: ("note", "does not run in float64, so compared in float32, more loosely", ""),
    NotFinite: ("wrong", "the outputs are not finite", ""),
    native: ("wrong", "running statistics that meta-training never updates", "convert_batch_norm"),
    lambda: native().eval(): ("note", "in eval mode, running statistics are used as they are", ""),
    lambda: native(track_running_stats=False): ("note", "statistics of the batch", "statistics='support'"),
    lambda: ours("batch"): ("note", "statistics of the batch", "statistics='support'"),
    lambda: Recurrent(batch_first=False): (
        "note",
        "outputs depend on the other examples",
        "batch_first=True",
    ),
    lambda: nn.Linear(6, 3): ("refused", "3 outputs are too few for 5 ways", "at least 5 outputs"),
    lambda: nn.Linear(6, 1): ("note", "outputs (1,) per example: tried as a regression", ""),
}


@pytest.mark.parametrize("build", TRIGGERS, ids=lambda build: build.__name__)
def test_finds_it_and_says_the_cure(build):
    level, what, cure = TRIGGERS[build]
    report = report_on(build)
    found = [finding for finding in report.findings if what in finding.what]
    assert [finding.level for finding in found] == [level], report.text()
    assert cure in found[0].cure
    assert report.exit_status == (level == "wrong"), report.text()
    assert not any(what in finding.what for finding in report_on(Plain).findings)


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


def test_compares_every_engine_in_both_orders():
    found = [finding.what for finding in report_on(Plain).findings]
    for engine in ("loop", "batched", "factored"):
        assert any(what.startswith(f"first order, {engine}: equals the plain reference") for what in found)
    for engine in ("loop", "batched"):
        assert any(what.startswith(f"second order, {engine}: equals finite differences") for what in found)


@pytest.mark.parametrize("build", [lambda: MLP(6, 8, 5), Recurrent, Attention, lambda: ours("running")])
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
    found = [f.what for f in report_on(Alias).findings if f.level == "wrong"]
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
    """The backward pass runs forward again, after the adapted parameters were taken out."""

    def forward(self, inputs):
        hidden = checkpoint(lambda x: self.into(x).tanh(), inputs, use_reentrant=False)
        return self.head(hidden)


def test_checkpointing_is_told():
    found = {f.what.split(":")[0]: f for f in report_on(Recomputed).findings}
    assert (
        found["first order, loop"].level == "wrong" and "no checkpointing" in found["first order, loop"].cure
    )
    assert found["first order, batched"].level == "refused"
    assert found["first order, batched"].cure == "no torch.utils.checkpoint"


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
        (Pair, {}, "the module must return one floating tensor, not a tuple"),
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


# --- the command ------------------------------------------------------------------------------------

FILE = """
import torch
from torch import nn
from wide import WIDTH

class Net(nn.Sequential):
    def __init__(self, width=WIDTH):
        super().__init__(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5))

class Needs(nn.Module):
    def __init__(self, width):
        super().__init__()

def leaky():
    print("building")
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))

def number():
    return 3

def fails():
    raise RuntimeError("no weights here\\nmore")

net = Net()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with a package and a file of modules; the imports are undone afterwards."""
    (tmp_path / "nets.py").write_text(FILE)
    (tmp_path / "wide.py").write_text("WIDTH = 8\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "two.py").write_text(
        "from torch import nn\nclass A(nn.Module): pass\nclass B(nn.Module): pass\n"
        "def build(): return nn.Linear(6, 5)\n"
    )
    (tmp_path / "none.py").write_text("from torch import nn\n")
    (tmp_path / "made.py").write_text(
        "from torch import nn\ndef main(): raise SystemExit(3)\ndef build(): return nn.Linear(6, 5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def run(*arguments):
    main(["check", *arguments, "--input", "6"])


@pytest.mark.parametrize("name", ["nets:Net", "nets.py:Net", "nets.py:net", "nets.py", "nets", "made.py"])
def test_the_module_by_name(folder, name):
    assert isinstance(load_module(name), (nn.Sequential, nn.Linear))


def test_a_file_elsewhere_imports_its_neighbours(folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(load_module(str(folder / "nets.py:Net")), nn.Sequential)


def test_the_command_prints_the_report(folder, capsys):
    run("nets:Net")
    printed = capsys.readouterr().out
    heading = (
        "nets:Net in train mode, inputs (6,), 5-way 2-shot, 3 inner steps of 0.01\n\nok       101 parameters"
    )
    assert printed.startswith(heading)
    assert printed.endswith("\nNothing would be silently wrong (0 notes, 0 refused).\n")


def test_the_command_exits_with_1_when_something_is_wrong(folder, capsys):
    with pytest.raises(SystemExit) as raised:
        run("nets.py:leaky")
    assert raised.value.code == 1
    printed = capsys.readouterr()
    assert "\nWRONG    batch norms with running statistics" in printed.out
    assert "\n         → fomaml.convert_batch_norm(model" in printed.out
    assert "building" in printed.err and "building" not in printed.out


def test_the_command_as_json(folder, capsys):
    with pytest.raises(SystemExit):
        run("nets.py:leaky", "--json", "--inner-steps", "1", "--ways", "4")
    found = json.loads(capsys.readouterr().out)
    assert found["exit_status"] == 1
    assert found["subject"].endswith("4-way 2-shot, 1 inner step of 0.01")
    assert {"level", "what", "cure"} == set(found["findings"][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "there is no file absent.py"),
        (["absent_module:f"], "could not be imported: ModuleNotFoundError: No module named 'absent_module'"),
        (
            ["broken.py:f"],
            "broken.py could not be imported: ModuleNotFoundError: No module named 'nothing_of",
        ),
        (["nets:Nett"], "nets has no 'Nett'; the nearest names: Net"),
        (["nets:number"], "nets:number must give an nn.Module, not a int"),
        (["nets:fails"], "nets:fails could not be built: RuntimeError: no weights here"),
        (["nets:Needs"], "nets:Needs could not be built: TypeError: Needs.__init__() missing 1 required"),
        (["two.py"], "which module of two.py? Name one, two.py:NAME; there are: A, B, build"),
        (
            ["none.py"],
            "which module of none.py? Name one, none.py:NAME; there are: none that needs no arguments",
        ),
        (["nets:Net", "--input-dtype", "int64"], "--input-dtype int64 and --vocabulary N go together"),
        (["nets:Net", "--vocabulary", "3"], "--input-dtype int64 and --vocabulary N go together"),
        (["nets:Net", "--input-dtype", "int8"], "unknown input dtype 'int8'; there are: float32, int64"),
        (["nets:Net", "--ways", "0"], "ways must be a whole number of 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(folder, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.startswith("fomaml: error: ") and printed.err.count("\n") == 1
