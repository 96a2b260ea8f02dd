# SPDX-License-Identifier: Apache-2.0
"""How long each host is to be left alone: kept once, for all that talk to it.

Two reasons to wait. A host that fails is asked again after a delay that doubles; whoever asks by
himself (the fetch threads, the probe) waits for it, a person's command tries once. A host that
told us to wait (429, 503, Retry-After) is asked by nobody before its time, and from then on once
a second until it answers well: every request passes admit() (blockdev/registry/exchange.py).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.errors import BlockdevError, SourceError

FIRST_DELAY = 0.2  # seconds: a dropped connection is often good again at once
DELAY_MAX = 3.0  # a registry that is back is noticed within this
JITTER = 0.25  # of a delay, added at random: nodes that failed together do not return together
TOLD_MAX = 60.0  # of a Retry-After: no server gets to stop us for longer
LIMITED_INTERVAL = 1.0  # between requests to a host that told us to wait


class LeftAlone(SourceError):
    """Nothing was asked: the host is to be left alone for `retry_after` seconds more."""

    def __init__(self, text: str, *, seconds: float = 0.0) -> None:
        super().__init__(text, retry_after=seconds)
        self.seconds = seconds


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

    def waiting(self, host: str) -> float:
        """Seconds until it makes sense to ask the host; 0 for now. Takes no turn."""
        state = self._hosts.get(host)  # without the lock: the usual case must stay cheap
        return max(0.0, state.until - self._clock()) if state else 0.0

    def admit(self, host: str) -> float:
        """Call before each request. 0: send it now; else seconds to wait before asking here again.

        Only a host that limits us is waited for; then 0 is given to one caller a second.
        """
        if host not in self._hosts:
            return 0.0
        with self._lock:
            state = self._hosts.get(host)
            if state is None or not state.limited:
                return 0.0
            now = self._clock()
            if now < state.until:
                return state.until - now
            state.until = now + LIMITED_INTERVAL
            return 0.0

    def failed(self, host: str, error: BlockdevError) -> float:
        """A request failed: seconds until it makes sense to try it again. Honours Retry-After.

        The error may name another host, which the first one sent us to.
        """
        if not isinstance(error, SourceError):
            return self._leave(host, None)
        return self._leave(error.host or host, error.retry_after)

    def told(self, host: str, seconds: float) -> None:
        """The host wants to be left alone for so long."""
        self._leave(host, seconds)

    def answered(self, host: str) -> None:
        """The host answered, with whatever; it does not limit us any more."""
        state = self._hosts.get(host)
        if state and state.limited:
            with self._lock:
                state.limited = False
                state.until = self._clock()

    def succeeded(self, host: str) -> None:
        """A request got what it wanted."""
        if host in self._hosts:
            with self._lock:
                self._hosts.pop(host, None)

    def _leave(self, host: str, told: float | None) -> float:
        with self._lock:
            state = self._hosts.setdefault(host, _Host())
            now = self._clock()
            if now >= state.until:
                state.failures += 1
                delay = min(FIRST_DELAY * 2 ** min(state.failures - 1, 30), DELAY_MAX)
                state.until = now + delay * (1 + random.uniform(0, JITTER))
            if told is not None:
                state.limited = True
                state.until = max(state.until, now + min(max(told, LIMITED_INTERVAL), TOLD_MAX))
            return state.until - now
