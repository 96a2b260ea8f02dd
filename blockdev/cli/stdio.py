# SPDX-License-Identifier: Apache-2.0
"""The three standard streams, whatever the caller has made of them.

settle() comes first of all. What a caller has closed is the null device from then on, so no file
of ours takes its number. What stdout does not take is an error as any other, but for a reader that
leaves: BrokenPipeError. What cannot be said on stderr is not said: there is nobody left to tell.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

from blockdev.errors import UsageError, from_os

_NAMES = ("stdin", "stdout", "stderr")
_closed: set[str] = set()  # by our caller, before we began
_shows_progress = False  # a line of it stands on stderr, and the cursor behind it


def settle() -> None:
    """Have all three open, and sys.stdout report what happens to it."""
    ours = sys.stdout is sys.__stdout__  # not a test's
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            _closed.add(name)
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, _opened(number))
    if ours:
        old = sys.stdout
        raw = io.BufferedWriter(_Stdout(1, "w", closefd=False))
        # A name need not be text, nor what the terminal can show.
        sys.stdout = io.TextIOWrapper(raw, old.encoding, "backslashreplace", line_buffering=old.isatty())


def _opened(number: int) -> TextIO:
    return open(number, "w" if number else "r", encoding="utf-8", errors="backslashreplace", closefd=False)


class _Stdout(io.FileIO):
    """Descriptor 1. After a failure it leads nowhere, or the interpreter would fail once more in the end."""

    def write(self, content: Any, /) -> int:
        clear_progress()
        try:
            return super().write(content)
        except OSError as error:
            _abandon(1)
            if isinstance(error, BrokenPipeError):
                raise
            raise from_os("writing the result failed", error, "stdout") from None


def content_stream(name: str, doing: str, *, terminal: bool = False) -> int:
    """The descriptor of stdin or stdout for a file's content. UsageError if it is closed, or a terminal unasked."""
    number = _NAMES.index(name)
    why = "it is closed" if name in _closed else "it is a terminal" if os.isatty(number) and not terminal else ""
    if why:
        raise UsageError(f"{doing} failed: {name}: {why}")
    return number


def tell(text: str) -> None:
    """Write to stderr, at once, and in place of a line of progress."""
    clear_progress()
    _write(text)


def show_progress(line: str, *, last: bool = False) -> None:
    """A line in place of the one before; what is told next takes its place, but that of the last one."""
    global _shows_progress
    _write(f"\r\033[K{line}" + ("\n" if last else ""))
    _shows_progress = not last


def clear_progress() -> None:
    """Take its line away: something else follows."""
    global _shows_progress
    if _shows_progress:
        _shows_progress = False
        _write("\r\033[K")


def _write(text: str) -> None:
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        _abandon(2)


def say(line: str) -> None:
    """One line to stderr, as all of ours look."""
    tell(f"ociblk: {printable(' '.join(line.split()))}\n")


def printable(text: str) -> str:
    """On one line, and nothing that speaks to a terminal: what does not print is escaped as in C."""
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is no text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _abandon(number: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, number)
    os.close(null)
