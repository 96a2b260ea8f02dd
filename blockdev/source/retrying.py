# SPDX-License-Identifier: Apache-2.0
"""Trying again: the one retry policy. When, is blockdev/registry/backoff.py's matter.

The fetch threads need none of this, since the engine keeps their queue. Whoever wants one read
and can wait uses Retrying; whoever wants one answer of a registry uses patiently().
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from blockdev.engine import Fetch
from blockdev.errors import SourceError
from blockdev.registry.backoff import Backoff, LeftAlone
from blockdev.source import Source, Spilled

Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer], deadline: float, sleep: Callable[[float], object] = time.sleep) -> Answer:
    """ask(), and again as long as its host only tells us to wait and there is time. `deadline` is monotonic.

    Any other failure is the caller's at once: a person waits for it.
    """
    while True:
        try:
            return ask()
        except SourceError as error:
            if error.retry_after is None or time.monotonic() + error.retry_after > deadline:
                raise
            sleep(error.retry_after)


class Retrying:
    """A source whose reads try again until their deadline. For callers that may block that long."""

    def __init__(self, source: Source, backoff: Backoff, sleep: Callable[[float], object] = time.sleep) -> None:
        self._source = source
        self._backoff = backoff
        self._sleep = sleep
        self.name = source.name
        self.host = source.host
        self.size = source.size

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        """As Source.read_into(); what one attempt has filled is not asked for again."""
        filled = 0

        def advance(count: int) -> None:
            nonlocal filled
            filled = start + count
            progress(filled)

        while True:
            start = filled
            self._await_turn(deadline)
            try:
                self._source.read_into(offset + start, buffer[start:], deadline=deadline, progress=advance)
            except Spilled:
                raise
            except LeftAlone as error:
                self._pause(error, error.seconds, deadline)
            except SourceError as error:
                self._pause(error, self._backoff.failed(self.host, error), deadline)
            else:
                self._backoff.succeeded(self.host)
                return

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        """As Source.fill(): never, since what it asks cannot be asked again."""
        return False

    def probe(self, deadline: float) -> None:
        """As Source.probe(): once."""
        self._source.probe(deadline)

    def _await_turn(self, deadline: float) -> None:
        while delay := self._backoff.waiting(self.host):
            text = f"reading a blob failed: {self.name}: {self.host} is to be left alone for {delay:.0f} s"
            self._pause(LeftAlone(text, seconds=delay), delay, deadline)

    def _pause(self, error: SourceError, delay: float, deadline: float) -> None:
        if time.monotonic() + delay > deadline:
            raise error
        self._sleep(delay)
