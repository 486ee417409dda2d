"""An adapted model in use: what it says of new inputs, and how sure it is."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fomaml.data.scaling import Scaling
from fomaml.errors import InputError
from fomaml.evaluate import Estimate, estimate
from fomaml.learning.contracts import Output
from fomaml.learning.forward import called
from fomaml.learning.mistakes import selected
from fomaml.serve.intake import Intake, Taken
from fomaml.tasks import first
from fomaml.trees import mapped

AT_ONCE = 256  # examples in a forward pass


@dataclass(frozen=True)
class Predictions:
    """What a model says of inputs.

    names: of the inputs. classes and probabilities (examples, classes), or targets (names) and values (examples,
    targets) in the targets' own unit.
    """

    names: list[str]
    classes: list[str] | None = None
    probabilities: Tensor | None = None
    targets: list[str] | None = None
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> list[str]:
        """The most probable class of each input."""
        if self.classes is None or self.probabilities is None:
            raise InputError("values have no labels: this model predicts numbers")
        return [self.classes[number] for number in self.probabilities.argmax(1).tolist()]

    def records(self) -> Iterator[dict[str, Any]]:
        """A JSON-able dict for each input."""
        if self.classes is not None and self.probabilities is not None:
            for name, label, row in zip(self.names, self.labels, self.probabilities.tolist()):
                yield {
                    "input": name,
                    "class": label,
                    "probability": max(row),
                    "probabilities": dict(zip(self.classes, row)),
                }
        elif self.targets is not None and self.values is not None:
            for name, row in zip(self.names, self.values.tolist()):
                yield {"input": name, **dict(zip(self.targets, row))}

    def json_lines(self) -> str:
        """One JSON object a line."""
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records())

    def csv(self) -> str:
        """A line of names, and one for each input."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        if self.classes is not None and self.probabilities is not None:
            writer.writerow(["input", "class", "probability", *(f"p({name})" for name in self.classes)])
            for record in self.records():
                own = [record["probability"], *record["probabilities"].values()]
                writer.writerow([record["input"], record["class"], *(f"{value:.6f}" for value in own)])
        else:
            writer.writerow(["input", *(self.targets or [])])
            for record in self.records():
                writer.writerow(list(record.values()))
        return file.getvalue()


@dataclass
class AdaptedModel:
    """A model that has learned a new task.

    module: the adapted network, an ordinary `nn.Module` in evaluation mode. intake: makes raw inputs ready.
    classes: of its outputs, the first ones where it has more; None for regression, whose `targets` are named.
    temperature: that logits are divided by, see `calibration`; 1 where it is not calibrated.
    facts: JSON-able: what it was made of.
    """

    module: nn.Module
    intake: Intake
    classes: list[str] | None
    targets: list[str] | None
    scaling: Scaling
    output: Output
    temperature: float
    facts: dict[str, Any]

    def predict(self, inputs: Any) -> Predictions:
        """What it says of inputs as the run's `Intake` takes them: paths, pictures, a table, arrays; or a `Taken`, what
        it has made of them.

        Raises:
            InputError: inputs that are none for this run.
        """
        return self._predictions(inputs if isinstance(inputs, Taken) else self.intake.inputs(inputs))

    def score(self, labelled: Any) -> Score:
        """How good it is on labelled inputs: the accuracy, or the root of the mean squared error of each target.

        Raises:
            InputError: inputs that are none, without labels, or of a class that the model does not know.
        """
        taken = self.intake.labelled(labelled)
        found = self._predictions(taken)
        if self.classes is not None:
            assert isinstance(taken.labels, list)
            if unknown := [label for label in taken.labels if label not in self.classes]:
                raise InputError(
                    f"the class {unknown[0]!r} is none of the model's: {', '.join(self.classes)}"
                )
            right = [float(a == b) for a, b in zip(found.labels, taken.labels)]
            return Score("accuracy", estimate(torch.tensor(right, dtype=torch.float64)), found, taken.labels)
        assert isinstance(taken.labels, Tensor) and found.values is not None
        if taken.labels.shape != found.values.shape:
            raise InputError(
                f"targets of shape {tuple(taken.labels.shape)}, but values of shape {tuple(found.values.shape)}"
            )
        squares = (found.values - taken.labels).double().square().mean(1)
        mean, interval = estimate(squares)
        rmse = mean**0.5
        # the delta method: the root's interval is the square's by its slope
        return Score("rmse", Estimate(rmse, interval / (2 * rmse) if rmse else 0.0), found, taken.labels)

    @torch.no_grad()
    def outputs(self, taken: Taken) -> Tensor:
        """(examples, outputs) of the network, on the CPU: logits of the classes, or values as it learned them."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        rows = torch.arange(len(first(taken.inputs)))
        parts = []
        for part in rows.split(AT_ONCE):
            inputs = mapped(lambda tensor, part=part: tensor[part].to(device), taken.inputs)
            parts.append(selected(called(self.module, self.module, inputs), self.output).cpu())
        found = torch.cat(parts)
        return found if self.classes is None else found[:, : len(self.classes)]

    def _predictions(self, taken: Taken) -> Predictions:
        found = self.outputs(taken)
        if not found.isfinite().all():
            bad = int((~found.isfinite()).flatten(1).any(1).nonzero()[0])
            raise InputError(f"the model gives no finite number for {taken.names[bad]}")
        if self.classes is not None:
            probabilities = (found.double() / self.temperature).softmax(1)
            return Predictions(taken.names, classes=self.classes, probabilities=probabilities)
        found = found[:, None] if found.dim() == 1 else found.flatten(1)
        return Predictions(taken.names, targets=self.targets, values=self.scaling.unscaled(found.double()))


@dataclass(frozen=True)
class Score:
    """metric: accuracy, or rmse in the targets' own unit; value: its mean and 95 % interval over the examples."""

    metric: str
    value: Estimate
    predictions: Predictions
    truth: list[str] | Tensor
