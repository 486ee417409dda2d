"""A function in a fresh process of its own, which ends with the one that started it, whatever ends that."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait

import torch

from fomaml.app.launch import launched
from fomaml.app.wording import spoken
from fomaml.errors import InputError

LAST_WORDS = 30.0  # seconds for the step at hand and its state


def isolated(function: Callable[..., dict], *arguments) -> dict:
    """The result of a module's function in a fresh process, or {"failed": why}."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    threads = launched().threads() or torch.get_num_threads()
    process = context.Process(target=_answer, args=(sender, function, arguments, threads), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"failed": f"its process ended with status {process.exitcode}"}
    finally:
        receiver.close()
        process.terminate()  # a training saves its state first
        process.join()


def _answer(sender, function, arguments, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = function(*arguments, threads=threads)
    except (InputError, RuntimeError, MemoryError) as error:
        answer = {"failed": spoken(" ".join(f"{error or type(error).__name__}".split()))}
    except KeyboardInterrupt:  # as the parent asked
        return
    try:
        sender.send(answer)
    except BrokenPipeError:  # the parent has ended
        return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS)
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
