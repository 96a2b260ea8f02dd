# SPDX-License-Identifier: Apache-2.0
"""A blob in a local file, as a Source."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from blockdev.engine import Fetch
from blockdev.errors import SourceError
from blockdev.source import PROGRESS_SIZE

_PIECE = 16 * PROGRESS_SIZE  # a deadline is looked at this often; a slow disk does it in 10 ms


class FileSource:
    """Reads a descriptor that stays its opener's to close. The file must not change."""

    def __init__(self, fd: int, size: int, name: str) -> None:
        """`size` is the blob's: a shorter file shows when its end is read."""
        self._fd = fd
        self.size = size
        self.name = name
        self.host = name  # nobody else's failures say anything about this file

    def read_into(self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]) -> None:
        """As Source.read_into()."""
        filled = 0
        while filled < len(buffer):
            if time.monotonic() > deadline:
                raise SourceError(f"reading a file failed: {self.name}: no time left")
            filled += self._read(offset + filled, buffer[filled : filled + _PIECE])
            progress(filled)

    def fill(self, fetch: Fetch, deadline: float) -> bool:
        """As Source.fill(): never."""
        return False

    def probe(self, deadline: float) -> None:
        """As Source.probe()."""
        if self.size:
            self._read(self.size - 1, memoryview(bytearray(1)))

    def _read(self, offset: int, into: memoryview) -> int:
        try:
            count = os.preadv(self._fd, [into], offset)
        except OSError as error:
            raise SourceError(f"reading a file failed: {self.name} at {offset}: {error.strerror}") from None
        if count == 0:
            raise SourceError(f"reading a file failed: {self.name} at {offset}: it ends before {self.size} bytes")
        return count
