"""One thread at a time uses a model: while a task runs, its tensors stand in the module itself."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def turn_of(model: nn.Module) -> threading.RLock:
    """The lock of a model, held by each call that reads or runs it; the thread that holds it may take it again."""
    with _making:
        return _locks.setdefault(model, threading.RLock())
