# SPDX-License-Identifier: Apache-2.0
"""When to ask a failing host again: the one retry policy.

The fetch threads use Backoff alone, since the engine keeps their queue; whoever wants one read
and can wait uses Retrying.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.errors import BlockdevError, SourceError
from blockdev.source import Source, Spilled

FIRST_DELAY = 0.2  # seconds: a dropped connection is often good again at once
DELAY_MAX = 3.0  # a registry that is back is noticed within this
JITTER = 0.25  # of a delay, added at random: nodes that failed together do not return together
TOLD_MAX = 60.0  # of a Retry-After: no server gets to stop us for longer
LIMITED_INTERVAL = 1.0  # between requests to a host that told us to wait


@dataclass
class _Host:
    failures: int = 0  # in a row, simultaneous ones counted once
    until: float = 0.0  # nothing is to be asked before this
    limited: bool = False  # it told us to wait, and has not answered well since


class Backoff:
    """How long to leave each host alone. Shared by all that talk to it; thread-safe; times are monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    def admit(self, host: str) -> float:
        """Call before each request. 0: send it now; else seconds to wait before asking here again.

        While a host limits us, 0 is given to one caller a second.
        """
        with self._lock:
            state = self._hosts.get(host)
            if state is None:
                return 0.0
            now = self._clock()
            if now < state.until:
                return state.until - now
            if state.limited:
                state.until = now + LIMITED_INTERVAL
            return 0.0

    def failed(self, host: str, error: BlockdevError) -> float:
        """A request failed: seconds until it makes sense to try it again. Honours Retry-After."""
        with self._lock:
            state = self._hosts.setdefault(host, _Host())
            now = self._clock()
            if now >= state.until:
                state.failures += 1
                delay = min(FIRST_DELAY * 2 ** min(state.failures - 1, 30), DELAY_MAX)
                state.until = now + delay * (1 + random.uniform(0, JITTER))
            told = error.retry_after if isinstance(error, SourceError) else None
            if told is not None:
                state.limited = True
                state.until = max(state.until, now + min(max(told, LIMITED_INTERVAL), TOLD_MAX))
            return state.until - now

    def succeeded(self, host: str) -> None:
        """A request got what it wanted."""
        if host in self._hosts:  # without the lock: the usual case must stay cheap
            with self._lock:
                self._hosts.pop(host, None)


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
            except SourceError as error:
                self._pause(error, deadline)
            else:
                self._backoff.succeeded(self.host)
                return

    def probe(self, deadline: float) -> None:
        """As Source.probe(): once."""
        self._source.probe(deadline)

    def _await_turn(self, deadline: float) -> None:
        while delay := self._backoff.admit(self.host):
            if time.monotonic() + delay > deadline:
                raise SourceError(
                    f"reading a blob failed: {self.name}: {self.host} is to be left alone for {delay:.0f} s"
                )
            self._sleep(delay)

    def _pause(self, error: SourceError, deadline: float) -> None:
        delay = self._backoff.failed(self.host, error)
        if time.monotonic() + delay > deadline:
            raise error
