# SPDX-License-Identifier: Apache-2.0
"""The append-only read-write pair: writing one, replaying its log, compacting and sealing it.

The data file holds payloads in the order of the writes, the index file their entries in
the same order; a later entry overrides an earlier one. docs/formats/lsmt.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappop, heappush, merge
from itertools import islice, pairwise, starmap
from operator import itemgetter
from struct import Struct

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
        self._index(pack(zeros(offset, length, self._end)))


def zeros(offset: int, length: int, data_end: int) -> Iterator[Segment]:
    """The entries of a discard; all in sectors."""
    for start in range(offset, offset + length, LENGTH_MAX):
        yield Segment(start, min(LENGTH_MAX, offset + length - start), data_end, True, 0)


def replay(entries: Iterable[Segment]) -> list[Segment]:
    """The live map: sorted, without overlaps. Later entries win; neighbours are not joined.

    A stack flattens the same way: all entries of the bottom layer, then of the one above.
    """
    return list(replaying(entries))


def replaying(entries: Iterable[Segment]) -> Iterator[Segment]:
    """The same one after the other, once all entries were read: they take 31 bytes each, the map none."""
    # From the first sector to the last: the latest of the entries that cover a place shows, up to its end or
    # to where a later one begins.
    starts = _by_start(entries)
    start = next(starts, None)
    covering = _Covering()
    at = 0
    while True:
        covering.end(at)
        if not covering.heap:
            if not start:
                return
            at = start[1].offset
        while start and start[1].offset <= at:
            covering.add(start, at)
            start = next(starts, None)
        age, shown = covering.heap[0]
        end = shown.end
        while start and start[1].offset < end:
            if start[0] < age:
                end = start[1].offset
                break
            covering.add(start, at)
            start = next(starts, None)
        yield shown.cut(at, end)
        at = end


_Aged = tuple[int, Segment]  # of two entries, the later one has the smaller number
_START = Struct("<QiQQ?H")  # offset, number, length, moffset, zeroed, tag
_RUN = 1 << 14  # entries sorted at a time, as objects of some 400 bytes
_COVERING_MIN = 1 << 10  # entries that are kept, before it is looked at which of them can still show


def _by_start(entries: Iterable[Segment]) -> Iterator[_Aged]:
    """From the first sector to the last; of those that begin with the same one, the latest first."""
    numbered = (
        (entry.offset, -age, entry.length, entry.moffset, entry.zeroed, entry.tag)
        for age, entry in enumerate(entries)
        if entry.length
    )
    runs = []
    while run := sorted(islice(numbered, _RUN)):
        runs.append(b"".join(starmap(_START.pack, run)))
    for offset, number, length, moffset, zeroed, tag in merge(*map(_START.iter_unpack, runs)):
        yield number, Segment(offset, length, moffset, zeroed, tag)


class _Covering:
    """Entries that cover a place, the latest first in a heap; some have ended, or are hidden to their end."""

    def __init__(self) -> None:
        self.heap: list[_Aged] = []
        self._room = _COVERING_MIN

    def add(self, entry: _Aged, at: int) -> None:
        heappush(self.heap, entry)
        if len(self.heap) > self._room:
            self._drop_hidden(at)
            self._room = max(_COVERING_MIN, 2 * len(self.heap))

    def end(self, at: int) -> None:
        """Whatever shows is not over at that place."""
        while self.heap and self.heap[0][1].end <= at:
            heappop(self.heap)

    def _drop_hidden(self, at: int) -> None:
        """What remains reaches further than all that is later: as many entries as one of them has sectors, at most."""
        reach = at
        kept = []
        for entry in sorted(self.heap):
            if entry[1].end > reach:
                reach = entry[1].end
                kept.append(entry)
        self.heap = kept


@dataclass(frozen=True)
class Compaction:
    """How a pair's data file loses its garbage: what is to be copied within it, and what is true then. Sectors."""

    moves: list[tuple[int, int, int]]  # from, to, length; nothing that is live is written over
    live: list[Segment]
    data_end: int


def compact(live: Iterable[Segment]) -> Compaction:
    """Move what lies behind the room that the live map needs into the gaps before it."""
    live = list(live)
    used = _joined(sorted((segment.moffset, segment.mend) for segment in live if not segment.zeroed))
    data_end = HEAD_SECTORS + sum(end - start for start, end in used)
    gaps = [(end, start) for (_, end), (start, _) in pairwise([(0, HEAD_SECTORS), *used, (data_end, data_end)])]
    moves: list[tuple[int, int, int]] = []
    free = iter([(start, min(end, data_end)) for start, end in gaps if start < min(end, data_end)])
    at = room = 0
    for start, end in used:
        start = max(start, data_end)
        while start < end:
            if at == room:
                at, room = next(free)
            length = min(end - start, room - at)
            moves.append((start, at, length))
            start, at = start + length, at + length
    return Compaction(moves, [piece for segment in live for piece in _moved(segment, moves, data_end)], data_end)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges as the fewest that cover the same."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _moved(segment: Segment, moves: list[tuple[int, int, int]], data_end: int) -> Iterator[Segment]:
    """A live entry where it is after the moves, in as many pieces as it then has."""
    if segment.zeroed:
        yield segment._replace(moffset=data_end)
        return
    stay = min(segment.mend, data_end) - segment.moffset
    if stay > 0:
        yield segment.cut(segment.offset, segment.offset + stay)
    at = max(segment.moffset, data_end)
    place = bisect_right(moves, at, key=itemgetter(0)) - 1
    while at < segment.mend:
        source, target, length = moves[place]
        end = min(source + length, segment.mend)
        yield Segment(segment.offset + at - segment.moffset, end - at, target + at - source, False, segment.tag)
        at, place = end, place + 1


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
