"""Tasks out of smartwatch recordings: one person's one arm, seven exercises, windows of two seconds at 50 Hz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fomaml.draws import generator
from fomaml.tasks import Examples, Task

WINDOW = 100  # samples, two seconds
GAP = 50  # samples between the last support window and the first query window
EXERCISES = 7
# By sensor, not by channel, and without a shift, so that a turn of the watch stays a turn. Constants near the standard
# deviations of acceleration (g) and rotation (rad/s); nothing is fitted to anyone's data.
SCALE = torch.tensor([0.7] * 3 + [1.7] * 3)


class Recordings:
    """All recordings of a file that runs/watch_download.py has written.

    samples: (samples, 6) one recording after the other. start, length: (subjects, arms, exercises) numpy arrays.
    """

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            self.samples = torch.from_numpy(file["samples"]) / SCALE
            lengths, subjects = file["lengths"], file["subject"]
            where = subjects - 1, file["right_arm"], file["exercise"]
        self.subjects = tuple(range(len(np.unique(subjects))))
        self.start, self.length = (np.full((len(self.subjects), 2, EXERCISES), -1) for _ in range(2))
        self.start[where], self.length[where] = np.cumsum(lengths) - lengths, lengths
        if (self.length < 0).any():
            raise ValueError(f"{path}: not every subject did every exercise with both arms")

    def windows(self, starts: np.ndarray, stretch: np.ndarray | None = None) -> Tensor:
        """Windows (…, 6, 100) of any shape of `starts`; `stretch`, of a shape that broadcasts, reads so much faster."""
        steps = np.arange(WINDOW)
        if stretch is None:
            return self.samples[torch.from_numpy(starts[..., None] + steps)].mT.contiguous()
        positions = torch.from_numpy(starts[..., None] + stretch[..., None] * steps)
        before = positions.floor().long()
        share = (positions - before).float().unsqueeze(-1)
        after = (before + 1).clamp(max=len(self.samples) - 1)
        return torch.lerp(self.samples[before], self.samples[after], share).mT


@dataclass(frozen=True)
class Variation:
    """How people of the training tasks are made to differ more than they do; all but `turn` of each exercise by itself.

    mixed: each exercise is another person's, of the same arm. turn, turn_each: standard deviation, in degrees, of a
    rotation of the watch. gain: of the logarithm of a factor of each sensor. stretch: of that of the speed.
    exchange: the share of tasks in which two exercises have each other's name: only the support set tells.
    """

    mixed: bool = False
    turn: float = 0.0
    turn_each: float = 0.0
    gain: float = 0.0
    stretch: float = 0.0
    exchange: float = 0.0


class TrainingTasks:
    """Endless tasks of the given subjects, each a pure function of (seed, index).

    Support: K windows in a row from a random moment of each exercise. Query: random windows after the gap.
    confusions: (exercises, exercises) shares, which pairs of exercises exchange their names; the sum is 1.
    """

    ways, copies = EXERCISES, 1

    def __init__(
        self,
        recordings: Recordings,
        subjects: tuple[int, ...],
        shots: int,
        query_shots: int,
        variation: Variation = Variation(),
        seed: int = 0,
        confusions: np.ndarray | None = None,
    ):
        self.recordings, self.subjects, self.variation, self.seed = recordings, subjects, variation, seed
        self.shots, self.query_shots, self.confusions = shots, query_shots, confusions

    def batch(self, start: int, tasks: int) -> Task:
        shots, own, shape = self.shots, self.variation, (tasks, EXERCISES)
        parts = [1, EXERCISES, 1, EXERCISES, EXERCISES * self.query_shots, 2]
        uniform, normal = np.empty((tasks, sum(parts))), np.empty((tasks, 4 + 7 * EXERCISES))
        for row in range(tasks):
            random = generator(self.seed, start + row)
            uniform[row], normal[row] = random.random(sum(parts)), random.standard_normal(normal.shape[1])
        one, each, arm, first, later, swap = np.split(uniform, np.cumsum(parts)[:-1], axis=1)
        subject = np.array(self.subjects)[((each if own.mixed else one) * len(self.subjects)).astype(int)]
        where = (
            np.broadcast_to(subject, shape),
            (2 * arm).astype(int).repeat(EXERCISES, 1),
            np.broadcast_to(np.arange(EXERCISES), shape),
        )
        begin, length = self.recordings.start[where], self.recordings.length[where]  # (tasks, exercises)
        turn, turn_each, gain, stretch = np.split(
            normal, np.cumsum([4, 4 * EXERCISES, 2 * EXERCISES]), axis=1
        )
        speed = np.exp(own.stretch * stretch).clip(0.7, 1.4)
        # as fast as the recording is long enough for
        speed = np.minimum(speed, ((length - GAP - 1) // (shots + 1) - 1) / WINDOW)
        width = np.ceil(speed * WINDOW).astype(int)
        support = begin + (first * (length - GAP - (shots + 1) * width)).astype(int)
        earliest = support + shots * width + GAP
        room = (begin + length - width - earliest)[..., None]
        query = earliest[..., None] + (later.reshape(*shape, -1) * (room + 1)).astype(int)
        starts = np.concatenate(
            [support[..., None] + width[..., None] * np.arange(shots), query], axis=2
        )  # (tasks, exercises, windows)
        windows = self.recordings.windows(starts, speed[..., None] if own.stretch else None)
        if own.turn or own.turn_each:
            turns = rotations(turn_each.reshape(*shape, 4), own.turn_each)
            turns = rotations(turn[:, None], own.turn) @ turns
            sensors = windows.unflatten(-2, (2, 3))
            windows = (turns[:, :, None, None] @ sensors).flatten(-3, -2)
        if own.gain:
            factors = torch.from_numpy(np.exp(own.gain * gain)).float().reshape(*shape, 1, 2, 1)
            windows = windows * factors.repeat_interleave(3, 3)
        names = np.broadcast_to(np.arange(EXERCISES), shape).copy()
        if own.exchange:
            pairs = np.searchsorted(self.confusions.cumsum(), swap[:, 1]).clip(max=EXERCISES**2 - 1)
            for row in np.flatnonzero(swap[:, 0] < own.exchange):
                a, b = divmod(int(pairs[row]), EXERCISES)
                names[row, [a, b]] = b, a
        parts = windows.split([shots, self.query_shots], dim=2)
        return Task(*(_examples(part, torch.from_numpy(names)) for part in parts))


class UnseenTasks:
    """One task for each arm of the given subjects, `owners` the subject of each.

    Support: the first K windows of each exercise. Query: 16 windows, evenly spaced from the gap to the end.
    """

    ways, copies, query_shots = EXERCISES, 1, 16

    def __init__(self, recordings: Recordings, subjects: tuple[int, ...], shots: int):
        begin, length = (table[list(subjects)] for table in (recordings.start, recordings.length))
        support = begin[..., None] + WINDOW * np.arange(shots)
        spaces = np.linspace(0, 1, self.query_shots)
        first = WINDOW * shots + GAP
        query = begin[..., None] + (first + spaces * (length[..., None] - WINDOW - first)).round().astype(int)
        parts = (recordings.windows(starts.reshape(-1, *starts.shape[2:])) for starts in (support, query))
        self.tasks = Task(*(_examples(part, torch.arange(EXERCISES)) for part in parts))
        self.owners = [subject for subject in subjects for _ in range(2)]

    def __len__(self) -> int:
        return len(self.owners)

    def batch(self, start: int, tasks: int) -> Task:
        return self.tasks.map(lambda tensor: tensor[start : start + tasks])


def rotations(numbers: np.ndarray, degrees: float) -> Tensor:
    """Rotation matrices (…, 3, 3) about a random axis by a random angle, out of four normal numbers (…, 4) each."""
    axis = numbers[..., :3] / np.linalg.norm(numbers[..., :3], axis=-1, keepdims=True)
    angle = np.deg2rad(degrees) * numbers[..., 3, None, None]
    cross = np.cross(axis[..., None, :], np.eye(3))  # of the axis with each unit vector (Rodrigues)
    return torch.from_numpy(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross).float()


def features(windows: Tensor) -> np.ndarray:
    """(windows, 60) what a practitioner computes: mean, deviation, extremes, mean change and the five slowest
    frequencies of each channel, of windows (windows, 6, 100).
    """
    x = windows.numpy()
    waves = np.abs(np.fft.rfft(x, axis=-1))[..., 1:6].reshape(len(x), -1)
    change = np.abs(np.diff(x, axis=-1)).mean(-1)
    return np.concatenate([x.mean(-1), x.std(-1), x.min(-1), x.max(-1), change, waves], axis=1)


def confusions(recordings: Recordings, subjects: tuple[int, ...]) -> np.ndarray:
    """(exercises, exercises) shares: a window of the first, and of the second its nearest of the other subjects."""
    tasks = UnseenTasks(recordings, subjects, 1)
    known = features(tasks.tasks.query.inputs.flatten(0, 1))
    known = (known - known.mean(0)) / known.std(0)
    labels = tasks.tasks.query.targets.flatten().numpy()
    owners = np.array(tasks.owners).repeat(len(labels) // len(tasks))
    distances = torch.cdist(torch.from_numpy(known), torch.from_numpy(known)).numpy()
    nearest = labels[np.where(owners[:, None] == owners, np.inf, distances).argmin(1)]
    found = np.zeros((EXERCISES, EXERCISES))
    np.add.at(found, (labels, nearest), labels != nearest)
    return found / found.sum()


def _examples(windows: Tensor, names: Tensor) -> Examples:
    """Of windows (tasks, exercises, windows, 6, 100), in the order of the exercises, whose names are the targets."""
    targets = names.unsqueeze(-1).expand(windows.shape[:3])
    return Examples(windows.flatten(1, 2).contiguous(), targets.flatten(1).contiguous())
