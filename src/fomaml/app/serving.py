"""What a run has learned, in use: adapt it to examples of one's own, keep the adapted model, and load it again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fomaml.app import rundir
from fomaml.app.algorithms import ALGORITHMS, ANY_WAYS
from fomaml.app.build import for_test
from fomaml.app.calibrate import CALIBRATION, Known, nearest, read_calibration
from fomaml.app.group_tasks import scaling_of
from fomaml.app.intakes import intake_of
from fomaml.app.model_card import card
from fomaml.app.named import named_again
from fomaml.app.networks import build_model, head_of
from fomaml.app.rundir import RESULT, weights_file
from fomaml.app.settings import Settings, from_json, to_json
from fomaml.checkpoint import load_weights, save_weights
from fomaml.choices import check_choice
from fomaml.data.keys import few
from fomaml.data.scaling import scaled_by
from fomaml.errors import InputError, whole
from fomaml.files import file_digest, load_tensors, write_text
from fomaml.learning.learner import MetaLearner
from fomaml.serve.adapted import AdaptedModel
from fomaml.serve.export import signature
from fomaml.serve.intake import Intake, Taken
from fomaml.tasks import Examples

MODEL, WEIGHTS, CARD = "model.json", "weights.safetensors", "README.md"
FORMAT = 1
Served = Literal["support", "own"]


@dataclass
class Run:
    """A trained run: its learner, its settings, and the way from raw inputs to what it takes.

    path: the run directory. settings: all of config.json. learner: with the run's weights. intake: reads pictures,
    tables or arrays as the run has read its own.
    """

    path: Path
    settings: Settings
    learner: MetaLearner
    intake: Intake

    def adapt(
        self, support: Any, *, steps: int | Literal["auto"] | None = None, statistics: Served = "support"
    ) -> AdaptedModel:
        """The model that these labelled examples make of the run's.

        support: what `intake.labelled` takes: a folder with a directory of pictures for each class, a table with the
            target, an .npz file, or a dict from class to pictures; or the `Taken` that it gives.
        steps: inner steps; by default as many as the run's figure is of, "auto" those that were best in validation,
            see `fomaml calibrate`.
        statistics: whose examples batch norms normalise by: "support", so that each input is judged alone; "own", by
            those that are judged together.

        Raises:
            InputError: examples that are none for the run; more classes than its head has outputs, or one class only;
                "auto" without a calibration.
        """
        check_choice("statistics of an adapted model", statistics, Served)
        taken = support if isinstance(support, Taken) else self.intake.labelled(support)
        if taken.tasks is not None and len(taken.tasks) > 1:
            raise InputError(
                f"the labelled examples are of {len(taken.tasks)} tasks, {few(taken.tasks)}: give those of one"
            )
        classes, targets = self._targets(taken)
        known = read_calibration(self.path)
        found = None
        if classes is not None:
            shots = max(1, round(len(taken.names) / len(classes)))
            found = nearest(known, len(classes), shots)
        count = self.steps_of(steps, found)
        learner = for_test(self.settings, self.learner)
        module = learner.adapt(Examples(taken.inputs, targets), count, statistics).eval()
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
                "run_weights": file_digest(weights_file(self.path, "best")),
                "made": str(date.today()),
                "steps": count,
                "statistics": statistics,
                "support": _support(taken),
                "inputs": signature(taken.inputs),
                "calibration": None if found is None else found.told(count),
                "figures": _figures(self.path),
            },
        )

    def _targets(self, taken: Taken) -> tuple[list[str] | None, Tensor]:
        """The classes, and the targets as the learner takes them."""
        settings, facts = self.settings, self.settings.facts
        device = next(self.learner.model.parameters()).device
        if not isinstance(taken.labels, list):
            assert taken.labels is not None and facts is not None  # sources of functions have no intake
            scaled = scaled_by(scaling_of(settings).targets)(taken.labels, "")
            return None, scaled.to(torch.get_default_dtype()).to(device)
        if settings.fixed_classes:
            assert facts is not None
            classes = list(facts["classes"])
            if unknown := [label for label in taken.labels if label not in classes]:
                raise InputError(
                    f"the class {unknown[0]!r} is none of the run's, which are the same in all tasks: "
                    f"{', '.join(classes)}"
                )
        else:
            classes = sorted(set(taken.labels))
            if len(classes) < 2:
                raise InputError(
                    f"all examples are of the class {classes[0]!r}: two classes or more are needed"
                )
            if len(classes) > settings.ways and not ALGORITHMS[settings.algorithm].any_ways:
                raise InputError(
                    f"the run learned a head for {settings.ways} classes, got {len(classes)}; only a head made of the "
                    f"classes takes any number: train with --algorithm {' or '.join(ANY_WAYS)}"
                )
        numbers = {name: number for number, name in enumerate(classes)}
        return classes, torch.tensor([numbers[label] for label in taken.labels], device=device)

    def steps_of(self, steps: int | Literal["auto"] | None, found: Known | None) -> int:
        """The number of inner steps that is meant, see `adapt`. found: the calibration that "auto" goes by."""
        if steps is None:
            return self.settings.test_steps[-1]
        if steps == "auto":
            if found is None:
                raise InputError(
                    f"the best number of steps is not known: {self.path} has no {CALIBRATION}, which fomaml calibrate "
                    "writes"
                )
            return found.best_steps
        return whole("steps", steps)


def load_run(run: str | Path, weights: Literal["best", "last"] = "best", **options: Any) -> Run:
    """Load a run directory: its learner, its settings, and how it reads its inputs.

    weights: "best" by validation, or "last". options: `model=`, `loss=` for a run with code of one's own, by name or
    as the class or function; `device=`; `accept_changed_code=`.

    Raises:
        InputError: no finished run, or a damaged one; own code that is not named, or has changed.
    """
    path = Path(run).expanduser()
    settings, learner = rundir.load_run(path, weights, **options)
    return Run(path, settings, learner, intake_of(settings))


def save_model(model: AdaptedModel, run: Run, out: str | Path) -> Path:
    """Write a folder of the adapted model: weights.safetensors, model.json and README.md.

    Raises:
        InputError: the folder holds something already, or cannot be made.
    """
    path = Path(out).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} already holds something; give another --out, or delete it")
    facts = {
        "format": FORMAT,
        "classes": model.classes,
        "targets": model.targets,
        "temperature": model.temperature,
        **model.facts,
        "settings": json.loads(to_json(run.settings)),
    }
    save_weights(path / WEIGHTS, model.module, facts)
    write_text(path / CARD, card(facts))
    write_text(path / MODEL, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return path


def load_adapted(
    path: str | Path, *, model: Any = None, device: str = "cpu", accept_changed_code: bool = False
) -> AdaptedModel:
    """Load a folder that `fomaml adapt` has written.

    model: the network's class or function, or its name, where it is code of one's own: nothing is imported because a
        file says so.

    Raises:
        InputError: no such folder, a damaged one; own code that is not named, or has changed.
    """
    root = Path(path).expanduser()
    try:
        facts = json.loads((root / MODEL).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{root} holds no adapted model (no {MODEL}); fomaml adapt RUN writes one") from None
    except ValueError:
        raise InputError(f"{root / MODEL} is damaged: it holds no JSON") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise InputError(f"{root / MODEL} is of a format that this version does not read")
    load_tensors(root / WEIGHTS, settings=facts)  # what has been edited is noticed before it is used
    recorded = from_json(json.dumps(facts["settings"]), str(root / MODEL))
    settings = named_again(
        recorded, root, model=model, accept_changed_code=accept_changed_code, going_on=False
    )
    settings = dataclasses.replace(settings, device=device)
    module = _network(dataclasses.replace(settings, model_weights=None), facts["classes"])
    load_weights(root / WEIGHTS, module, facts)
    told = {
        key: value
        for key, value in facts.items()
        if key not in ("classes", "targets", "temperature", "settings")
    }
    return AdaptedModel(
        module.eval(), intake_of(settings), facts["classes"], facts["targets"], scaling_of(settings), settings.output,
        facts["temperature"], told,
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


def _figures(run: Path) -> dict[str, Any] | None:
    """The headline of the run's result, where it has one."""
    try:
        result: Mapping[str, Any] = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    metric = result.get("metric", "accuracy")
    wanted = (metric, "interval", "tasks", "name", "steps", "unit")
    return {"metric": metric, **{key: result[key] for key in wanted if key in result}}
