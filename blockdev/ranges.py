# SPDX-License-Identifier: Apache-2.0
"""Ranges of a file: where there is data in it, and writing one whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator


def write_at(fd: int, content: bytes | memoryview, offset: int) -> int:
    """All of the content, from offset on; its length. pwrite() may take less at a time. OSError."""
    view = memoryview(content)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def data_ranges(fd: int, size: int, at: int = 0) -> Iterator[tuple[int, int]]:
    """Start and end of each run of data in a regular file, from `at` to `size`; the rest is holes. OSError."""
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # which says that only a hole is left
                raise
            return
        at = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        if start < at:
            yield start, at
