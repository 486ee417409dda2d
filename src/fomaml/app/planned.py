"""What a run keeps of its plan, so that it goes on bit for bit: what it had decided, and not the rule again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fomaml.app.build import Data, build_plan
from fomaml.app.settings import Settings
from fomaml.engines import Plan
from fomaml.learning.learner import MetaLearner


def kept_of(settings: Settings, plan: Plan) -> dict[str, Any]:
    """What goes into a state.

    tasks_at_once: halved where memory has run out. seen: shapes that are compiled when they come back. compile: what
    was asked for, whether it is `decided` for good, and what came of it in words.
    """
    compiling = {"asked": settings.compile, "decided": _decided(plan), "told": told(plan)}
    return {"tasks_at_once": plan.tasks_at_once, "seen": sorted(plan.seen), "compile": compiling}


def _decided(plan: Plan) -> bool | None:
    """Whether all is compiled, or nothing; None where some shapes are."""
    compiling = plan.compiling
    if compiling.failure and compiling.unchecked is not None:
        return None
    return compiling.on and not compiling.failure


def told(plan: Plan) -> str:
    """Whether a run is compiled, and agrees with the eager engine, as far as it is known."""
    compiling, decided = plan.compiling, _decided(plan)
    if not decided:
        part = "uncompiled" if decided is False else "compiled in part"
        return f"{part}: {compiling.failure}" if compiling.failure else part
    if compiling.unchecked is None:
        return "to be compiled"
    if compiling.unchecked:
        return f"compiled, not compared with the eager engine: {compiling.unchecked}"
    return "compiled, and agrees with the eager engine"


def going_on(
    settings: Settings, learner: MetaLearner, data: Data, plan: Plan, progress: Mapping[str, Any]
) -> Plan:
    """The plan of a run that goes on. plan: as it would begin. progress: of its state; empty where there is none.

    A run that was compiled stops where it cannot be, unless it is told otherwise than when it was begun.
    """
    at_once, kept = progress.get("tasks_at_once", plan.tasks_at_once), progress.get("compile", {})
    decided = kept["decided"] if kept.get("asked") == settings.compile else None
    if at_once != plan.tasks_at_once or decided is not None:
        plan = build_plan(settings, learner, data, at_once, decided)
    plan.seen |= set(progress.get("seen", ()))
    return plan
