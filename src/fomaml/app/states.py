"""What a run goes on from: the last two states and the best weights, whole, finite and of this run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomaml.app import rundir
from fomaml.app.settings import DIGESTS, Settings, identity
from fomaml.checkpoint import load_progress, load_state, load_weights, save_state, save_weights
from fomaml.errors import InputError
from fomaml.files import load_tensors
from fomaml.finite import not_finite, not_sound, unsound
from fomaml.learning.learner import MetaLearner


class States:
    """The files of tensors of a run directory that is being trained in."""

    def __init__(
        self,
        out: Path,
        settings: Settings,
        learner: MetaLearner,
        optimizer: torch.optim.Optimizer,
        say: Callable[[str], None],
    ):
        self.out, self.settings, self.learner, self.optimizer, self.say = (
            out,
            settings,
            learner,
            optimizer,
            say,
        )
        self.identity = identity(settings)
        self.checked = settings.format >= DIGESTS
        self.masks = not_finite(dict(learner.named_buffers()))  # infinite from the beginning, as of attention
        self.saved = time.monotonic()

    def is_time(self) -> bool:
        """Whether the last state is as old as --checkpoint-seconds."""
        return time.monotonic() - self.saved >= self.settings.checkpoint_seconds

    def check(self, iteration: int, first_bad: Tensor | None = None) -> None:
        """Raise `NotFiniteError` where something that is to be saved is not finite. It waits for the device.

        first_bad: of the last `Record`.
        """
        if first_bad is not None and first_bad.item():
            raise unsound(int(first_bad.item()))
        if bad := not_finite(self.learner.state_dict()) - self.masks:
            raise not_sound(iteration, f"{min(bad)} of the model")
        of_optimizer = {
            f"{index}/{name}": value
            for index, entries in self.optimizer.state_dict()["state"].items()
            for name, value in entries.items()
            if isinstance(value, Tensor)
        }
        if not_finite(of_optimizer):
            raise not_sound(iteration, f"a number that {type(self.optimizer).__name__} keeps")

    def save(self, iteration: int, progress: Mapping[str, Any]) -> None:
        """Write a state; the newest one there is kept as the one before. progress: see `save_state`."""
        state = self.out / rundir.STATE
        if state.exists():
            os.replace(state, self.out / rundir.STATE_BEFORE)
        save_state(state, self.learner, self.optimizer, iteration, progress, self.identity)
        self.saved = time.monotonic()

    def exist(self) -> bool:
        """Whether there is one."""
        return (self.out / rundir.STATE).exists()

    def take_up(self) -> tuple[int, dict[str, Any]]:
        """Read the newest whole state; returns its iteration and its progress, of no state 0 and nothing.

        Raises:
            InputError: there are states, and none of them is whole and of this run.
        """
        damaged = []
        for name in (rundir.STATE, rundir.STATE_BEFORE):
            state = self.out / name
            if not state.exists():
                continue
            try:
                done = load_state(state, self.learner, self.optimizer, self.identity, self.checked)
                progress = load_progress(state)
            except InputError as error:
                damaged.append(str(error))
                continue
            for told in damaged:
                self.say(f"{told}; going on from the state before it")
            return done, progress
        if damaged:
            raise InputError(
                f"{damaged[0]}; no other state is left: bring back a copy, or train anew elsewhere"
            )
        return 0, {}

    def save_best(self) -> None:
        """Write the best weights so far."""
        save_weights(self.out / rundir.WEIGHTS, self.learner, self.identity)

    def load_best(self) -> None:
        """Read the best weights into the learner."""
        load_weights(self.out / rundir.WEIGHTS, self.learner, self.identity, self.checked)

    def has_best(self, iteration: int) -> bool:
        """Whether the best weights, of this iteration, are still there; says so where they are not.

        Raises:
            InputError: they are damaged.
        """
        weights = self.out / rundir.WEIGHTS
        if not weights.exists():
            self.say(f"{weights}, the best of iteration {iteration}, is gone: the best from here on are kept")
            return False
        try:
            load_tensors(weights, settings=self.identity, checked=self.checked)
        except InputError as error:
            raise InputError(
                f"{error}; bring back a copy of it, or delete it to keep the best from here on"
            ) from None
        return True
