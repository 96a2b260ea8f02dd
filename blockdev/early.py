# SPDX-License-Identifier: Apache-2.0
"""What comes of a blob before the table that it is to be held against.

A registry that ignores ranges sends the whole blob to whoever wants its end, where the table is.
So that this body is the only one, it lies in a file without a name until the table has judged it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from blockdev.ownfile import open_nameless
from blockdev.ranges import write_at
from formats.digests import UNIT

log = logging.getLogger(__name__)

_AT_ONCE = 4 * UNIT  # bytes of one piece that is read back


class Early:
    """The bytes of one body, in order. Where they cannot be kept (a full disk), nothing is. For one thread: nobody
    else reads of a blob before its table is there."""

    def __init__(self, folder: Path, size: int) -> None:
        """`size`: of the blob; `folder`: where its cache's files are."""
        self._folder = folder
        self._size = size
        self._fd = -1
        self._kept = 0  # bytes from the blob's start

    def put(self, offset: int, content: memoryview) -> None:
        """The next bytes; from offset 0 on those of another body."""
        if offset and offset != self._kept:
            return
        try:
            if self._fd < 0:
                self._fd = open_nameless(self._folder)
            self._kept = offset + write_at(self._fd, content, offset)
        except OSError as error:
            log.info("no room for what comes before a digest table: %s", error.strerror)
            self._drop()

    @property
    def whole(self) -> bool:
        """Whether all of the blob is here."""
        return self._kept == self._size

    def taken(self) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes of a whole blob: whole units, the last first, and what is taken leaves its room to the
        cache. What the disk does not give back is left out."""
        for offset in reversed(range(0, self._size, _AT_ONCE)):
            try:
                piece = os.pread(self._fd, _AT_ONCE, offset)
                os.ftruncate(self._fd, offset)
            except OSError as error:
                log.warning("what came before a digest table is not read again: %s", error.strerror)
            else:
                yield offset, memoryview(piece)

    def _drop(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._kept = -1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._drop()
