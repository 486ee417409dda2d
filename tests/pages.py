"""The pages of documentation and their blocks of code, as they stand."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(path for path in sorted(ROOT.glob("docs/*.md")) if path.name != "LOG.md"),
]


class Block(NamedTuple):
    """One block. line: of its fence, from 1. language: "python", "sh", or "" for what is printed.

    excuse: why the tests do not run it, as the page says in a comment before it; "" if they do.
    """

    line: int
    language: str
    code: str
    excuse: str


FENCED = re.compile(r"(?:^<!-- not run: ([^\n]*) -->\n)?^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text, language=None):
    """The blocks of a page in order, or those of one language."""
    found = [
        Block(text[: match.start(2)].count("\n") + 1, match[2], match[3], match[1] or "")
        for match in FENCED.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def read(page):
    """The text of a page, by its path from the repository."""
    return (ROOT / page).read_text(encoding="utf-8")
