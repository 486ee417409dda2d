"""What `fomaml adapt`, `predict`, `calibrate` and `evaluate MODEL` print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fomaml.app import calibrate as calibrating
from fomaml.app import rundir
from fomaml.app.report import align
from fomaml.app.serve_options import AdaptOptions, CalibrateOptions, ExportOptions, PredictOptions
from fomaml.app.serving import MODEL, open_adapted, open_run, save_model
from fomaml.errors import InputError, positive
from fomaml.sealed import finite
from fomaml.serve.adapted import Predictions
from fomaml.serve.export import SUFFIXES, export

WIDE = 6  # the classes whose probabilities fit beside each other


def run_adapt(options: AdaptOptions) -> None:
    run = open_run(
        options.run, options.weights, model=options.model, loss=options.loss, device=options.device,
        accept_changed_code=options.accept_changed_code,
    )  # fmt: skip
    model = run.adapt(options.support, steps=steps_of(options.steps), statistics=options.statistics)
    out = save_model(model, options.out, change_from=run if options.change_only else None)
    support = model.facts["support"]
    learned = (
        f"{len(model.classes)} classes, {', '.join(model.classes)}"
        if model.classes
        else ", ".join(model.targets or [])
    )
    print(f"adapted to {support['examples']} examples in {model.facts['steps']} steps: {learned}")
    if model.classes is not None:
        print(told(model.facts["calibration"], model.temperature, options.run))
    if options.change_only:
        print(f"only what has changed is kept: the model needs {options.run} where it is used")
    print(f"saved in {out}\n\nfomaml predict {out} INPUT")


def told(calibration: dict[str, Any] | None, temperature: float, run: Path) -> str:
    """What the probabilities are worth, in words."""
    if calibration is None:
        return f"probabilities: not calibrated (fomaml calibrate {run}, then adapt again)"
    return (
        f"probabilities: temperature {temperature:.3g} of {calibration['ways']}-way {calibration['shots']}-shot "
        f"validation tasks, where the calibration error is {100 * calibration['error']:.1f} %"
    )


def steps_of(text: str | None) -> Any:
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"--steps is a whole number or auto, got {text!r}") from None


def run_predict(options: PredictOptions) -> None:
    if options.json and options.csv:
        raise InputError("--json and --csv are two ways to print: give one of them")
    model = open_adapted(
        options.model_folder, model=options.model, run=options.moved_run, device=options.device,
        accept_changed_code=options.accept_changed_code,
    )  # fmt: skip
    inputs: Any = list(options.inputs) if len(options.inputs) > 1 else options.inputs[0]
    found = model.predict(inputs)
    if options.json:
        print(found.json_lines(), end="")
    elif options.csv:
        print(found.csv(), end="")
    else:
        print(describe(found))


def describe(found: Predictions) -> str:
    """A table: of classes the first one with its probability, and where they are few all."""
    if found.classes is None:
        rows = [["input", *(found.targets or [])]]
        rows += [
            [record.pop("input"), *(f"{value:.5g}" for value in record.values())]
            for record in found.records()
        ]
        return align(rows, left=True)
    shown = found.classes if len(found.classes) <= WIDE else []
    rows = [["input", "class", "probability", *(f"p({name})" for name in shown)]]
    for record in found.records():
        own = [f"{record['probabilities'][name]:.3f}" for name in shown]
        rows.append([record["input"], record["class"], f"{record['probability']:.3f}", *own])
    return align(rows, left=True)


def run_calibrate(options: CalibrateOptions) -> None:
    for name in ("ways", "shots"):
        for number in getattr(options, name) or ():
            positive(f"--{name}", number, integer=True)
    positive("--tasks", options.tasks, integer=True)
    settings, learner = rundir.load_run(
        options.run, options.weights, model=options.model, loss=options.loss, device=options.device,
        data_root=options.data_root, accept_changed_code=options.accept_changed_code,
    )  # fmt: skip
    found = calibrating.calibrate(
        options.run, settings, learner, options.ways, options.shots, options.tasks,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    print(f"\n{calibrating.describe(found)}\n\nsaved in {options.run / calibrating.CALIBRATION}")


def run_export(options: ExportOptions) -> None:
    model = open_adapted(
        options.model_folder,
        model=options.model,
        run=options.moved_run,
        accept_changed_code=options.accept_changed_code,
    )
    out = options.out or options.model_folder / f"model{SUFFIXES[options.to]}"
    apart = export(model, options.to, out)
    if options.to == "safetensors":
        print(f"saved the weights in {out}")
        return
    inputs = ", ".join(f"{key or 'input'} {each['shape']}" for key, each in model.facts["inputs"].items())
    print(
        f"the same outputs as the network's, to {apart:.1g}; inputs (examples, …): {inputs}\nsaved in {out}"
    )


def is_adapted(path: Path) -> bool:
    return (path / MODEL).exists()


def evaluate_adapted(path: Path, query: Path | None, as_json: bool, **options: Any) -> None:
    """Print how good an adapted model is on labelled inputs."""
    if query is None:
        raise InputError(
            f"{path} holds an adapted model: give the labelled inputs to judge it on, --query PATH"
        )
    found = open_adapted(path, **options).score(query)
    mean, interval = found.value
    scale, unit = (100, " %") if found.metric == "accuracy" else (1, "")
    if as_json:
        facts = {
            "metric": found.metric,
            found.metric: mean,
            "interval": interval,
            "examples": len(found.truth),
        }
        print(json.dumps(finite(facts), indent=2))
    else:
        print(
            f"{found.metric} {scale * mean:.4g} ± {scale * interval:.2g}{unit} on {len(found.truth)} examples (95 % "
            "interval over examples)"
        )
