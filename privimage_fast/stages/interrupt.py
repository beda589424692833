"""Ctrl-C after what is charged has been saved, in place of in between."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held(then: str) -> Iterator[Callable[[], bool]]:
    """Within the block a signal that would raise KeyboardInterrupt only turns the yielded question true; at the block's end it is
    raised, unless the block has done so before. A second Ctrl-C raises it at once. SIGTERM never does: whole groups of processes
    get it from several sides.

    In other threads than the main one, and for signals that somebody else handles, nothing is changed.

    Args:
        then: what happens before it, for the message.
    """
    held = [s for s in SIGNALS if signal.getsignal(s) is signal.default_int_handler]
    if threading.current_thread() is not threading.main_thread() or not held:
        yield lambda: False
        return
    pressed = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        pressed = True
        os.write(2, f"\ninterrupted: {then}; Ctrl-C once more stops at once\n".encode())  # logging is not for signal handlers

    try:
        for number in held:
            signal.signal(number, hold)
        yield lambda: pressed
    except Exception as error:
        if pressed:  # a caller that goes on after errors is not to go on after this
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in held:
            signal.signal(number, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def terminating_interrupts() -> Iterator[None]:
    """Within the block SIGTERM, with which systems and batch queues end a job, interrupts as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
