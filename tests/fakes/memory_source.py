# SPDX-License-Identifier: Apache-2.0
"""A source whose blob is in memory, and which can be told to fail, to hang and to recover."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from blockdev.engine import Fetch
from blockdev.errors import SourceError

_PIECE = 64 << 10


class MemorySource:
    """Source over bytes. `failures` are raised by the next reads; `gate`, while clear, holds reads."""

    def __init__(self, content: bytes, name: str = "memory") -> None:
        self.content = content
        self.name = name
        self.host = name
        self.well = True
        self.failures: deque[Exception] = deque()
        self.gate = threading.Event()
        self.gate.set()
        self.reads: list[tuple[int, int]] = []
        self.probes = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        self.reads.append((offset, len(buffer)))
        if time.monotonic() > deadline or not self.gate.wait(deadline - time.monotonic()):
            raise SourceError(f"read: {self.name}: timed out")
        if self.failures:
            raise self.failures.popleft()
        self._check()
        for start in range(0, len(buffer), _PIECE):
            piece = self.content[offset + start :][: min(_PIECE, len(buffer) - start)]
            buffer[start : start + len(piece)] = piece
            progress(start + len(piece))

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        return False

    def probe(self, deadline: float) -> None:
        self.probes += 1
        self._check()

    def _check(self) -> None:
        if not self.well:
            raise SourceError(f"read: {self.name}: it is down")
