"""Examples of a task as cells of HTML tables: pictures, series, or the numbers of a row."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from fomaml.app.looked_at import Looked, TaskLooked
from fomaml.app.settings import Settings
from fomaml.data.images import pillow
from fomaml.tasks import first

SUPPORT, QUERY = 5, 12  # examples per class, and of a query set, that are shown
ROWS = 10  # of a task whose examples are numbers
NOTHING = 1e-6
COLUMNS = 8  # numbers of an example
LEAST_LENGTH = 8  # of a series
LETTERS = 60  # of a name in a table
WIDTH, HEIGHT = 96, 32  # of a series
COLOURS = ("var(--blue)", "var(--orange)", "var(--green)", "var(--violet)")


def text(value: Any, letters: int = LETTERS) -> str:
    """What is told, escaped: names of classes, columns and paths are anybody's."""
    own = str(value).encode("utf-8", "replace").decode()
    own = "".join(c if c.isprintable() else "\ufffd" for c in own)
    return escape(own if len(own) <= letters else own[: letters - 1] + "…")


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", numbers: bool = False
) -> str:
    """A table of cells that are HTML; the first cell of each row is its heading."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    told = f"<caption>{caption}</caption>" if caption else ""
    kind = ' class="numbers"' if numbers else ""
    inner = f"<table{kind}>{told}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    # a table that is wider than the page is scrolled, by keys too
    return f'<div class="wide" tabindex="0" role="group" aria-label="{caption or "table"}">{inner}</div>'


def of_task(task: TaskLooked, looked: Looked, settings: Settings) -> str:
    """The support set of a task, and its query set with what was said before and after."""
    if task.classes is None:
        return _values(task, looked, settings)
    return _classes(task, looked, settings)


# --- classes --------------------------------------------------------------------------------------


def _classes(task: TaskLooked, looked: Looked, settings: Settings) -> str:
    assert task.classes is not None
    names = [text(name) for name in task.classes]
    support, query = task.task
    labels, truth = support.targets.tolist(), query.targets.tolist()
    drawn = cells(support.inputs, settings, [f"support example of {names[label]}" for label in labels])
    cards = []
    for label, name in enumerate(names):
        own = [number for number, other in enumerate(labels) if other == label]
        more = f" and {len(own) - SUPPORT} more" if len(own) > SUPPORT else ""
        examples = "".join(_joined(drawn, number) for number in own[:SUPPORT])
        cards.append(f"<li>{examples}{more}<br>{name}</li>")
    what = "Support set: what the task is learned from"
    found = f'<p class="quiet">{what}</p><ul class="cards">{"".join(cards)}</ul>'
    some = _spread(len(truth), QUERY)
    drawn = cells(query.inputs, settings, [f"query example {number + 1}" for number in range(len(truth))])
    rows = [
        [
            _joined(drawn, number) or f"query example {number + 1}",
            names[truth[number]],
            *(_guess(said[number], truth[number], names) for said in (task.said_before, task.said_after)),
        ]
        for number in some
    ]
    caption = f"Query set, {len(some)} of {len(truth)} examples: what was said of it"
    headings = ["example", "true class", "before adaptation", f"after {looked.steps} steps"]
    return found + table(headings, rows, caption)


def _joined(drawn: list[tuple[str, list[str]]], number: int) -> str:
    """One example: its picture, or its numbers with their names."""
    if len(drawn) == 1:
        return drawn[0][1][number]
    own = "; ".join(f"{name} {values[number]}" for name, values in drawn)
    return f'<span class="row">{own}</span>' if own else ""


def _guess(said: Tensor, true: int, names: list[str]) -> str:
    guess = int(said.argmax())
    mark = '<span class="right">✓ right</span>' if guess == true else '<span class="wrong">✗ wrong</span>'
    name = names[guess] if guess < len(names) else f"output {guess}"
    return f"{mark}<br>{name}, {100 * float(said[guess]):.0f}&nbsp;%"


# --- values ---------------------------------------------------------------------------------------


def _values(task: TaskLooked, looked: Looked, settings: Settings) -> str:
    found = []
    targets = [text(name) for name in looked.targets[:COLUMNS]]
    said = (task.said_before, task.said_after)
    when = ("before", f"after {looked.steps} steps")
    for part, what in zip(task.task, ("support", "query")):
        count = len(part.targets)
        some = _spread(count, ROWS)
        drawn = cells(part.inputs, settings, [f"{what} example {number + 1}" for number in range(count)])
        headings = ["example", *(name for name, _ in drawn), *(f"{name}, true" for name in targets)]
        if what == "query":
            headings += [f"{name}, {then}" for then in when for name in targets]
        rows = []
        for number in some:
            values = [part.targets[number]] + ([own[number] for own in said] if what == "query" else [])
            numbers = [f"{value:.4g}" for own in values for value in own[:COLUMNS].tolist()]
            rows.append([str(number + 1), *(own[number] for _, own in drawn), *numbers])
        told = "what the task is learned from" if what == "support" else "what was said of it"
        caption = f"{what.capitalize()} set, {len(some)} of {count} examples: {told}"
        found.append(table(headings, rows, caption, numbers=True))
    if task.curve is not None:  # the plot shows what the tables hold
        return f"<details><summary>The numbers</summary>{''.join(found)}</details>"
    return "".join(found)


# --- examples -------------------------------------------------------------------------------------


def cells(inputs: Any, settings: Settings, told: list[str]) -> list[tuple[str, list[str]]]:
    """Columns of a table: their headings, and a cell for each example. told: what each is, for those who see none."""
    facts = settings.facts or {}
    names = list(facts.get("inputs") or ())
    categories: dict[str, list[str]] = facts.get("categories") or {}
    if isinstance(inputs, dict) and inputs.keys() == {"numbers", "categories"}:
        columns = _numbers(inputs["numbers"], [name for name in names if name not in categories])
        for (name, known), codes in zip(categories.items(), inputs["categories"].T.tolist()):
            own = [text(known[code]) if 0 <= code < len(known) else "unknown" for code in codes]
            columns.append((text(name), own))
        return columns[:COLUMNS]
    if isinstance(inputs, Tensor):
        shape = inputs.shape[1:]
        if len(shape) == 3 and shape[0] in (1, 3):
            return [("picture", _pictures(inputs, told))]
        if len(shape) == 2 and shape[1] >= LEAST_LENGTH:
            return [("series", [_series(own, alt) for own, alt in zip(inputs, told)])]
        if len(shape) == 1:
            return _numbers(inputs, names)[:COLUMNS]
        if len(shape) == 0:
            return _numbers(inputs[:, None], names)
    shapes = tuple(first(inputs).shape[1:])
    return [("input", [f"not drawn, of shape {shapes}"] * len(told))]


def _numbers(values: Tensor, names: list[str]) -> list[tuple[str, list[str]]]:
    if len(names) != values.shape[1]:
        names = ["x"] if values.shape[1] == 1 else [f"x{number}" for number in range(values.shape[1])]
    return [
        (text(name), [f"{value:.4g}" for value in own])
        # what is scaled and scaled back again is off by rounding
        for name, own in zip(names[:COLUMNS], _rounded(values).T[:COLUMNS].tolist())
    ]


def _rounded(values: Tensor) -> Tensor:
    """Numbers that are nothing beside the largest of their column are 0."""
    return values.where(values.abs() > NOTHING * values.abs().amax(0), 0.0)


def _pictures(inputs: Tensor, told: list[str]) -> list[str]:
    """Images as img elements that hold their pixels. inputs: (examples, channels, height, width)."""
    image = pillow()
    low, high = float(inputs.min()), float(inputs.max())
    found = []
    for pixels, alt in zip(inputs.double(), told):
        own = ((pixels - low) / max(high - low, 1e-12) * 255).round().to(torch.uint8)
        array = own[0].numpy() if len(own) == 1 else own.permute(1, 2, 0).contiguous().numpy()
        file = io.BytesIO()
        image.fromarray(array).save(file, format="PNG", optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        height, width = own.shape[1:]
        side = max(1, round(56 * width / height))
        small = ' class="small"' if height < 56 else ""
        found.append(
            f'<img{small} alt="{alt}" width="{side}" height="56" src="data:image/png;base64,{data}">'
        )
    return found


def _series(channels: Tensor, alt: str) -> str:
    """A series (channels, time) as a small plot."""
    low, high = float(channels.min()), float(channels.max())
    lines = []
    for number, values in enumerate(channels[: len(COLOURS)]):
        x = torch.linspace(1, WIDTH - 1, len(values)).tolist()
        y = (HEIGHT - 2 - (values.double() - low) / max(high - low, 1e-12) * (HEIGHT - 4)).tolist()
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
        lines.append(f'<polyline points="{points}" style="stroke:{COLOURS[number]}"/>')
    return (
        f'<svg class="series" role="img" aria-label="{alt}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}">{"".join(lines)}</svg>'
    )


def _spread(count: int, most: int) -> list[int]:
    """So many numbers below `count` at most, spread evenly: of a query set that stands class by class some of each."""
    return sorted({round(number) for number in torch.linspace(0, count - 1, min(count, most)).tolist()})
