"""One thread at a time uses a model: while a task runs, its tensors stand in the module itself."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


def turn_of(model: nn.Module) -> threading.RLock:
    """The lock of a model, held by each call that reads or runs it; the thread that holds it may take it again."""
    with _making:
        return _locks.setdefault(model, threading.RLock())


def in_turn(function: Function) -> Function:
    """A function whose first argument is a learner, or has one as `learner`, and which waits for the model's turn."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("learner")
        model = getattr(getattr(first, "learner", first), "model", None)
        with turn_of(model) if isinstance(model, nn.Module) else nullcontext():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
