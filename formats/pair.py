# SPDX-License-Identifier: Apache-2.0
"""The append-only read-write pair: writing one, replaying its log, sealing it.

The data file holds payloads in the order of the writes, the index file their entries in
the same order; a later entry overrides an earlier one. docs/formats/lsmt.md.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace

from formats.errors import FormatError
from formats.lsmt import (
    ENTRY_SIZE,
    HEAD_SECTORS,
    HEAD_SIZE,
    IS_SPARSE,
    LENGTH_MAX,
    LOG_DATA_HEADER,
    LOG_INDEX_HEADER,
    SEALED_TRAILER,
    SECTOR,
    Head,
    Segment,
    pack,
    pack_segment,
)

_WRITE_SECTORS_MAX = 8192  # 4 MiB: where overlaybd splits a write


class PairWriter:
    """Appends to a new pair through two write functions. Offsets and lengths in sectors. Not thread-safe."""

    def __init__(self, data: Callable[[bytes], object], index: Callable[[bytes], object], head: Head) -> None:
        self._data = data
        self._index = index
        self._end = HEAD_SECTORS
        self._data(replace(head, flags=LOG_DATA_HEADER, index_offset=0, index_count=0).build())
        self._index(replace(head, flags=LOG_INDEX_HEADER, index_offset=HEAD_SIZE, index_count=0).build())

    def write(self, offset: int, content: bytes) -> None:
        """Whole sectors at `offset`."""
        if len(content) % SECTOR:
            raise FormatError(f"{len(content)} bytes are no whole sectors")
        step = _WRITE_SECTORS_MAX * SECTOR
        for start in range(0, len(content), step):
            part = content[start : start + step]
            length = len(part) // SECTOR
            self._data(part)
            self._index(pack_segment(Segment(offset + start // SECTOR, length, self._end, False, 0)))
            self._end += length

    def discard(self, offset: int, length: int) -> None:
        """Make sectors read as zeros, whatever lies below."""
        for start in range(offset, offset + length, LENGTH_MAX):
            part = min(LENGTH_MAX, offset + length - start)
            self._index(pack_segment(Segment(start, part, self._end, True, 0)))


def replay(entries: Iterable[Segment]) -> list[Segment]:
    """The live map: sorted, without overlaps. Later entries win; neighbours are not joined.

    A stack flattens the same way: all entries of the bottom layer, then of the one above.
    """
    live: list[Segment] = []
    for entry in entries:
        if not entry.length:
            continue
        first = bisect_right(live, entry.offset, key=_end)
        last = bisect_left(live, entry.end, key=_offset)
        kept = [entry]
        if first < last and live[first].offset < entry.offset:
            kept.insert(0, live[first].cut(0, entry.offset))
        if first < last and live[last - 1].end > entry.end:
            kept.append(live[last - 1].cut(entry.end, live[last - 1].end))
        live[first:last] = kept
    return live


def _end(segment: Segment) -> int:
    return segment.end


def _offset(segment: Segment) -> int:
    return segment.offset


def seal(head: Head, data_size: int, live: Iterable[Segment]) -> bytes:
    """What sealing appends to a data file of `data_size` bytes whose header is `head`: index, then trailer.

    overlaybd leaves rubbish between the two, up to 512 bytes of alignment; here it is zeros.
    """
    table = pack(live)
    trailer = replace(
        head,
        flags=SEALED_TRAILER | head.flags & IS_SPARSE,
        index_offset=data_size,
        index_count=len(table) // ENTRY_SIZE,
    )
    return table + bytes(-len(table) % SECTOR) + trailer.build()
