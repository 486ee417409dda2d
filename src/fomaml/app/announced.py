"""What a run says before it trains: its data, its engine, its validation and its baselines."""

from __future__ import annotations

from collections.abc import Iterator

from fomaml.app import sizing
from fomaml.app.build import Data
from fomaml.app.device import has_bfloat16
from fomaml.app.settings import Settings
from fomaml.app.wording import spoken
from fomaml.engines import Plan


def announced(settings: Settings, data: Data, plan: Plan) -> Iterator[str]:
    """The lines."""
    yield (f"{data.name}: {data.origin}")
    yield (f"engine: {plan.engine} ({spoken(plan.why)})")
    if settings.autocast != "none":
        slow = "" if has_bfloat16(settings.device) else ", which this device may only imitate, slowly"
        yield (f"forward passes in {settings.autocast}{slow}")
    if settings.seconds:
        yield (f"training for {settings.seconds:g} s, which cannot be repeated bit for bit")
    if settings.validate_every:
        patience = "" if settings.patience is None else f", until {settings.patience} in a row were no better"
        yield (
            f"validation: {settings.validation_tasks} tasks every {settings.validate_every} iterations{patience}"
        )
    else:
        yield ("no validation, as asked" if data.validation else f"no validation: {data.unvalidated}")

    sizes = sizing.of_baselines(settings)
    if settings.baselines and sizes != sizing.full(settings):
        most, few, tested = (
            max(sizes.at_steps),
            sizes.tuning_tasks,
            f"{sizes.tasks} of {settings.test_tasks}",
        )
        yield (
            f"baselines, sized to a short run: tuned on {few} tasks with at most {most} steps, tested on {tested} "
            "tasks; --baseline-size full takes all"
        )
