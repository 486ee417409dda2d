"""Windows of long recordings, a view of their samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fomaml.data.keys import as_column
from fomaml.data.rows import Held, as_array, check_finite, in_memory
from fomaml.errors import InputError, positive


class Windows:
    """Every window of `window` samples, `hop` from one to the next, none across two recordings; rows like an array's.

    Attributes:
        samples: (samples, channels) or (samples,), as given.
        starts: (rows,) the first sample of each window. recordings: (rows,) its recording.
        number: of recordings. gap: the windows to leave out between two of one recording that share no sample.
        left_out: what was left out, in words.
    """

    def __init__(
        self, samples: np.ndarray, starts: np.ndarray, recordings: np.ndarray, window: int, hop: int
    ):
        self.starts, self.recordings = starts, recordings
        self.window = window
        self.gap = -(-window // hop) - 1
        self.number = 0
        self.left_out = ""
        self.samples = samples
        self._view = self._windows()
        # a signal in whole numbers, as of 16 bits, is one of numbers all the same
        self.dtype = np.dtype(np.float64) if samples.dtype.kind in "biu" else samples.dtype
        self.shape = (len(starts), *self._view.shape[1:])

    @classmethod
    def cut(cls, samples: Any, lengths: Any, window: int, hop: int, leave_out_short: bool = False) -> Windows:
        """The windows of recordings that stand one after the other in samples (samples, channels) or (samples,).

        Raises:
            InputError: see `GroupSource.from_windows`.
        """
        window, hop = positive("window", window, integer=True), positive("hop", hop, integer=True)
        array = as_array(samples, "samples")
        array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
        if not isinstance(array, np.ndarray) or array.ndim > 2:
            raise InputError(
                f"the samples must be a numpy array (samples, channels), got a {type(samples).__name__} of shape "
                f"{tuple(array.shape)}"
            )
        if in_memory(array):
            check_finite(array, "samples")
        counts = as_column(lengths, "lengths")
        if counts.dtype.kind not in "iu" or not counts.size or counts.min() < 1:
            got = f"{counts.min()}" if counts.dtype.kind in "iu" and counts.size else f"dtype {counts.dtype}"
            raise InputError(
                f"the lengths must be whole numbers of 1 or more, one for each recording, got {got}"
            )
        counts = counts.astype(np.int64)
        if counts.sum() != len(array):
            raise InputError(
                f"the lengths of {len(counts)} recordings add up to {counts.sum()}, but there are {len(array)} samples "
                f"(samples, channels), got shape {array.shape}: give the length of each recording in samples"
            )
        fit = np.maximum(0, (counts - window) // hop + 1)
        short = np.flatnonzero(fit == 0)
        if short.size and (not leave_out_short or short.size == len(counts)):
            least = int(short[counts[short].argmin()])
            raise InputError(
                f"{short.size} of {len(counts)} recordings are shorter than a window of {window} samples, the shortest "
                f"is number {least}, counted from 0, of {counts[least]}: take a shorter window"
                + ("" if short.size == len(counts) else ", or leave them out (leave_out_short=True)")
            )
        recordings = np.repeat(np.arange(len(counts)), fit)
        within = np.arange(len(recordings)) - np.repeat(fit.cumsum() - fit, fit)
        begins = counts.cumsum() - counts
        made = cls(array, begins[recordings] + hop * within, recordings, window, hop)
        made.number = len(counts)
        if short.size:
            made.left_out = f"{short.size} of {len(counts)} recordings, shorter than a window"
        return made

    def _windows(self) -> np.ndarray:
        """(…, channels, window) at every sample, of which nothing is read here."""
        samples = self.samples[:, None] if self.samples.ndim == 1 else self.samples
        return np.lib.stride_tricks.sliding_window_view(samples, self.window, axis=0)

    def __getstate__(self) -> dict:
        return vars(self) | {
            "samples": Held(self.samples),
            "_view": None,
        }  # of which a pickle has each window

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, samples=state["samples"].value)
        self._view = self._windows()

    def __getitem__(self, rows: Any) -> np.ndarray:
        """(rows, channels, window), read from the samples now; floating."""
        return self._view[self.starts[rows]].astype(self.dtype, copy=False)
