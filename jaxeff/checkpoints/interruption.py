"""When an interruption (Ctrl-C) is heard. Imports nothing of jaxeff."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def held() -> Iterator[Callable[[], None]]:
    """Gives a function to call where an interruption may be heard; it is also heard at the end.

    While JAX traces or compiles, an interruption may come in a callback that loses it, or leave behind what
    crashes the interpreter as it exits. A second interruption is heard at once. Does nothing where Python
    itself does not turn interruptions into KeyboardInterrupt, and outside the main thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    is_pending = False

    def hold(number: int, frame: object) -> None:
        nonlocal is_pending
        is_pending = True
        _ = signal.signal(signal.SIGINT, signal.default_int_handler)

    def hear() -> None:
        if is_pending:
            raise KeyboardInterrupt

    _ = signal.signal(signal.SIGINT, hold)
    try:
        yield hear
    finally:
        _ = signal.signal(signal.SIGINT, signal.default_int_handler)
    hear()
