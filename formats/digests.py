# SPDX-License-Identifier: Apache-2.0
"""The digest table of a layer: a sha256 for every 256 KiB of its blob.

It stands in the second member of the layer's tar, where overlaybd does not look, and covers
all that comes before that member's header. Its place and its own digest stand in the
annotations of the layer's descriptor, so that whoever trusts the manifest can check any
unit of the blob by itself. What comes after the covered bytes follows from the table, to
the last byte. Layout in docs/formats/digest-table.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

import construct as c

from formats import tar
from formats.errors import FormatError
from formats.readat import ReadAt
from formats.tarheader import BLOCK

UNIT = 256 << 10  # bytes a digest stands for: four extents of the cache, and one request of a random reader
MEMBER = b"dev.ociblk.digests"
DIGEST_SIZE = hashlib.sha256().digest_size
HEAD_SIZE = 64

_MAGIC = b"OCIBLKDT"
_VERSION = 1
_PREFIX = "dev.ociblk.digests."
_COVERED, _OFFSET, _LENGTH, _DIGEST = (_PREFIX + name for name in ("covered", "offset", "length", "digest"))
# Of a blob: its table takes 32 MiB, and that is read into memory before anything else.
COVERED_MAX = 1 << 38
_NUMBER_DIGITS = len(str(2 * COVERED_MAX))
_ALGORITHM = "sha256:"
_SHA256 = re.compile(_ALGORITHM + f"[0-9a-f]{{{2 * DIGEST_SIZE}}}")

_HEAD = c.Struct(
    "magic" / c.Bytes(8),
    "version" / c.Int32ul,
    "unit" / c.Int32ul,
    "covered" / c.Int64ul,
    "count" / c.Int64ul,
    c.Padding(HEAD_SIZE - 32),
)


def unit_count(covered: int) -> int:
    """Digests of so many covered bytes: the last unit may be short."""
    return -(-covered // UNIT)


@dataclass(frozen=True)
class Place:
    """What a descriptor says of its layer's table."""

    covered: int
    digest: str  # of the table

    @property
    def offset(self) -> int:
        """Where the table starts in the blob."""
        return self.covered + BLOCK

    @property
    def length(self) -> int:
        """Bytes of the table."""
        return HEAD_SIZE + DIGEST_SIZE * unit_count(self.covered)

    @property
    def blob_size(self) -> int:
        """Bytes of the blob: nothing comes after the table but the end of the tar."""
        return self.offset + self.length + len(tar.padding(self.length)) + len(tar.END)

    def annotations(self) -> dict[str, str]:
        """For the layer's descriptor."""
        numbers = {_COVERED: self.covered, _OFFSET: self.offset, _LENGTH: self.length}
        return {name: str(number) for name, number in numbers.items()} | {_DIGEST: self.digest}

    @classmethod
    def of(cls, annotations: Mapping[str, str], blob_size: int) -> Place | None:
        """The table of a layer with these annotations; None if it has none. FormatError if they cannot be right."""
        if not any(name.startswith(_PREFIX) for name in annotations):
            return None
        place = cls(_number(annotations, _COVERED), annotations.get(_DIGEST, ""))
        place.check()
        if (place.offset, place.length) != (_number(annotations, _OFFSET), _number(annotations, _LENGTH)):
            raise FormatError(f"{_PREFIX}*: a table of {place.covered} covered bytes is elsewhere")
        if place.blob_size != blob_size:
            raise FormatError(f"{_PREFIX}*: they are those of {place.blob_size} bytes, the blob has {blob_size}")
        return place

    def check(self) -> None:
        """FormatError if no blob has such a table."""
        if not 0 < self.covered <= COVERED_MAX or self.covered % BLOCK:
            raise FormatError(f"digest table of {self.covered} bytes: want whole tar blocks, at most {COVERED_MAX}")
        if not _SHA256.fullmatch(self.digest):
            raise FormatError(f"digest table: {self.digest!r:.80} is no sha256")


def _number(annotations: Mapping[str, str], name: str) -> int:
    value = annotations.get(name, "")
    if not (value.isascii() and value.isdigit() and len(value) <= _NUMBER_DIGITS):
        raise FormatError(f"{name}: {value!r:.30} is no number")
    return int(value)


class Table:
    """The digests of a blob's units, and with them everything that may be in its bytes."""

    def __init__(self, covered: int, digests: bytes) -> None:
        """digests: as many as unit_count(covered), one after the other."""
        fields = {"magic": _MAGIC, "version": _VERSION, "unit": UNIT, "covered": covered}
        body: bytes = _HEAD.build(fields | {"count": unit_count(covered)}) + digests
        self.covered = covered
        self.place = Place(covered, _ALGORITHM + hashlib.sha256(body).hexdigest())
        self.place.check()
        if len(body) != self.place.length:
            raise FormatError(f"digest table of {len(body)} bytes, {self.place.length} are expected")
        self.tail = tar.member_head(MEMBER, len(body)) + body + tar.padding(len(body)) + tar.END
        self._digests = memoryview(self.tail)[BLOCK + HEAD_SIZE :][: len(digests)]  # in memory once

    @property
    def blob_size(self) -> int:
        """Bytes of the whole blob."""
        return self.covered + len(self.tail)

    def build(self) -> bytes:
        """The table itself: what its digest is of."""
        return self.tail[BLOCK:][: self.place.length]

    @classmethod
    def parse(cls, body: bytes) -> Table:
        """What build() has made."""
        if len(body) < HEAD_SIZE:
            raise FormatError(f"digest table of {len(body)} bytes")
        head = _HEAD.parse(body[:HEAD_SIZE])
        if head.magic != _MAGIC or head.version != _VERSION or head.unit != UNIT:
            raise FormatError("no digest table of a known version")
        if any(body[HEAD_SIZE - 32 : HEAD_SIZE]):
            raise FormatError("digest table: its head has something in its spare bytes", 32)
        table = cls(head.covered, body[HEAD_SIZE:])
        if head.count != unit_count(head.covered):
            raise FormatError(f"digest table of {head.count} digests for {head.covered} bytes", 24)
        return table

    def digest(self, unit: int) -> str:
        """Of the covered bytes of a unit: by this any content-addressed store may be asked for them."""
        return _ALGORITHM + self._digests[unit * DIGEST_SIZE : (unit + 1) * DIGEST_SIZE].hex()

    def span(self, unit: int) -> tuple[int, int]:
        """Offset and length of a unit of the blob; the last ones have nothing that is covered."""
        start = unit * UNIT
        return start, min(UNIT, self.blob_size - start)

    def matches(self, unit: int, content: bytes | bytearray | memoryview) -> bool:
        """Whether these are the bytes of a unit."""
        start, length = self.span(unit)
        view = memoryview(content)
        if len(view) != length:
            return False
        inner = max(0, min(length, self.covered - start))
        if inner:
            place = slice(unit * DIGEST_SIZE, (unit + 1) * DIGEST_SIZE)
            if hashlib.sha256(view[:inner]).digest() != self._digests[place]:
                return False
        behind = max(0, start - self.covered)
        return bytes(view[inner:]) == self.tail[behind : behind + length - inner]


def find(r: ReadAt) -> Table | None:
    """The table that a whole layer carries; None if it carries none. FormatError if it is not all of the tar's rest."""
    payload = tar.find_payload(r)
    if payload is None:
        return None
    covered = payload.base + payload.length + len(tar.padding(payload.length))
    length = HEAD_SIZE + DIGEST_SIZE * unit_count(covered)
    if covered + BLOCK + length > r.size or r.read_at(covered, BLOCK) != tar.member_head(MEMBER, length):
        return None
    table = Table.parse(r.read_at(covered + BLOCK, length))
    as_said = (table.covered, table.blob_size) == (covered, r.size)
    if not as_said or r.read_at(covered, len(table.tail)) != table.tail:
        raise FormatError("the tar does not end as its digest table says", covered)
    return table


class TableWriter:
    """Makes the table of bytes that come in order, but for the first unit, which comes in the end.

    The first bytes of a layer are known last: the tar's head says how long it is.
    """

    def __init__(self, place: int) -> None:
        """place: of the first byte that will be given to add(), below UNIT."""
        self._place = place
        self._digests: list[bytes] = []
        self._unit = hashlib.sha256()

    def add(self, content: bytes | memoryview) -> None:
        """The next bytes."""
        view = memoryview(content)
        first = min(len(view), max(0, UNIT - self._place))
        self._place += first
        view = view[first:]
        while len(view):
            piece = view[: UNIT - self._place % UNIT]
            self._unit.update(piece)
            self._place += len(piece)
            view = view[len(piece) :]
            if self._place % UNIT == 0:
                self._close_unit()

    def finish(self, first: bytes) -> Table:
        """The table of all that came; `first` is the first unit, or all there is."""
        if len(first) != min(UNIT, self._place):
            raise ValueError(f"first unit of {len(first)} bytes, of {self._place}")
        if self._place > UNIT and self._place % UNIT:
            self._close_unit()
        return Table(self._place, b"".join([hashlib.sha256(first).digest(), *self._digests]))

    def _close_unit(self) -> None:
        self._digests.append(self._unit.digest())
        self._unit = hashlib.sha256()
