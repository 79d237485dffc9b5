"""Progress for people: bars in a terminal, plain lines in a log.

Everything goes to the ``pipelines`` logger (standard error in the command line tool, the run's log in Prefect), so
standard output stays free for results.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_SECONDS_BETWEEN_LINES = 10.0


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; its records reach the terminal and Prefect's run log."""
    return logging.getLogger(name)


def configure_logging() -> None:
    """Send the ``pipelines`` and ``deconv_model`` loggers to standard error, one plain line a record."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    for name in ("pipelines", "deconv_model"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


class Bar(Protocol):
    """What :func:`progress` yields."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count ``amount`` more units as done."""

    def set(self, completed: float, note: str = "") -> None:
        """Say that ``completed`` units are done in all."""


class _Lines:
    """Writes a line now and then: at the end, and at most every few seconds before."""

    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._completed = 0.0
        self._last_line = self._start = time.monotonic()
        self._log = get_logger("pipelines.progress")

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.set(self._completed + amount, note)

    def set(self, completed: float, note: str = "") -> None:
        done_now = completed >= self._total > self._completed
        self._completed = completed
        now = time.monotonic()
        if done_now or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            counted = f"{completed:,.0f}/{self._total:,.0f} {self._unit}"
            suffix = f"  {note}" if note else ""
            self._log.info("[%s] %s after %.0f s%s", self._label, counted, now - self._start, suffix)


class _RichBar:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=amount, note=note)

    def set(self, completed: float, note: str = "") -> None:
        self._bars.update(self._task, completed=completed, note=note)


@contextmanager
def progress(label: str, *, total: float, unit: str) -> Iterator[Bar]:
    """Show how far a piece of work is.

    Args:
        label: Name of the step.
        total: Units to do in all.
        unit: What is counted, in the plural.

    Yields:
        A bar; it may be advanced from any thread.
    """
    if not sys.stderr.isatty():
        yield _Lines(label, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(f"{label:>9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _RichBar(bars, bars.add_task(label, total=total, note=""))
