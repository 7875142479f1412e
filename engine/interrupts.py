"""Stopping a long job without losing work: signals, and when to save."""

import os
import signal
import threading
import time

from engine import distributed


class TrainingInterrupted(KeyboardInterrupt):
    """Training was asked to stop and has; the message says how to resume."""


class StopSignals:
    """In the `with` block, the first Ctrl-C or SIGTERM requests a stop, the second stops at once.

    `immediate` is set while stopping at once loses nothing: then the first stops at once, too.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self.immediate = False

    def __enter__(self) -> "StopSignals":
        self.previous = {}
        # Only Python's main thread gets signals and may set handlers.
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, *_: object) -> None:
        # A second Ctrl-C stops at once: the last saved state is on disk.
        if self.requested or self.immediate:
            for number in self.SIGNALS:  # a third signal must not disturb the exit
                signal.signal(number, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.requested = True  # the training loop checks this after each step
        if distributed.rank() == 0:
            # Not print(): the signal may have interrupted one that holds the stream's lock.
            os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


class SaveTimer:
    """Whether it is time to save: "500" is every 500 steps, "10m" every 10 minutes, "0" never."""

    def __init__(self, interval: str, step: int):
        self.steps = 0 if interval.endswith("m") else int(interval)
        self.seconds = 60 * int(interval[:-1]) if interval.endswith("m") else 0
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from this step on."""
        self.step, self.time = step, time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Whether the interval is over."""
        # Minutes by a clock that changes of the system time do not affect.
        if self.steps:
            return step - self.step >= self.steps
        return bool(self.seconds) and time.perf_counter() - self.time >= self.seconds
