"""Ctrl-C after what is charged has been saved, in place of in between."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held(then: str) -> Iterator[Callable[[], bool]]:
    """Within the block the first signal that would raise KeyboardInterrupt only turns the yielded question true, and raises it at
    the block's end, if not the block itself before; a second one raises it at once.

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
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True
        logger.info("\ninterrupted: %s; once more stops at once", then)

    for number in held:
        signal.signal(number, hold)
    try:
        yield lambda: pressed
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
