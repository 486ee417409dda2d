"""Each situation of the table says what docs/refusals.md says, in one line that names the cure."""

import re

import pytest

from refusals import KINDS, PAGE, ROWS, page, told


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_it_is_told(row):
    text = told(row)
    assert "\n" not in text and len(text) >= 15 and text[-1] not in ".!"


def test_the_page_is_of_this_table():
    """`python tests/refusals.py` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()
    assert {row.kind for row in ROWS} == set(KINDS)
    situations = [row.what for row in ROWS]
    assert len(set(situations)) == len(situations)
    assert not re.search(r"/tmp|0x[0-9a-f]{6}", page())
