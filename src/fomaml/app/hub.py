"""What is kept in a folder, shared on the Hugging Face hub by huggingface_hub's mixin.

The library is optional: it is imported where one of these methods is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fomaml.app.named import WEIGHTS
from fomaml.app.own import is_own
from fomaml.app.own import split as split_own
from fomaml.app.settings import Settings
from fomaml.app.sources import split_name
from fomaml.backbones import LIBRARIES
from fomaml.errors import InputError, in_one_line

T = TypeVar("T", bound="Pretrained")
# Where the mixin looks on the hub; the last two are of versions before 1.0.
PLACES = (
    "revision", "cache_dir", "force_download", "local_files_only", "token", "proxies", "resume_download",
)  # fmt: skip
# Whose errors say that the hub cannot be reached, or refuses.
HUB = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"}


class Pretrained:
    """What a folder holds: written, read, and shared on the hub.

    hub_files: patterns of the files that are taken from the hub, nothing else.
    """

    hub_files: ClassVar[tuple[str, ...]] = ()

    def _write(self, folder: Path) -> None:
        """Write all files but the card, without the folders of this machine."""
        raise NotImplementedError

    def _card(self, license: str | None) -> str:
        raise NotImplementedError

    @classmethod
    def _read(cls: type[T], folder: Path, **options: Any) -> T:
        raise NotImplementedError

    def save_pretrained(
        self, save_directory: str | Path, *, license: str | None = None, **options: Any
    ) -> str | None:
        """Write a folder that `from_pretrained` reads: weights as safetensors, facts as JSON, and a card.

        Paths of this machine are left out; names of classes, tasks and columns are in it.

        license: for the card, as the hub names it, say "mit". options: as of huggingface_hub's `ModelHubMixin`, such as
        `push_to_hub=True, repo_id=`.

        Raises:
            InputError: no huggingface_hub; the folder holds something already, or cannot be made.
        """
        folder = Path(save_directory).expanduser()
        check_empty(folder)
        with _told(f"{folder} could not be written"):
            return self._carried().save_pretrained(folder, **_with_license(license, options))

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> str:
        """Write what `save_pretrained` does to a repository on the hub, made where it is missing.

        license: as of `save_pretrained`. options: as of huggingface_hub's `ModelHubMixin`: `private=`, `token=`,
        `branch=`, `commit_message=` and others.

        Raises:
            InputError: no huggingface_hub; no network, or the hub refuses.
        """
        with _told(f"nothing was pushed to {repo_id}"):
            return self._carried().push_to_hub(repo_id, **_with_license(license, options))

    @classmethod
    def from_pretrained(cls: type[T], pretrained_model_name_or_path: str | Path, **options: Any) -> T:
        """Read a folder, or a repository on the hub by its name, OWNER/NAME; digests are checked, no code is run.

        options: as of huggingface_hub's `ModelHubMixin`: `revision=`, `token=`, `cache_dir=`, `force_download=`,
        `local_files_only=`; all others as of `fomaml.load_run` and `fomaml.load_adapted`.

        Raises:
            InputError: no huggingface_hub; no such folder or repository, no network; a damaged file.
        """
        carrier, folder = _carrier(cls), Path(pretrained_model_name_or_path).expanduser()
        if folder.is_dir():
            return cls._read(folder, **{name: own for name, own in options.items() if name not in PLACES})
        with _told(f"{pretrained_model_name_or_path} is no folder, and was not read from the hub"):
            return carrier.from_pretrained(str(pretrained_model_name_or_path), **options).kept

    def _carried(self) -> Any:
        carried = _carrier(type(self))()
        carried.kept = self
        return carried


def _carrier(of: type[Pretrained]) -> Any:
    """The mixin's subclass for a class of ours, which need not inherit from a library that may be missing."""
    try:
        from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
    except ImportError:
        raise InputError("the hub's methods need huggingface_hub: pip install 'fomaml[hub]'") from None

    class Carrier(ModelHubMixin, library_name="fomaml"):
        kept: Any

        def __init__(self) -> None:  # without arguments, so that the mixin takes nothing from config.json
            super().__init__()

        def _save_pretrained(self, save_directory: Path) -> None:
            self.kept._write(save_directory)

        def generate_model_card(self, *args: Any, license: str | None = None, **kwargs: Any) -> ModelCard:
            return ModelCard(self.kept._card(license))

        @classmethod
        def _from_pretrained(cls, *, model_id: str, **options: Any) -> Any:
            asked = {name: options.pop(name) for name in PLACES if name in options}
            places = {name: own for name, own in asked.items() if own is not None}
            folder = snapshot_download(model_id, allow_patterns=[*of.hub_files], **places)
            carried = cls()
            carried.kept = of._read(folder, **options)
            return carried

    return Carrier


def _with_license(license: str | None, options: dict[str, Any]) -> dict[str, Any]:
    return options | {"model_card_kwargs": {"license": license, **(options.get("model_card_kwargs") or {})}}


def check_empty(folder: Path) -> None:
    """Raise `InputError` where a folder that is to be written holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already holds something; give another, or delete it")


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Within: what the hub, the network or the disk refuse is one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in HUB:
            raise InputError(f"{what}: {in_one_line(error)}") from None
        raise


def portable(settings: Settings) -> Settings:
    """Settings without the folders of this machine: of a path that says what something is its name is left."""
    source, path = split_name(settings.source)
    code = settings.code and {_key(key): _recorded(record) for key, record in settings.code.items()}
    named: dict[str, Any] = {
        name: _name(getattr(settings, name)) for name in ("model", "features_of", "loss")
    }
    weights: dict[str, Any] = {key: _file(getattr(settings, key)) for key in WEIGHTS.values()}
    return dataclasses.replace(
        settings,
        source=f"{source}:{Path(path).name}" if path else source,
        out=None,
        data_root=None,
        features_in=None,
        log=None,
        metric=None if settings.metric is None else tuple(map(_name, settings.metric)),
        code=code,
        **named,
        **weights,
    )


def _name(name: Any) -> Any:
    """The name of one's own code without its folder; any other as it is."""
    if not isinstance(name, str) or not is_own(name) or name.partition(":")[0] in LIBRARIES:
        return name
    source, attribute = split_own(name)
    return f"{Path(source).name}:{attribute}" if source.endswith(".py") else name


def _file(path: str | None) -> str | None:
    return path and Path(path).name


def _key(key: str) -> str:
    what, space, name = key.partition(" ")
    return f"{what}{space}{_name(name)}"


def _recorded(record: dict[str, Any]) -> dict[str, Any]:
    before: Sequence[dict[str, Any]] = record.get("before", ())
    own = {**record, "name": _name(record["name"])}
    return own | ({"before": [_recorded(each) for each in before]} if before else {})
