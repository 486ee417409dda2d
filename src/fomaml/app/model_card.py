"""The README.md of an adapted model: what it is, what it was made of, and what to expect of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card(facts: Mapping[str, Any]) -> str:
    """The card in markdown. facts: those of model.json."""
    settings = facts["settings"]
    support = facts["support"]
    classes, targets = facts["classes"], facts["targets"]
    task = f"It tells {len(classes)} classes apart: {', '.join(classes)}." if classes else ""
    task = task or f"It predicts {', '.join(targets)}."
    given = f"{support['examples']} labelled examples"
    if by_class := support.get("by_class"):
        given += f" ({', '.join(f'{name} {number}' for name, number in by_class.items())})"
    lines = [
        "# An adapted model",
        "",
        f"{task} Made on {facts['made']} by `fomaml adapt`, from {given}, in {facts['steps']} inner steps.",
        "",
        "## Use",
        "",
        "```sh",
        "fomaml predict THIS_FOLDER INPUT",
        "fomaml evaluate THIS_FOLDER --query LABELLED_INPUTS",
        "```",
        "",
        "```python",
        "import fomaml",
        "",
        'model = fomaml.load_adapted("THIS_FOLDER")',
        "predictions = model.predict(INPUTS)",
        "```",
        "",
        "## Where it comes from",
        "",
        f"- meta-trained by {settings['algorithm']} on {settings['source'].partition(':')[0]}: network "
        f"{settings['model']}, {settings['iterations']} outer steps, seed {settings['seed']}",
        f"- the weights it started from: SHA-256 {facts['run_weights']}",
    ]
    if figures := facts["figures"]:
        lines.append(
            f"- their score on {figures['tasks']} unseen tasks after {figures['steps']} steps: {figures['metric']} "
            f"{figures[figures['metric']]:.4g} ± {figures['interval']:.2g} (95 %)"
        )
    if calibration := facts["calibration"]:
        lines.append(
            f"- probabilities: temperature {facts['temperature']:.3g}, fitted on {calibration['tasks']} validation "
            f"tasks of {calibration['ways']} ways and {calibration['shots']} shots, where the calibration error is "
            f"{100 * calibration['error']:.1f} % ({100 * calibration['error_before']:.1f} % without)"
        )
    elif classes:
        lines.append("- probabilities: not calibrated; `fomaml calibrate RUN`, then adapt again")
    lines += [
        "",
        "## Limits",
        "",
        "It knows nothing but its training and the examples above. An input of another kind gets one of the answers "
        "above all the same. Score it on labelled inputs of your own before you rely on it.",
        "",
    ]
    return "\n".join(lines)
