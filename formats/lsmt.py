# SPDX-License-Identifier: Apache-2.0
"""LSMT layer files: heads, index entries, and the checks that open a layer.

Three shapes: committed and sealed layers (one file, index and trailer at its end) and
the append-only read-write pair (data file, chronological index file). Heads are parsed
here; at run time the engine reads the tables (native/index.c), so read_segments() and
read_log() are the slow readers that judge it. commit() writes the first shape; pair.py
writes the others. docs/formats/lsmt.md.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import construct as c

from formats.errors import FormatError
from formats.readat import ReadAt

SECTOR = 512
HEAD_SIZE = 4096
HEAD_SECTORS = HEAD_SIZE // SECTOR
ENTRY_SIZE = 16
SEALED_ENTRIES_MAX = 1_000_000  # every reader's limit, padding included
LOG_ENTRIES_MAX = 128_000_000
LENGTH_MAX = 16383  # sectors of one entry: 14 bits
_STEP_SECTORS = 64
COMMIT_STEP = _STEP_SECTORS * SECTOR  # bytes commit copies at a time; each step starts as an entry of its own
ADDRESSES = 1 << 50  # sector numbers an entry can hold
VIRTUAL_SIZE_MAX = ADDRESSES * SECTOR
NULL_UUID = "00000000-0000-0000-0000-000000000000"

IS_HEADER = 1 << 0
IS_DATA_FILE = 1 << 1
IS_SEALED = 1 << 2
IS_SPARSE = 1 << 4

COMMIT_HEADER = IS_HEADER | IS_DATA_FILE | IS_SEALED
SEALED_TRAILER = IS_DATA_FILE | IS_SEALED
LOG_DATA_HEADER = IS_HEADER | IS_DATA_FILE
LOG_INDEX_HEADER = IS_HEADER

_MAGIC = bytes.fromhex("4c534d5400010200657e63d29444084ca2d2c8ec4fcfae8a")
_DEFINED_SIZE = 390
_VERSION = (1, 1)
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_TAG_MAX = 256
_GAP_MAX = 4096  # between index and trailer: sealing rounds up to 512, so a page's worth is a wrong count
_INDEX_UNIT = 256  # a committed index is padded to whole 4096 bytes
_COPY_SIZE = 32 * COMMIT_STEP  # 1 MiB
_READ_ENTRIES = 65536  # entries read at a time: 1 MiB

_HEAD = c.Struct(
    "magic" / c.Bytes(24),
    "size" / c.Int32ul,
    "flags" / c.Int32ul,
    "index_offset" / c.Int64ul,
    "index_count" / c.Int64ul,
    "virtual_size" / c.Int64ul,
    "uuid" / c.Bytes(37),
    "parent_uuid" / c.Bytes(37),
    c.Padding(2),
    "version" / c.Int8ul,
    "sub_version" / c.Int8ul,
    "user_tag" / c.Bytes(_TAG_MAX),
    c.Padding(HEAD_SIZE - _DEFINED_SIZE),
)

_ENTRY = struct.Struct("<QQ")
_OFFSET_BITS = 50
_MOFFSET_BITS = 55
_OFFSET_MASK = (1 << _OFFSET_BITS) - 1
_MOFFSET_MASK = (1 << _MOFFSET_BITS) - 1

PADDING_ENTRY = _ENTRY.pack(_OFFSET_MASK, 0)


@dataclass(frozen=True)
class Head:
    """A header or trailer. Sizes and offsets in bytes; a UUID is "" where the field holds none."""

    flags: int
    virtual_size: int
    index_offset: int = 0
    index_count: int = 0
    uuid: str = NULL_UUID
    parent_uuid: str = NULL_UUID
    user_tag: bytes = b""

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """HEAD_SIZE bytes. Unknown flags and the undefined rest are ignored (old files have rubbish there)."""
        if len(head) != HEAD_SIZE:
            raise FormatError(f"LSMT head of {len(head)} bytes")
        fields = _HEAD.parse(head)
        if fields.magic != _MAGIC:
            raise FormatError("no LSMT magic", 0)
        if fields.virtual_size > VIRTUAL_SIZE_MAX or fields.virtual_size % SECTOR:
            raise FormatError(f"impossible virtual size {fields.virtual_size}", 48)
        return cls(
            flags=fields.flags,
            virtual_size=fields.virtual_size,
            index_offset=fields.index_offset,
            index_count=fields.index_count,
            uuid=_uuid_text(fields.uuid),
            parent_uuid=_uuid_text(fields.parent_uuid),
            user_tag=fields.user_tag.rstrip(b"\0"),
        )

    def build(self) -> bytes:
        """HEAD_SIZE bytes, as overlaybd writes them. FormatError for a value that does not fit its field."""
        if not 0 <= self.virtual_size <= VIRTUAL_SIZE_MAX or self.virtual_size % SECTOR:
            raise FormatError(f"impossible virtual size {self.virtual_size}")
        if len(self.user_tag) > _TAG_MAX:
            raise FormatError(f"user tag of {len(self.user_tag)} bytes, at most {_TAG_MAX} fit")
        for uuid in (self.uuid, self.parent_uuid):
            if uuid and not _UUID.fullmatch(uuid):
                raise FormatError(f"not a UUID: {uuid!r}")
        head: bytes = _HEAD.build(
            {
                "magic": _MAGIC,
                "size": _DEFINED_SIZE,
                "flags": self.flags,
                "index_offset": self.index_offset,
                "index_count": self.index_count,
                "virtual_size": self.virtual_size,
                "uuid": self.uuid.encode().ljust(37, b"\0"),
                "parent_uuid": self.parent_uuid.encode().ljust(37, b"\0"),
                "version": _VERSION[0],
                "sub_version": _VERSION[1],
                "user_tag": self.user_tag.ljust(_TAG_MAX, b"\0"),
            }
        )
        return head


def is_lsmt(head: bytes) -> bool:
    """Whether a file that starts with these bytes (24 or more) claims to be LSMT."""
    return head.startswith(_MAGIC)


class Segment(NamedTuple):
    """One index entry, in sectors. `zeroed`: reads as zeros, stores nothing. `tag`: which file moffset is in."""

    offset: int
    length: int
    moffset: int
    zeroed: bool
    tag: int

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def mend(self) -> int:
        return self.moffset if self.zeroed else self.moffset + self.length

    def cut(self, start: int, end: int) -> Segment:
        """The part within [start, end), which must not be empty."""
        first = max(start, self.offset)
        skipped = 0 if self.zeroed else first - self.offset
        return Segment(first, min(end, self.end) - first, self.moffset + skipped, self.zeroed, self.tag)


def pack_segment(segment: Segment) -> bytes:
    """ENTRY_SIZE bytes."""
    offset, length, moffset, zeroed, tag = segment
    if not (
        0 <= offset < _OFFSET_MASK and 0 <= length <= LENGTH_MAX and 0 <= moffset <= _MOFFSET_MASK and 0 <= tag < 256
    ):
        raise FormatError(f"no LSMT entry can hold {segment}")
    return _ENTRY.pack(offset | length << _OFFSET_BITS, moffset | zeroed << _MOFFSET_BITS | tag << 56)


def pack(segments: Iterable[Segment]) -> bytes:
    """A table without padding."""
    table = bytearray()  # joining them would take a piece of memory for each
    for segment in segments:
        table += pack_segment(segment)
    return bytes(table)


def unpack(table: bytes | memoryview) -> Iterator[Segment]:
    """The entries of a table (a multiple of ENTRY_SIZE bytes), padding left out, unchecked."""
    for low, high in _ENTRY.iter_unpack(table):
        offset = low & _OFFSET_MASK
        if offset != _OFFSET_MASK:
            zeroed = bool(high >> _MOFFSET_BITS & 1)
            yield Segment(offset, low >> _OFFSET_BITS, high & _MOFFSET_MASK, zeroed, high >> 56)


@dataclass(frozen=True)
class Sealed:
    """An opened committed or sealed layer; bytes. extent_limit: entries may not end past it (0 = no limit)."""

    head: Head  # the trailer: what counts
    header: Head
    index_offset: int
    index_count: int
    data_end: int
    extent_limit: int


@dataclass(frozen=True)
class Log:
    """An opened read-write pair; bytes. The index lies in the index file, data_end is of the data file."""

    head: Head
    index_offset: int
    index_count: int
    data_end: int


def open_sealed(r: ReadAt) -> Sealed:
    """Check all that can be checked without reading the table; FormatError says what is wrong."""
    if r.size < 2 * HEAD_SIZE:
        raise FormatError(f"{r.size} bytes are too few for an LSMT layer")
    header = Head.parse(r.read_at(0, HEAD_SIZE))
    if header.flags & LOG_DATA_HEADER != LOG_DATA_HEADER:
        raise FormatError("the LSMT header is not that of a layer", 28)
    end = r.size - HEAD_SIZE
    try:
        trailer = Head.parse(r.read_at(end, HEAD_SIZE))
    except FormatError as error:
        raise FormatError(f"LSMT trailer: {error.what}", end + (error.offset or 0)) from error
    if trailer.flags & COMMIT_HEADER != SEALED_TRAILER:
        raise FormatError("the LSMT trailer is not that of a sealed layer", end + 28)
    if trailer.index_count > SEALED_ENTRIES_MAX:
        raise FormatError(f"{trailer.index_count} index entries, at most {SEALED_ENTRIES_MAX}", end + 40)
    index_end = trailer.index_offset + ENTRY_SIZE * trailer.index_count
    if trailer.index_offset < HEAD_SIZE or index_end > end:
        raise FormatError("the index does not lie between header and trailer", end + 32)
    if end - index_end >= _GAP_MAX:
        raise FormatError(f"index_size too small: {end - index_end} bytes between index and trailer", end + 40)
    # A wrong virtual size has no checksum against it, but the header carries it a second time.
    limit = trailer.virtual_size if header.virtual_size != trailer.virtual_size else 0
    if header.virtual_size and trailer.index_count and not trailer.virtual_size:
        raise FormatError("mappings in a layer of no size", end + 48)
    return Sealed(trailer, header, trailer.index_offset, trailer.index_count, trailer.index_offset, limit)


def open_log(index: ReadAt, data: ReadAt) -> Log:
    """Open an append-only pair. A torn last index entry is left out, as no reader ever saw it whole."""
    head = Head.parse(index.read_at(0, HEAD_SIZE))
    if head.flags & COMMIT_HEADER != LOG_INDEX_HEADER:
        raise FormatError("the LSMT header is not that of an index file", 28)
    data_head = Head.parse(data.read_at(0, HEAD_SIZE))
    if data_head.flags & LOG_DATA_HEADER != LOG_DATA_HEADER:
        raise FormatError("the LSMT header is not that of a data file", 28)
    if (head.flags | data_head.flags) & IS_SPARSE:
        raise FormatError("sparse read-write layers are not supported", 28)
    if head.uuid != data_head.uuid:
        raise FormatError(f"index file {head.uuid} and data file {data_head.uuid} are no pair", 56)
    count = (index.size - HEAD_SIZE) // ENTRY_SIZE
    if count > LOG_ENTRIES_MAX:
        raise FormatError(f"{count} index entries, at most {LOG_ENTRIES_MAX}")
    return Log(head, HEAD_SIZE, count, data.size)


def read_segments(r: ReadAt, sealed: Sealed) -> list[Segment]:
    """The sorted index of an ordinary layer, checked; tags are cleared, as they mean nothing there."""
    segments: list[Segment] = []
    last_end = 0
    for segment in _read_table(r, sealed.index_offset, sealed.index_count):
        place = f"index entry {len(segments)} {tuple(segment)}"
        if segment.length == 0:
            raise FormatError(f"{place}: zero length", sealed.index_offset)
        if segment.offset < last_end:
            raise FormatError(f"{place}: overlaps or precedes the one before", sealed.index_offset)
        if sealed.extent_limit and segment.end * SECTOR > sealed.extent_limit:
            raise FormatError(f"{place}: past the virtual size {sealed.extent_limit}", sealed.index_offset)
        _check_reach(segment, sealed)
        last_end = segment.end
        segments.append(segment._replace(tag=0))
    return segments


def read_log(index: ReadAt, log: Log) -> Iterator[Segment]:
    """The chronological entries of a pair, checked; empty ones left out, tags cleared. Replay gives the live map."""
    for segment in _read_table(index, log.index_offset, log.index_count):
        if segment.length:
            _check_reach(segment, log)
            yield segment._replace(tag=0)


def _check_reach(segment: Segment, layer: Sealed | Log) -> None:
    if segment.moffset < HEAD_SECTORS or segment.mend > layer.data_end // SECTOR:
        raise FormatError(f"index entry {tuple(segment)}: outside the data area", layer.index_offset)
    if segment.end > ADDRESSES:
        raise FormatError(f"index entry {tuple(segment)}: past the last sector there can be", layer.index_offset)


def _read_table(r: ReadAt, offset: int, count: int) -> Iterator[Segment]:
    for first in range(0, count, _READ_ENTRIES):
        entries = min(_READ_ENTRIES, count - first)
        yield from unpack(r.read_at(offset + first * ENTRY_SIZE, entries * ENTRY_SIZE))


def _uuid_text(field: bytes) -> str:
    text = field.split(b"\0", 1)[0].decode("latin-1")
    return text if _UUID.fullmatch(text) else ""


class CommitWriter:
    """Writes a committed layer from its live map in order, to the byte as overlaybd does, and strictly forwards.

    `head` gives virtual size, UUIDs and tag; its flags and index fields are not used.
    Offsets and lengths are in sectors. Not thread-safe. A map that is not known in order can be
    written in stretches: only the index has to be sorted, not the content.
    """

    def __init__(self, write: Callable[[bytes], object], head: Head) -> None:
        self._write = write
        self._head = head
        self._position = HEAD_SECTORS
        self._index = bytearray()  # of this stretch
        self._stretches: list[tuple[Segment, Segment, bytearray]] = []  # earlier ones: first and last entry, index
        self._first: Segment | None = None
        self._pending: Segment | None = None
        self._write(self._header())

    def data(self, offset: int, content: bytes, tag: int = 0) -> None:
        """Stored sectors. Give a long run in pieces that are multiples of COMMIT_STEP bytes: coalescing joins them."""
        if len(content) % SECTOR:
            raise FormatError(f"{len(content)} bytes are no whole sectors")
        self.stored(offset, len(content) // SECTOR, tag)
        self._write(content)

    def stored(self, offset: int, length: int, tag: int = 0) -> None:
        """As data(), for content that the caller writes itself: all of it before or right after this."""
        done = 0
        while done < length:
            step = min(_STEP_SECTORS, length - done)
            self._emit(Segment(offset + done, step, self._position, False, tag))
            done += step
            if step == _STEP_SECTORS and self._pending:  # take all further steps that would be joined to it
                room = (LENGTH_MAX - 1 - self._pending.length) // _STEP_SECTORS
                joined = min(room, (length - done) // _STEP_SECTORS) * _STEP_SECTORS
                self._pending = self._pending._replace(length=self._pending.length + joined)
                done, step = done + joined, step + joined
            self._position += step

    def resize(self, virtual_size: int) -> bytes:
        """The disk's size, if it was not known at the start; the header that takes the first one's place."""
        self._head = replace(self._head, virtual_size=virtual_size)
        return self._header()

    def zeroed(self, offset: int, length: int, tag: int = 0) -> None:
        """Sectors that read as zeros and mask lower layers."""
        for start in range(offset, offset + length, LENGTH_MAX):
            part = min(LENGTH_MAX, offset + length - start)
            self._emit(Segment(start, part, self._position, True, tag))

    def elsewhere(self) -> None:
        """What follows begins a stretch of its own, before or after all others on the disk and apart from them."""
        self._flush()
        if self._first and self._pending:
            self._stretches.append((self._first, self._pending, self._index))
        self._first = self._pending = None
        self._index = bytearray()

    def finish(self) -> Head:
        """Write index and trailer; the trailer's head. FormatError if no reader would open so many entries."""
        self.elsewhere()
        self._stretches.sort(key=lambda stretch: stretch[0].offset)
        for (_, last, _), (first, _, _) in pairwise(self._stretches):
            if first.offset < last.end:
                raise FormatError(f"sector {first.offset} is written twice")
        table = b"".join(index for _, _, index in self._stretches)
        table += PADDING_ENTRY * (-(len(table) // ENTRY_SIZE) % _INDEX_UNIT)
        count = len(table) // ENTRY_SIZE
        _check_count(count)
        index_offset = self._position * SECTOR
        trailer = replace(self._head, flags=SEALED_TRAILER, index_offset=index_offset, index_count=count)
        self._write(table)
        self._write(trailer.build())
        return trailer

    def _header(self) -> bytes:
        return replace(self._head, flags=COMMIT_HEADER, index_offset=0, index_count=0).build()

    def _emit(self, segment: Segment) -> None:
        last = self._pending
        if last and segment.offset < last.end:
            raise FormatError(f"sector {segment.offset} written after {last.end - 1}")
        if last and _joinable(last, segment):
            self._pending = last._replace(length=last.length + segment.length)
            return
        self._flush()
        self._pending = segment

    def _flush(self) -> None:
        if self._pending:
            self._first = self._first or self._pending
            self._index += pack_segment(self._pending)
            _check_count(len(self._index) // ENTRY_SIZE)


def _check_count(count: int) -> None:
    if count > SEALED_ENTRIES_MAX:
        raise FormatError(f"{count} index entries, no reader takes more than {SEALED_ENTRIES_MAX}")


def _joinable(a: Segment, b: Segment) -> bool:
    adjacent = a.end == b.offset and a.mend == b.moffset
    return adjacent and (a.zeroed, a.tag) == (b.zeroed, b.tag) and a.length + b.length < LENGTH_MAX


def commit(live: Iterable[Segment], sources: Sequence[ReadAt], write: Callable[[bytes], object], head: Head) -> Head:
    """Copy a live map into a committed layer; an entry's tag is its data file's place in `sources`."""
    writer = CommitWriter(write, head)
    for segment in live:
        if segment.zeroed:
            writer.zeroed(segment.offset, segment.length, segment.tag)
            continue
        for done in range(0, segment.length * SECTOR, _COPY_SIZE):
            size = min(_COPY_SIZE, segment.length * SECTOR - done)
            content = sources[segment.tag].read_at(segment.moffset * SECTOR + done, size)
            writer.data(segment.offset + done // SECTOR, content, segment.tag)
    return writer.finish()
