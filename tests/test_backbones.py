"""Networks of timm and torchvision: weights from files, heads, batch norms, and what is refused."""

import re
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import reference
from family import assert_agrees
from fomaml.backbones import Decoder, backbone, decoder, head_name, read_weights
from fomaml.checkpoint import save_weights
from fomaml.engines import meta_gradient
from fomaml.errors import InputError
from fomaml.learning.algorithms import ANIL, FOMAML
from fomaml.models import BatchNorm, convert_batch_norm, native_batch_norms
from zoo import draw

timm = pytest.importorskip("timm", reason="timm is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")

SMALL = {"timm:resnet10t": {"channels": (8, 8, 8, 8), "stem_width": 8}}  # the same network with few channels
IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64)


def small(outputs=0, **options):
    return backbone("timm:resnet10t", outputs, **{**SMALL["timm:resnet10t"], **options}).double()


def moved(model):
    """The model with running statistics and weights that are its own."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 1.5) if "running_var" in name else tensor.normal_(0, 0.3)
    return model


@pytest.fixture
def pretrained():
    """timm's own network of 1000 classes, in evaluation mode."""
    with torch.no_grad():
        return moved(timm.create_model("resnet10t", **SMALL["timm:resnet10t"])).double().eval()


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["library", "fomaml"])
def test_features_are_those_of_the_library(prefix, pretrained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, pretrained) if prefix == "fomaml" else save_file(pretrained.state_dict(), path)
    model = small(weights=path)
    assert native_batch_norms(model) == [] and head_of(model) is None
    expected = pretrained.forward_head(pretrained.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.eval()(IMAGES), expected, rtol=1e-9, atol=1e-9)


def head_of(model):
    try:
        return head_name(model)
    except InputError:
        return None


def test_a_head_of_the_same_shape_is_kept_and_another_is_new(pretrained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(pretrained.state_dict(), path)
    same, new = small(1000, weights=path), small(5, weights=path)
    torch.testing.assert_close(same(IMAGES), pretrained(IMAGES), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new.conv1[0].weight, pretrained.conv1[0].weight)
    assert head_name(new) == "fc" and new(IMAGES).shape == (3, 5)


def test_torchvision_by_its_own_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    with torch.no_grad():
        own = moved(torchvision.models.resnet18()).double().eval()
    save_file(own.state_dict(), path)
    model = backbone("torchvision:resnet18", 1000, weights=path).double()
    assert head_name(model) == "fc"
    torch.testing.assert_close(model(IMAGES), own(IMAGES), rtol=1e-9, atol=1e-9)
    own.fc = nn.Identity()
    found = backbone("torchvision:resnet18", weights=path).double()(IMAGES)
    torch.testing.assert_close(found, own(IMAGES), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "nested"), [("weights.pth", False), ("weights", True), ("weights.safetensors", False)]
)
def test_a_pickle_is_refused_with_the_line_that_converts_it(name, nested, pretrained, tmp_path):
    path = tmp_path / name
    state = pretrained.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if nested else state, path)
    with pytest.raises(InputError, match=r"weights.* is a pickle, which may run code") as refused:
        small(weights=path)
    assert "\n" not in str(refused.value)
    line = str(refused.value).partition("convert it once: ")[2]
    subprocess.run([sys.executable, "-c", line], check=True, timeout=600)
    converted = path.with_suffix(".safetensors")
    if name == converted.name:  # not written over
        converted = path.with_name("weights-converted.safetensors")
    assert {n: t.shape for n, t in read_weights(converted).items()} == {n: t.shape for n, t in state.items()}
    torch.testing.assert_close(small(weights=converted).conv1[0].weight, pretrained.conv1[0].weight)


def changed(state, how):
    state = dict(state)
    if "missing" in how:
        del state["conv1.0.weight"], state["layer2.0.bn1.bias"]
    if "unexpected" in how:
        state["stem.weight"] = torch.zeros(3)
    if "shape" in how:
        state["bn1.weight"] = torch.zeros(5)
    if "counts" in how:
        state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["missing"], "of its tensors 2 missing, as conv1.0.weight"),
        (["unexpected"], "of its tensors 1 unexpected, as stem.weight"),
        (["shape"], r"of its tensors 1 of another shape, as bn1.weight (5,), expected (16,)"),
        (["missing", "unexpected"], "2 missing, as conv1.0.weight; 1 unexpected, as stem.weight"),
    ],
)
def test_weights_that_do_not_fit(how, message, pretrained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(changed(pretrained.state_dict(), how), path)
    with pytest.raises(
        InputError, match=f"weights.safetensors does not fit timm:resnet10t: .*{re.escape(message)}$"
    ):
        small(weights=path)


def test_counts_of_batches_may_lack(pretrained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(changed(pretrained.state_dict(), ["counts"]), path)
    assert small(weights=path)(IMAGES).shape == (3, 8)


REFUSED = {
    "no weights": (("timm:resnet10t",), {}, "timm:resnet10t needs weights: a .safetensors file, 'download'"),
    "no library": (("resnet18",), {"weights": "random"}, "unknown backbone 'resnet18'; expected timm:NAME or"),
    "another library": (("keras:x",), {"weights": "random"}, "unknown backbone 'keras:x'"),
    "a name of timm": (("timm:resnet10",), {"weights": "random"}, "timm has no network 'resnet10' .* resnet10t"),
    "a name of torchvision": (
        ("torchvision:resnet19",), {"weights": "random"}, "torchvision has no network 'resnet19' .* resnet1",
    ),
    "no linear head": (
        ("torchvision:squeezenet1_1",), {"weights": "random"}, "torchvision:squeezenet1_1 has no linear",
    ),
    "an option": (
        ("timm:resnet10t",), {"weights": "random", "depth": 3}, "timm:resnet10t cannot be built: TypeError: .*'depth'",
    ),
    "outputs as the library says it": (
        ("timm:resnet10t",), {"weights": "random", "num_classes": 3}, "num_classes is not an option of a backbone",
    ),
    "no file": (("timm:resnet10t",), {"weights": "nowhere.safetensors"}, "there is no file nowhere.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        backbone(*arguments, **options)


def test_a_damaged_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"none of them")
    with pytest.raises(InputError, match="is damaged or not a safetensors file"):
        small(weights=path)


def test_a_library_that_lacks(monkeypatch):
    def absent(module):
        raise ImportError(module)

    monkeypatch.setattr("fomaml.backbones.importlib.import_module", absent)
    with pytest.raises(InputError, match=r"timm is not installed: pip install 'fomaml\[backbones\]'"):
        small(weights="random")


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    """The library's own download is asked for; no test touches the network."""
    asked = []

    def create_model(name, pretrained, **options):
        asked.append((name, pretrained))
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", create_model)
    with pytest.raises(InputError, match=r"cannot be had \(OSError: no route to host\); give weights=FILE"):
        backbone("timm:resnet10t", weights="download")
    assert asked == [("resnet10t", True)]


# --- batch norms and adaptation -------------------------------------------------------------------


def test_batch_norms_are_converted_by_policy():
    assert {m.policy for m in small(weights="random").modules() if isinstance(m, BatchNorm)} == {"batch"}
    model = small(weights="random", norm="support")
    assert {m.policy for m in model.modules() if isinstance(m, BatchNorm)} == {"support"}


def test_timms_batch_norm_with_an_activation_keeps_it():
    layers = timm.layers.BatchNormAct2d
    native = nn.Sequential(layers(3), layers(3, apply_act=False), layers(3, act_layer=nn.GELU)).eval()
    with torch.no_grad():
        moved(native)
    names, inputs = set(native.state_dict()), torch.randn(4, 3, 5, 5)
    expected = native(inputs)
    model = convert_batch_norm(native, "frozen")
    assert native_batch_norms(model) == []
    torch.testing.assert_close(model(inputs), expected, rtol=1e-5, atol=1e-5)
    learned = {name for name, _ in model.named_parameters()}
    assert learned == {name for name in names if name.endswith(("weight", "bias"))}


def test_a_batch_norm_with_a_forward_pass_of_its_own_is_not_dropped():
    class Doubled(nn.BatchNorm2d):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    with pytest.raises(InputError, match="Doubled is a batch norm with a forward pass of its own"):
        convert_batch_norm(nn.Sequential(Doubled(3)))


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("part", ["head", "last layers"])
def test_the_head_or_the_last_layers_adapt(part, engine):
    """ANIL on the head and FOMAML on the last block of a small ResNet, against the slow loop."""
    torch.manual_seed(1)
    model = small(4, weights="random", norm="frozen").double()
    tasks = draw((3, 32, 32), F.cross_entropy, tasks=2)
    head = f"{head_name(model)}.*"
    globs = [head] if part == "head" else [head, "layer4.*"]
    learner = ANIL(model, 0.1, 2, head=head) if part == "head" else FOMAML(model, 0.1, 2, adapted=globs)
    names = [name for name in reference.learned(model) if any(fnmatchcase(name, glob) for glob in globs)]
    assert len(names) == 2 if part == "head" else 2 < len(names) < len(reference.learned(model))
    expected = reference.over_tasks(
        lambda m, t: reference.fomaml(m, t, F.cross_entropy, dict.fromkeys(names, 0.1), 2), model, tasks
    )
    assert_agrees(meta_gradient(learner, tasks, engine=engine), expected)


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_images_are_decoded_as_torchvision_does(name, channels):
    images = torch.randint(256, (2, channels, 8, 8), dtype=torch.uint8)
    transform = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = transform(images.expand(2, 3, 8, 8).float() / 255)
    torch.testing.assert_close(decoder(name)(images), expected)


def test_what_no_decoder_is_of():
    with pytest.raises(InputError, match="torchvision has no network 'resnet19'"):
        decoder("torchvision:resnet19")
    with pytest.raises(InputError, match="unknown backbone 'keras:x'"):
        decoder("keras:x")
    with pytest.raises(
        InputError, match=r"takes bytes \(examples, 1 or 3, height, width\), got torch.float32"
    ):
        Decoder((0.5,) * 3, (0.5,) * 3)(torch.zeros(2, 3, 4, 4))
