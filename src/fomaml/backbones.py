"""Networks of timm and torchvision by name, with weights from a file, and a head for your classes."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fomaml import regular
from fomaml.choices import Policy
from fomaml.errors import InputError, in_one_line, whole
from fomaml.files import load_tensors
from fomaml.models import convert_batch_norm

log = logging.getLogger(__name__)
LIBRARIES = ("timm", "torchvision")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")


def backbone(
    name: str,
    outputs: int = 0,
    *,
    weights: str | Path | None = None,
    norm: Policy | None = None,
    **options: Any,
) -> nn.Module:
    """A network of timm or torchvision: inputs (images, channels, height, width), outputs (images, outputs).

    Arguments:
        name: "timm:resnet10t", "torchvision:resnet18".
        outputs: of its head, the layer `head_name(model)`; 0 leaves the head out, and the network gives features
            (images, width).
        weights: a .safetensors file; or "random"; or "download", by the library itself, into its own cache. Of a file,
            the weights of a head of another shape than asked for are left out, and the head is a new one. All else has
            to fit. Without a file for a network of timm: `timm.create_model(NAME, pretrained=True)` and
            `safetensors.torch.save_file(model.state_dict(), FILE)`, on a machine with a network.
        norm: the policy of its batch norms, see `BatchNorm`; by default "frozen", at the statistics of the weights, and
            "batch" for random weights, whose statistics mean nothing.
        options: go to the library, as `in_chans=1` for timm.

    Raises:
        InputError: a library that is not installed, an unknown name, an option that the library does not take; no
            weights, a file that is not there, a pickle, or weights that do not fit, with their names.
    """
    library, _, model_name = name.partition(":")
    if library not in LIBRARIES or not model_name:
        raise InputError(f"unknown backbone {name!r}; expected timm:NAME or torchvision:NAME")
    outputs = whole("outputs", outputs, 0)
    if weights is None:
        raise InputError(
            f"{name} needs weights: a .safetensors file, 'download' to let {library} fetch its own, or 'random'"
        )
    for own in {"num_classes", "pretrained", "weights"} & options.keys():
        raise InputError(f"{own} is not an option of a backbone: outputs and weights say it")
    build = _timm if library == "timm" else _torchvision
    model, head = build(model_name, outputs, weights == "download", options)
    if weights not in ("random", "download"):
        fit_weights(model, Path(weights).expanduser(), name, head)
    return convert_batch_norm(model, norm or ("batch" if weights == "random" else "frozen"))


def head_name(model: nn.Module) -> str:
    """The name of a network's head, such as "fc": `ANIL(model, …, head=f"{head_name(model)}.*")`.

    It is what timm calls the classifier, else the last linear layer.

    Raises:
        InputError: it has no linear layer, or no one head.
    """
    known = _classifier(model)
    if known and not isinstance(model.get_submodule(known), nn.Identity):
        return known
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if known is not None or not linear:
        raise InputError(
            f"this {type(model).__name__} has no head; make it with outputs=…, or name one yourself"
        )
    return linear[-1]


@dataclass(frozen=True)
class Decoder:
    """Images of bytes (examples, 1 or 3, height, width) to (x / 255 - mean) / std in torch's default dtype, in colour.

    For `ClassSource.decode`. mean, std: of red, green and blue.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, len(self.mean)):
            raise InputError(
                f"the decoder of a backbone takes bytes (examples, 1 or {len(self.mean)}, height, width), got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        dtype = torch.get_default_dtype()
        mean, std = (images.new_tensor(own, dtype=dtype).view(-1, 1, 1) for own in (self.mean, self.std))
        return images.to(dtype).div(255).sub(mean).div(std)


def decoder(name: str) -> Decoder:
    """The decoder of images that the library's own weights of this network, see `backbone`, were trained with.

    Raises:
        InputError: a library that is not installed, an unknown name, or a network without weights.
    """
    library, _, model_name = name.partition(":")
    if library == "timm":
        known = _known_timm(model_name).get_pretrained_cfg(model_name)
    elif library == "torchvision":
        known = _known_torchvision(model_name).get_model_weights(model_name).DEFAULT.transforms()
    else:
        raise InputError(f"unknown backbone {name!r}; expected timm:NAME or torchvision:NAME")
    if known is None:
        raise InputError(
            f"{name} has no weights of its own, nor a mean and deviation; make a Decoder of yours"
        )
    return Decoder(tuple(known.mean), tuple(known.std))


# --- the two libraries ----------------------------------------------------------------------------


def _timm(name: str, outputs: int, download: bool, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """The model, and the name of its head."""
    timm = _known_timm(name)
    model = _made(
        f"timm:{name}", download, lambda: timm.create_model(name, download, num_classes=outputs, **options)
    )
    head = _classifier(model)
    if head is None:
        raise InputError(f"timm:{name} has no single head; take another network")
    return model, head


def _torchvision(name: str, outputs: int, download: bool, options: dict[str, Any]) -> tuple[nn.Module, str]:
    """The model, and the name of its head."""
    models = _known_torchvision(name)
    if download:
        options = {**options, "weights": "DEFAULT", "progress": False}
    with warnings.catch_warnings():  # of an initialisation that will change, and is not kept
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = _made(f"torchvision:{name}", download, lambda: models.get_model(name, **options))
    linear = [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"torchvision:{name} has no linear layer for a head; take another network")
    head, layer = linear[-1]
    model.set_submodule(head, nn.Linear(layer.in_features, outputs) if outputs else nn.Identity())
    return model, head


def _classifier(model: nn.Module) -> str | None:
    """What timm calls the head of a model of its own; None of another, or of several heads."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    return name if isinstance(name, str) else None


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        library = name.partition(".")[0]
        raise InputError(f"{library} is not installed: pip install 'fomaml[backbones]'") from None


def _known_timm(name: str) -> Any:
    """timm, which knows this name."""
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return timm


def _known_torchvision(name: str) -> Any:
    """`torchvision.models`, which know this name."""
    models = _library("torchvision.models")
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown("torchvision", name, names)
    return models


def _unknown(library: str, name: str, names: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(name, names, 5, 0.4) or list(names)[:5]
    return InputError(
        f"{library} has no network {name!r} among its {len(names)}; near to it: {', '.join(near)}"
    )


def _made(name: str, download: bool, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as error:  # of the constructor, or of whatever a download may end in
        if not download:
            raise InputError(f"{name} cannot be built: {in_one_line(error)}") from error
        raise InputError(
            f"{name} or its weights cannot be had ({in_one_line(error)}); give weights=FILE.safetensors, fetched where "
            "there is a network"
        ) from error


# --- weights --------------------------------------------------------------------------------------


def fit_weights(model: nn.Module, path: Path, name: str, head: str = "") -> None:
    """Read all but a head of another shape; see `backbone`. head: its name, "" where all has to fit."""
    found, own = read_weights(path), model.state_dict()
    of_head = [key for key in own.keys() | found.keys() if head and key.startswith(f"{head}.")]
    if any(_shape(found, key) != _shape(own, key) for key in of_head):
        if any(key in own for key in of_head):
            _tell_of_head(name, head, path)
        for key in of_head:
            found.pop(key, None)
            own.pop(key, None)
    # statistics are kept without this count, which older files lack
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in own]
    shapes = [
        f"{key} {_shape(found, key)}, expected {_shape(own, key)}"
        for key in own
        if key in found and _shape(found, key) != _shape(own, key)
    ]
    wrong = [
        f"{len(which)} {what}, as {which[0]}"
        for which, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if which
    ]
    if wrong:
        raise InputError(f"{path} does not fit {name}: of its tensors {'; '.join(wrong)}")
    model.load_state_dict(found, strict=False)


@functools.cache
def _tell_of_head(name: str, head: str, path: Path) -> None:
    """Once in a process: a run makes its network for each of its baselines anew."""
    log.info("%s: the head %r is a new one, not that of %s", name, head, path)


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(tensors[key].shape) if key in tensors else None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, of whatever origin, by name.

    Raises:
        InputError: it is not there, damaged, or a pickle; the message has the lines that convert one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no file {path}; give the path of a .safetensors file")
    with regular.opened(path) as file:
        start = file.read(9)  # of a safetensors file a length, whose first byte may be any, and a brace
    pickled = start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[8:] != b"{")
    if path.suffix in PICKLES or pickled:
        raise InputError(
            f"{path} is a pickle, which may run code when it is read; where you trust it, convert it once: "
            + conversion(path)
        )
    try:
        with safe_open(str(path), framework="pt") as opened:
            ours = "fomaml" in (opened.metadata() or {})
            tensors = {} if ours else {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({in_one_line(error)})") from None
    return load_tensors(path)[0] if ours else tensors  # with its digest checked


def conversion(path: Path) -> str:
    """The line of Python that makes a .safetensors file of a pickle of tensors, by name or under "state_dict"."""
    new = path.with_suffix(".safetensors")
    new = path.with_stem(f"{path.stem}-converted") if new == path else new
    return (
        "import torch; from safetensors.torch import save_file; "
        f"state = torch.load(open({str(path)!r}, 'rb'), weights_only=True); "
        "save_file({name: t.clone().contiguous() for name, t in state.get('state_dict', state).items()}, "
        f"{str(new)!r})"
    )
