# SPDX-License-Identifier: Apache-2.0
"""Sources: where the bytes of a blob come from when the cache has not got them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from blockdev.engine import Fetch
from blockdev.errors import SourceError

PROGRESS_SIZE = 64 << 10  # bytes between two calls of `progress`, at the least: the cache's extent

Offer = Callable[[int, memoryview], int]  # takes bytes at an offset that nobody asked for: how many extents it kept


class Source(Protocol):
    """One immutable blob, by offset. Thread-safe. A short read is an error, never a result."""

    @property
    def name(self) -> str:
        """What messages call the blob."""
        ...

    @property
    def host(self) -> str:
        """Whose failures are this source's failures too (blockdev/registry/backoff.py)."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        ...

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        """Fill the buffer from offset, which must lie within the blob.

        progress(n) says that the first n bytes of the buffer are right; it is called each time
        at least PROGRESS_SIZE more are, in the calling thread, the last time with the buffer's
        length. `deadline` is monotonic. SourceError (trying again may help), NotFound,
        AccessDenied; then what progress() reported stays right.
        """
        ...

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        """Have the engine get a fetch's bytes by itself, if that can be done now: True, all are there.
        False: none is, and read_into() is the way. The errors of read_into()."""
        ...

    def probe(self, deadline: float) -> None:
        """Return if the source can deliver now; the errors of read_into() if not. Costs it little."""
        ...


class Spilled(SourceError):
    """The bytes asked for went by in a stream that another read had started, and were spilled:
    look where the spill goes, and ask again, after `delay` seconds, only if they are not there."""

    def __init__(self, text: str, *, delay: float = 0.1) -> None:
        super().__init__(text)
        self.delay = delay


class Altered(SourceError):
    """Bytes came that are not the blob's. Names blob and offset. Asked for once more, they may be."""
