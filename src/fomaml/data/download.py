"""How torchvision's own downloads are kept short, quiet and whole."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

log = logging.getLogger(__name__)
SECONDS = 2.0  # for a mirror to answer; a download may stall five times as long


@contextlib.contextmanager
def downloading(name: str, folder: Path, mirrors: list[str], file: str) -> Iterator[Path]:
    """A temporary folder in `folder` to download to, once a mirror has answered for `file`; move what is whole.

    Within the block torchvision's progress bars are swallowed, and a stalled connection ends.

    Raises:
        OSError: no mirror answers soon.
    """
    await_answer(mirrors, file)
    log.info("downloading %s to %s", name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5 * SECONDS)  # torchvision sets none: a stalled download never ends
    quiet = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory(dir=folder) as place,
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            yield Path(place)
    finally:
        socket.setdefaulttimeout(timeout)


def await_answer(mirrors: list[str], file: str) -> None:
    """Raise OSError unless a mirror answers soon.

    In a thread, since no timeout bounds the look-up of a host's name.
    """
    answered = []

    def ask():
        for mirror in mirrors:
            try:
                with urlopen(Request(mirror + file, method="HEAD"), timeout=SECONDS):
                    return answered.append(mirror)
            except HTTPError as error:
                error.close()
            except Exception:  # refused, timed out, nonsense: no answer here
                continue

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * SECONDS)
    if not answered:
        raise OSError(f"no answer from {' or '.join(mirrors)}")
