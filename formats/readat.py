# SPDX-License-Identifier: Apache-2.0
"""Random access to immutable bytes: the interface parsers read through.

Promises: read_at returns exactly `length` bytes or raises; nothing is written, so one
object may serve several threads. Who implements it over a file or a cache may raise
errors of its own for I/O; a range outside the object is always a FormatError.
"""

from __future__ import annotations

from typing import Protocol

from formats.errors import FormatError


class ReadAt(Protocol):
    """Immutable bytes by offset. Safe to call from several threads."""

    @property
    def size(self) -> int:
        """Bytes in all."""
        ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; FormatError if the range leaves the object."""
        ...


class BytesAt:
    """ReadAt over bytes in memory (or anything that slices to bytes, such as a read-only mmap)."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    @property
    def size(self) -> int:
        return len(self._content)

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.size)
        return self._content[offset : offset + length]


class Window:
    """`size` bytes of `source` from `base`, as an object of its own."""

    def __init__(self, source: ReadAt, base: int, size: int) -> None:
        check_range(base, size, source.size)
        self._source = source
        self._base = base
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self._size)
        return self._source.read_at(self._base + offset, length)


def check_range(offset: int, length: int, size: int) -> None:
    """FormatError unless [offset, offset + length) lies within [0, size)."""
    if offset < 0 or length < 0 or offset + length > size:
        raise FormatError(f"{length} bytes wanted, the object ends at {size}", offset)
