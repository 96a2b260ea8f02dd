# SPDX-License-Identifier: Apache-2.0
"""How results and progress look: JSON with a version, or columns for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blockdev.cli import stdio

Show = Callable[[int, int], None]  # bytes done, bytes in all

VERSION = 1  # of every JSON object we print
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PROGRESS_AFTER = 1.0  # seconds: shorter work needs no progress
_PROGRESS_EVERY = 0.2  # seconds


def print_json(result: Mapping[str, Any]) -> None:
    """The result as one line of JSON."""
    print(json.dumps({"v": VERSION, **result}), flush=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows in columns as wide as they need to be; the first is the heading. A row is one line whatever is in it."""
    rows = [[stdio.printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_notice(line: str) -> None:
    """Something to know that is no result."""
    stdio.say(line)


def size(count: int) -> str:
    """Bytes as people read them: 1.5 GiB."""
    number, unit = float(count), 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{number:.1f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Whole seconds as people read them: 1:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Transfer:
    """How far, how fast and for how long yet: a line on stderr while a pull runs, if that is a terminal.

    What was here at the start counts as done, but not for the rate.
    """

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()
        self._first = -1

    def show(self, at: Mapping[str, int]) -> None:
        """at: bytes done (here), checked, and total."""
        self._first = at["done"] if self._first < 0 else self._first
        now = time.monotonic()
        if not sys.stderr.isatty() or now - self._started < _PROGRESS_AFTER or now - self._last < _PROGRESS_EVERY:
            return
        self._last = now
        if at["done"] == at["total"]:
            line = f"checked {size(at['checked'])} of {size(at['total'])}"
        else:
            rate = (at["done"] - self._first) / (now - self._started)
            left = f", {duration((at['total'] - at['done']) / rate)} left" if rate else ""
            line = f"pulled {size(at['done'])} of {size(at['total'])}, {size(round(rate))}/s{left}"
        stdio.show_progress(line)


def progress(verb: str) -> Show:
    """show(done, total) bytes of long work, on stderr, if that is a terminal."""
    started = last = time.monotonic()
    shown = (-1, -1)
    verb = stdio.printable(verb)

    def show(done: int, total: int) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if now - started < _PROGRESS_AFTER or (done, total) == shown:  # the end is often told twice
            return
        if now - last >= _PROGRESS_EVERY or done == total:
            last, shown = now, (done, total)
            line = f"{verb} {size(done)} of {size(total)}" if total else f"{verb} {size(done)}"
            stdio.show_progress(line, last=done == total)

    return show if sys.stderr.isatty() else lambda done, total: None
