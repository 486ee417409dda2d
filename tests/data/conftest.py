import logging

import pytest


@pytest.fixture
def said(caplog):
    """What the library has logged since it was last asked, from information on: a list of (level, line)."""
    caplog.set_level(logging.INFO, "fomaml")

    def lines():
        found = [(record.levelname, record.getMessage()) for record in caplog.records]
        caplog.clear()
        return found

    return lines
