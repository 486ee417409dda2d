"""Pictures of what a source holds: a sheet of images, or a plot of series."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fomaml.app.grouped import Groups
from fomaml.app.sources import Functions
from fomaml.data.groups import GroupSource
from fomaml.data.images import pillow
from fomaml.episodes import RegressionEpisodes
from fomaml.files import replacing

IMAGES, SERIES = "images.png", "series.png"
ROWS, COLUMNS = 10, 8  # of a picture
CELL, LABEL, LETTERS = 64, 140, 20  # pixels of an image and of its name, and letters of a name
LEAST_LENGTH = 8  # of a series


def draw(found: Any, folder: Path) -> str:
    """Draw examples of a few classes or tasks; returns where they are, or why they are not drawn."""
    if isinstance(found, Functions):
        return _plotted([*_functions(found)], folder, dots=True)
    rows = [*_examples(found.train)]
    shape = None if not rows or not isinstance(rows[0][1], Tensor) else rows[0][1].shape[1:]
    if shape is not None and len(shape) == 3 and shape[0] in (1, 3):
        return _sheet(rows, folder / IMAGES)
    if shape is not None and len(shape) in (1, 2) and shape[-1] >= LEAST_LENGTH and not _is_table(found):
        series = [
            (name, [(None, own if own.dim() == 2 else own[None]) for own in inputs[:2]])
            for name, inputs in rows
        ]
        return _plotted(series, folder)
    return "no picture: the inputs are neither images nor series"


def _is_table(found: Any) -> bool:
    return isinstance(found, Groups) and found.facts["inputs"] is not None


def _examples(source: Any) -> Iterator[tuple[str, Any]]:
    """The names of the first classes, or tasks, and the inputs of some of their examples."""
    if isinstance(source, GroupSource):
        source = source.scaled(None)
        for number, name in enumerate(source.names[:ROWS]):
            spread = np.linspace(0, source.counts[number] - 1, min(COLUMNS, source.counts[number])).astype(
                int
            )
            yield name, source.take(source.offsets[number] + spread)[0]
        return
    for name, offset, count in zip(source.names[:ROWS], source.offsets.tolist(), source.counts.tolist()):
        yield name, source.take(torch.arange(offset, offset + min(COLUMNS, count)))


def _functions(found: Functions) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]]]]:
    episodes = RegressionEpisodes(found.family, shots=50, query_shots=1)
    for number in range(6):
        support = episodes[number].support
        yield f"task {number}", [(support.inputs.flatten(), support.targets.T)]


def _sheet(rows: list[tuple[str, Tensor]], path: Path) -> str:
    """A row of images for each name."""
    image = pillow()
    from PIL import ImageDraw

    sheet = image.new("L", (LABEL + COLUMNS * CELL, len(rows) * CELL), 255).convert("RGB")
    drawing = ImageDraw.Draw(sheet)
    low = min(float(inputs.min()) for _, inputs in rows)
    high = max(float(inputs.max()) for _, inputs in rows)
    for row, (name, inputs) in enumerate(rows):
        # the font that Pillow has with it knows Latin letters alone
        text = name[:LETTERS].encode("latin-1", "replace").decode("latin-1")
        drawing.text((4, row * CELL + CELL // 2 - 6), text, fill=0)
        for column, pixels in enumerate(inputs[:COLUMNS]):
            bytes_ = ((pixels.cpu().double() - low) / max(high - low, 1e-12) * 255).round().byte()
            array = bytes_[0].numpy() if len(bytes_) == 1 else bytes_.permute(1, 2, 0).numpy()
            cell = image.fromarray(array).convert("RGB").resize((CELL - 2, CELL - 2))
            sheet.paste(cell, (LABEL + column * CELL, row * CELL))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return f"images of {len(rows)}: {path}"


def _plotted(rows: list[tuple[str, list[tuple[Any, Tensor]]]], folder: Path, dots: bool = False) -> str:
    """A panel for each name, with one line for each channel."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no picture: a plot needs matplotlib, pip install 'fomaml[plots]'"
    figure = Figure(figsize=(8, 1.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, (name, series) in zip(panels, rows):
        for number, (places, channels) in enumerate(series):
            for channel, values in enumerate(channels):
                x = np.arange(len(values)) + number * len(values) if places is None else places.numpy()
                panel.plot(x, values.numpy(), "." if dots else "-", color=f"C{channel}", linewidth=1)
        panel.set_ylabel(name[:LETTERS], rotation=0, ha="right")
    path = folder / SERIES
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return f"series of {len(rows)}: {path}"
