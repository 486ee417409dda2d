"""What a run has learned, in use: adapt it to examples of one's own, keep the adapted model, and load it again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fomaml import regular
from fomaml.app import changes, rundir
from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import for_test
from fomaml.app.calibrate import CALIBRATION, Known, nearest, read_calibration
from fomaml.app.check_settings import read_settings
from fomaml.app.group_tasks import scaling_of
from fomaml.app.hub import Pretrained, check_empty, portable
from fomaml.app.intakes import intake_of
from fomaml.app.inventory import PARTS
from fomaml.app.model_card import card, card_of_run, figures_of
from fomaml.app.named import named_again
from fomaml.app.networks import build_model, head_of
from fomaml.app.run_record import read_record
from fomaml.app.rundir import CONFIG, METRICS, RESULT, RESULT_TEXT, weights_file
from fomaml.app.settings import DIGESTS, Settings, Weights, identity, to_json
from fomaml.app.wording import in_words_of_python
from fomaml.checkpoint import fill, save_weights
from fomaml.choices import check_choice
from fomaml.data.keys import few
from fomaml.data.scaling import scaled_by
from fomaml.engines import adapt
from fomaml.engines.adaptation import Compile
from fomaml.errors import InputError, whole
from fomaml.files import file_digest, load_tensors, save_tensors, write_json, write_text
from fomaml.learning.learner import MetaLearner
from fomaml.sealed import unsealed
from fomaml.serve import adapted
from fomaml.serve.export import signature
from fomaml.serve.intake import Intake, Taken
from fomaml.tasks import Examples

MODEL, WEIGHTS, CARD = "model.json", "weights.safetensors", "README.md"
FORMAT = 1
Served = Literal["support", "own"]


@dataclass
class AdaptedModel(adapted.AdaptedModel, Pretrained):
    """An adapted model of a run. settings: of the run, which its folder keeps."""

    settings: Settings
    hub_files: ClassVar = (MODEL, WEIGHTS, CARD)

    @property
    def record(self) -> dict[str, Any]:
        """What model.json holds."""
        return {
            "format": FORMAT,
            "classes": self.classes,
            "targets": self.targets,
            "temperature": self.temperature,
            **self.facts,
            "settings": json.loads(to_json(self.settings)),
        }

    def _write(self, folder: Path) -> None:
        facts = self.facts | {"run": Path(self.facts["run"]).name}
        dataclasses.replace(self, settings=portable(self.settings), facts=facts)._write_as_it_is(folder)

    def _write_as_it_is(self, folder: Path, change_from: Run | None = None) -> dict[str, Any]:
        """Returns what model.json holds."""
        facts, tensors = self.record, self.module.state_dict()
        if change_from is not None:
            tensors, facts["base"] = changes.change_from(self.module, change_from.path, change_from.weights)
        save_tensors(folder / WEIGHTS, tensors, settings=facts)
        write_text(folder / MODEL, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return facts

    def _card(self, license: str | None = None) -> str:
        return card(self.record, self.settings, license)

    @classmethod
    def _read(cls, folder: Path, **options: Any) -> AdaptedModel:
        return load_adapted(folder, **options)


@dataclass
class Run(Pretrained):
    """A trained run: its learner, its settings, and the way from raw inputs to what it takes.

    path: the run directory. settings: all of config.json. learner: with the run's weights. intake: reads pictures,
    tables or arrays as the run has read its own. weights: which ones the learner has.
    """

    path: Path
    settings: Settings
    learner: MetaLearner
    intake: Intake
    weights: Weights = "best"
    hub_files: ClassVar = (CONFIG, rundir.WEIGHTS, RESULT, RESULT_TEXT, METRICS, CALIBRATION, PARTS, CARD)

    def _write(self, folder: Path) -> None:
        """A run directory of the weights that are loaded; those of another choice are left out."""
        settings = portable(self.settings)
        write_text(folder / CONFIG, to_json(settings))
        save_weights(folder / rundir.WEIGHTS, self.learner, identity(settings))
        for name in (RESULT_TEXT, METRICS, CALIBRATION, PARTS):
            if (self.path / name).exists():
                shutil.copy(self.path / name, folder / name)
        if (self.path / RESULT).exists():  # which names the files of one's own code too
            result = unsealed(regular.read_text(self.path / RESULT))
            result["protocol"]["model"] = settings.model
            if settings.code:
                result["code"] = settings.code
            write_json(folder / RESULT, result)

    def calibrations(self) -> list[Known]:
        """Those of the run directory, as they are now."""
        return read_calibration(self.path, self.settings.format >= DIGESTS)

    def _card(self, license: str | None = None) -> str:
        record, parts = read_record(self.path), self.path / PARTS
        named = unsealed(regular.read_text(parts)) if parts.exists() else {}
        return card_of_run(portable(self.settings), record.result, record.calibrations, named, license)

    @classmethod
    def _read(cls, folder: Path, **options: Any) -> Run:
        return load_run(folder, **options)

    def adapt(
        self,
        support: Any,
        *,
        steps: int | Literal["auto"] | None = None,
        statistics: Served = "support",
        compile: Compile = False,
    ) -> AdaptedModel:
        """The model that these labelled examples make of the run's.

        support: what `intake.labelled` takes: a folder with a directory of pictures for each class, a table with the
            target, an .npz file, or a dict from class to pictures; or the `Taken` that it gives.
        steps: inner steps; by default as many as the run's figure is of, "auto" those that were best in validation.
        statistics: whose examples batch norms normalise by: "support", so that each input is judged alone; "own", by
            those that are judged together.
        compile: as of `fomaml.engines.adapt`, for a program that adapts to one task after the other.

        Raises:
            InputError: examples that are none for the run; more classes than its head has outputs, or one class only;
                "auto" of a run without validation.
        """
        check_choice("statistics of an adapted model", statistics, Served)
        taken = support if isinstance(support, Taken) else self.intake.labelled(support)
        if taken.tasks is not None and len(taken.tasks) > 1:
            raise InputError(
                f"the labelled examples are of {len(taken.tasks)} tasks, {few(taken.tasks)}: give those of one"
            )
        classes, targets = self._targets(taken)
        known = self.calibrations()
        found = None
        if classes is not None:
            shots = max(1, round(len(taken.names) / len(classes)))
            found = nearest(known, len(classes), shots)
        count = self.steps_of(steps, found)
        learner = for_test(self.settings, self.learner)
        module = adapt(learner, Examples(taken.inputs, targets), count, statistics, compile=compile).eval()
        settings = self.settings
        return AdaptedModel(
            module,
            self.intake,
            classes,
            None if classes is not None else _target_names(settings),
            scaling_of(settings),
            settings.output,
            1.0 if found is None else found.temperature_after(count),
            {
                "run": str(self.path),
                "run_weights": file_digest(weights_file(self.path, self.weights)),
                "made": str(date.today()),
                "steps": count,
                "statistics": statistics,
                "support": _support(taken),
                "inputs": signature(taken.inputs),
                "calibration": None if found is None else found.told(count),
                "figures": _figures(self.path),
            },
            settings,
        )

    def _targets(self, taken: Taken) -> tuple[list[str] | None, Tensor]:
        """The classes, and the targets as the learner takes them."""
        settings, facts = self.settings, self.settings.facts
        device = next(self.learner.model.parameters()).device
        if not isinstance(taken.labels, list):
            assert taken.labels is not None and facts is not None  # sources of functions have no intake
            scaled = scaled_by(scaling_of(settings).targets)(taken.labels, "")
            return None, scaled.to(torch.get_default_dtype()).to(device)
        present, any_ways = sorted(set(taken.labels)), ALGORITHMS[settings.algorithm].any_ways
        if settings.fixed_classes:
            assert facts is not None
            if unknown := [label for label in taken.labels if label not in facts["classes"]]:
                raise InputError(
                    f"the class {unknown[0]!r} is none of the run's, which are the same in all tasks: "
                    f"{', '.join(facts['classes'])}"
                )
            # a head made of the classes knows nothing of one without an example
            classes = [name for name in facts["classes"] if not any_ways or name in present]
        else:
            classes = present
            if len(classes) > settings.ways and not any_ways:
                raise InputError(
                    f"the run learned a head for {settings.ways} classes, got {len(classes)}; only a head made of the "
                    f"classes takes any number: train with --algorithm {' or '.join(ANY_WAYS)}"
                )
        if len(classes) < 2:
            raise InputError(f"all examples are of the class {classes[0]!r}: two classes or more are needed")
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, torch.tensor([numbers[label] for label in taken.labels], device=device)

    def steps_of(self, steps: int | Literal["auto"] | None, found: Known | None) -> int:
        """The number of inner steps that is meant, see `adapt`. found: the calibration that "auto" goes by."""
        if steps is None:
            return self.settings.test_steps[-1]
        if steps == "auto":
            best = _best_steps(self.path) if found is None else found.best_steps
            if best is None:
                raise InputError(
                    f"the best number of steps is not known: {self.path} had no validation, and has no {CALIBRATION}, "
                    "which fomaml calibrate writes"
                )
            return best
        return whole("steps", steps)


@in_words_of_python
def load_run(run: str | Path, weights: Weights = "best", **options: Any) -> Run:
    """Load a run directory: its learner, its settings, and how it reads its inputs.

    weights: "best" by validation, or "last". options: `model=`, `loss=` for a run with code of one's own, by name or
    as the class or function; `device=`; `accept_changed_code=`.

    Raises:
        InputError: no finished run, or a damaged one; own code that is not named, or has changed.
    """
    return open_run(run, weights, **options)


def open_run(run: str | Path, weights: Weights = "best", **options: Any) -> Run:
    """`load_run`, whose errors speak of options."""
    path = Path(run).expanduser()
    settings, learner = rundir.load_run(path, weights, **options)
    return Run(path, settings, learner, intake_of(settings), weights)


def save_model(model: AdaptedModel, out: str | Path, *, change_from: Run | None = None) -> Path:
    """Write a folder of the adapted model: weights.safetensors, model.json and README.md.

    change_from: the run that it was made of, to keep only the tensors that adaptation has changed; loading then needs
        the run.

    Raises:
        InputError: the folder holds something already, or cannot be made.
    """
    path = Path(out).expanduser()
    check_empty(path)
    facts = model._write_as_it_is(path, change_from)
    write_text(path / CARD, card(facts, model.settings))
    return path


@in_words_of_python
def load_adapted(path: str | Path, **options: Any) -> AdaptedModel:
    """Load a folder that `fomaml adapt` has written.

    options: `model=`, the network's class or function, or its name, where it is code of one's own: nothing is imported
    because a file says so; `features_weights=`, the file of a frozen network's weights, where it has moved; `run=`, the
    run, where it has moved, of a model that holds only what differs from it; `device=`; `accept_changed_code=`.

    Raises:
        InputError: no such folder, a damaged one; own code that is not named, or has changed; a run that is needed and
            is not there, or another.
    """
    return open_adapted(path, **options)


def open_adapted(
    path: str | Path,
    *,
    model: Any = None,
    features_weights: str | None = None,
    run: str | Path | None = None,
    device: str = "cpu",
    accept_changed_code: bool = False,
) -> AdaptedModel:
    """`load_adapted`, whose errors speak of options."""
    root = Path(path).expanduser()
    try:
        facts = json.loads(regular.read_text(root / MODEL))
    except InputError:
        raise
    except OSError:
        raise InputError(f"{root} holds no adapted model (no {MODEL}); fomaml adapt RUN writes one") from None
    except (ValueError, RecursionError):
        raise InputError(f"{root / MODEL} is damaged: it holds no JSON") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{root / MODEL} is of a format that this version does not read")
    # what has been edited is noticed before it is used
    tensors, _ = load_tensors(root / WEIGHTS, settings=facts, checked=True)
    base = facts.get("base")
    if run is not None and base is None:
        raise InputError(f"{root} holds the whole model, which needs no run: give no --run")
    recorded = read_settings(json.dumps(facts["settings"]), str(root / MODEL))
    settings = named_again(
        recorded, root, model=model, features_weights=features_weights, accept_changed_code=accept_changed_code,
        going_on=False,
    )  # fmt: skip
    settings = dataclasses.replace(settings, device=device)
    module = _network(dataclasses.replace(settings, model_weights=None), facts["classes"])
    if base is not None:
        tensors = changes.completed(tensors, module, base, root, run)
    fill(module, tensors, root / WEIGHTS)
    told = {
        key: value
        for key, value in facts.items()
        if key not in ("format", "classes", "targets", "temperature", "settings", "base")
    }
    return AdaptedModel(
        module.eval(), intake_of(settings), facts["classes"], facts["targets"], scaling_of(settings), settings.output,
        facts["temperature"], told, settings,
    )  # fmt: skip


def _network(settings: Settings, classes: list[str] | None) -> nn.Module:
    """A network of the adapted one's shape; a head made of the classes has one output for each of them."""
    model = build_model(settings)
    if ALGORITHMS[settings.algorithm].any_ways and classes is not None:
        name = head_of(settings, model)
        assert name is not None  # as its algorithm has one
        owner, _, last = name.rpartition(".")
        head = model.get_submodule(name)
        assert isinstance(head, nn.Linear)
        own = nn.Linear(head.in_features, len(classes), head.bias is not None)
        setattr(model.get_submodule(owner), last, own.to(head.weight))
    return model


def _target_names(settings: Settings) -> list[str]:
    assert settings.facts is not None
    return settings.facts["targets"] or [f"target {number}" for number in range(settings.facts["outputs"])]


def _support(taken: Taken) -> dict[str, Any]:
    """What the support set was, JSON-able."""
    found: dict[str, Any] = {"examples": len(taken.names)}
    if isinstance(taken.labels, list):
        found["by_class"] = dict(Counter(taken.labels))
    return found


def _best_steps(run: Path) -> int | None:
    """The number of steps with the best score in validation, of equal ones the fewest."""
    record = read_record(run)
    means = (record.result or {}).get("weights", {}).get("by_steps")
    if not means:
        return None
    return max(map(int, means), key=lambda steps: (record.metric.direction * means[str(steps)], -steps))


def _figures(run: Path) -> dict[str, Any] | None:
    """What a card says of the run's result, where it has one."""
    result = read_record(run).result
    return None if result is None else figures_of(result)
