# SPDX-License-Identifier: Apache-2.0
"""The tar of an OCI layer, read once from front to back.

All of tar that writers of layers have used: v7, ustar, star, pax with global headers, GNU with
long names, binary numbers and sparse files, and extended attributes under both their pax keys.
Values come out exact or as a FormatError that says where. Memory does not grow with the
archive, nor with the sizes it claims. Where tars are ambiguous, Go's archive/tar decides, as
it reads the layers of everybody else. docs/formats/layers.md.
"""

from __future__ import annotations

import base64
import binascii
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from formats import sparse
from formats.errors import FormatError
from formats.sparse import Segments
from formats.tarheader import (
    BLOCK,
    EXTENSION_COUNT,
    EXTENSION_LIMIT,
    GNU_MAGIC,
    LONG_LINK,
    LONG_NAME,
    PAX,
    PAX_GLOBAL,
    POSIX_MAGIC,
    checksum_fits,
    natural,
    number,
    pax_number,
    pax_records,
    text_of,
)
from formats.tree import Xattrs

PIECE = 1 << 20  # bytes asked of the stream at once, and the most of a file given at once

_GLOBAL_LIMIT = 1 << 16  # bytes of global records in force: they are weighed for every member
_ZEROS = bytes(BLOCK)
_SECOND = 10**9
_INT64 = 1 << 63
_TIMES_KEPT = 4096
_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_NAMES = (b"path", b"linkpath", sparse.NAME)  # records that may not hold a NUL
_SPARSE = b"S"
_V7_FILE = b"\0"


class Kind(enum.Enum):
    """What a member is. HARDLINK is a further name of the member that `link` names."""

    FILE = enum.auto()
    HARDLINK = enum.auto()
    SYMLINK = enum.auto()
    CHARACTER = enum.auto()
    BLOCK = enum.auto()
    DIRECTORY = enum.auto()
    FIFO = enum.auto()


_KINDS = {
    b"0": Kind.FILE,
    _V7_FILE: Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
    b"7": Kind.FILE,  # contiguous, to those who could make such files
    _SPARSE: Kind.FILE,
}


@dataclass(slots=True)
class Member:
    """One entry, its path and link as they are in the tar: `..`, `./` and `/` are still there."""

    path: bytes
    kind: Kind
    mode: int  # permissions, with set-id and sticky bits
    uid: int
    gid: int
    mtime_ns: int
    size: int  # bytes of a FILE, its holes included; else 0
    link: bytes  # of a SYMLINK its target, of a HARDLINK the other name
    device: tuple[int, int]  # major and minor of a CHARACTER or BLOCK
    xattrs: Xattrs
    offset: int  # of its header in the tar


class Archive:
    """The members of a tar, in their order. One pass, by one thread.

    `read(n)` gives up to n bytes, none at the end. What follows the archive's end is not read.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._buffer = b""
        self._view = memoryview(b"")
        self._at = 0  # in the buffer
        self._base = 0  # of the buffer in the tar
        self._left = 0  # bytes of the member's body that nobody read yet
        self._padding = 0
        self._map: Segments | None = None  # of a sparse member
        self._globals: dict[bytes, bytes] = {}
        self._ended = False

    def __iter__(self) -> Iterator[Member]:
        return self

    def __next__(self) -> Member:
        pax: dict[bytes, bytes] = {}
        names: dict[bytes, bytes] = {}
        for _ in range(EXTENSION_COUNT + 1):
            self._skip()
            start = self._base + self._at
            block = self._next_header(start)
            if block is None:
                if pax or names:
                    raise FormatError("the tar ends after an extension header", start)
                raise StopIteration
            flag = block[156:157]
            if flag in _KINDS:
                return self._member(block, start, self._globals | pax if self._globals else pax, names)
            if flag in (LONG_NAME, LONG_LINK):
                names[flag] = text_of(self._extension(block, start))
            elif flag == PAX:
                pax = _records(self._extension(block, start), start + BLOCK)
            elif flag == PAX_GLOBAL:
                self._set_globals(self._extension(block, start), start)
            else:
                raise FormatError(f"unknown tar entry type {flag!r}", start + 156)
        raise FormatError(f"more than {EXTENSION_COUNT} tar extension headers", start)

    def content(self) -> Iterator[tuple[int, bytes | memoryview]]:
        """(offset in the file, bytes) of the member just given, in order; holes are left out. Once, before the next."""
        segments = self._map or ((0, self._left),)
        for start, length in segments:
            while length:
                piece = self._take(length)
                yield start, piece
                start += len(piece)
                length -= len(piece)

    # ---- headers ----

    def _next_header(self, start: int) -> bytes | None:
        """The next block that is no zeros; None at the end of the archive."""
        if self._ended:
            return None
        block = self._block()
        if block is None or block == _ZEROS:
            second = self._block() if block else None
            if second is not None and second != _ZEROS:
                raise FormatError("the tar goes on after a block of zeros", start + BLOCK)
            self._ended = True
            return None
        if not checksum_fits(block):
            raise FormatError("tar header is damaged", start)
        return block

    def _extension(self, block: bytes, start: int) -> bytes:
        length = natural(block[124:136], start + 124)
        if length > EXTENSION_LIMIT:
            raise FormatError(f"tar extension header of {length} bytes", start)
        self._begin_body(length)
        pieces = []
        while self._left:
            pieces.append(self._take(self._left))
        return b"".join(pieces)

    def _set_globals(self, body: bytes, start: int) -> None:
        self._globals |= _records(body, start + BLOCK)
        if sum(len(key) + len(value) for key, value in self._globals.items()) > _GLOBAL_LIMIT:
            raise FormatError(f"more than {_GLOBAL_LIMIT} bytes of global pax records", start)

    def _member(self, block: bytes, start: int, pax: dict[bytes, bytes], names: dict[bytes, bytes]) -> Member:
        flag = block[156:157]
        kind = _KINDS[flag]
        member = Member(
            path=names[LONG_NAME] if LONG_NAME in names else _name(block),
            kind=kind,
            mode=number(block[100:108], start + 100) & 0o7777,
            uid=0 if pax.get(b"uid") else natural(block[108:116], start + 108),
            gid=0 if pax.get(b"gid") else natural(block[116:124], start + 116),
            mtime_ns=0 if pax.get(b"mtime") else _time(block[136:148], start + 136),
            size=0 if kind is not Kind.FILE or pax.get(b"size") else natural(block[124:136], start + 124),
            link=names[LONG_LINK] if LONG_LINK in names else text_of(block[157:257]),
            device=(0, 0),
            xattrs=(),
            offset=start,
        )
        if kind is Kind.CHARACTER or kind is Kind.BLOCK:
            member.device = natural(block[329:337], start + 329), natural(block[337:345], start + 337)
        if pax:
            _override(member, pax, names, start)
        if flag == _V7_FILE and member.path.endswith(b"/"):
            member.kind, member.size = Kind.DIRECTORY, 0
        self._map = None
        self._begin_body(member.size)
        if flag == _SPARSE:
            self._set_map(member, sparse.old(block, self._block, start))
        elif member.kind is Kind.FILE and sparse.is_sparse(pax):
            self._set_map(member, sparse.pax(pax, self._map_block, start))
            member.path = pax.get(sparse.NAME) or member.path
        return member

    def _set_map(self, member: Member, found: tuple[int, Segments]) -> None:
        size, segments = found
        sparse.check(segments, size, self._left, member.offset)
        member.size, self._map = size, segments

    # ---- the stream ----

    def _begin_body(self, length: int) -> None:
        self._left = length
        self._padding = -length % BLOCK

    def _block(self) -> bytes | None:
        """The next block; None if the stream ends before it."""
        if len(self._buffer) - self._at < BLOCK and not self._fill(BLOCK):
            return None
        self._at += BLOCK
        return self._buffer[self._at - BLOCK : self._at]

    def _map_block(self) -> bytes | None:
        """A block of the member's body."""
        if self._left < BLOCK:
            return None
        self._left -= BLOCK
        return self._block()

    def _fill(self, wanted: int) -> bool:
        """Have `wanted` bytes in the buffer. False: the stream has ended."""
        kept = self._buffer[self._at :]
        self._base += self._at
        self._at = 0
        pieces = [kept] if kept else []
        have = len(kept)
        while have < wanted and (piece := self._read(PIECE)):
            pieces.append(piece)
            have += len(piece)
        self._buffer = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._view = memoryview(self._buffer)
        if 0 < have < wanted and wanted == BLOCK:
            raise FormatError("the tar ends within a block", self._base + have)
        return have >= wanted

    def _take(self, wanted: int) -> memoryview:
        """The next bytes of the body, at least one and at most `wanted`."""
        if self._at == len(self._buffer) and not self._fill(1):
            raise FormatError(f"the tar ends {self._left} bytes before its member does", self._base)
        piece = self._view[self._at : self._at + min(wanted, PIECE)]
        self._at += len(piece)
        self._left -= len(piece)
        return piece

    def _skip(self) -> None:
        """Go to the end of the body and its padding; a tar may end before the padding does."""
        here = self._left + self._padding
        if here <= len(self._buffer) - self._at:
            self._at += here
            self._left = self._padding = 0
            return
        while self._left:
            self._take(self._left)
        while self._padding and (self._at < len(self._buffer) or self._fill(1)):
            step = min(self._padding, len(self._buffer) - self._at)
            self._at += step
            self._padding -= step
        self._padding = 0


# ---- fields ----


def _name(block: bytes) -> bytes:
    name = text_of(block[:100])
    if not block[345]:
        return name
    prefix = text_of(_prefix(block))
    return prefix + b"/" + name if prefix else name


def _prefix(block: bytes) -> bytes:
    """The field that goes before the name: POSIX's, star's shorter one, or one of Go before 1.8.

    That Go wrote a prefix into GNU headers, where the times of access and change belong.
    """
    if block[257:265] == GNU_MAGIC:
        try:
            _time(block[345:357], 345)
            _time(block[357:369], 357)
        except FormatError:
            return text_of(block[345:500]) if text_of(block[345:500]).isascii() else b""
        return b""
    if block[257:263] != POSIX_MAGIC + b"\0":
        return b""
    return block[345:476] if block[508:512] == b"tar\0" else block[345:500]


@lru_cache(_TIMES_KEPT)
def _seconds(field: bytes) -> int:
    return number(field, 0) * _SECOND


def _time(field: bytes, offset: int) -> int:
    try:
        return _seconds(field)
    except FormatError as error:
        raise FormatError(error.what, offset) from None


def _records(body: bytes, offset: int) -> dict[bytes, bytes]:
    records = pax_records(body, offset)
    return sparse.gathered(records, offset)


def _override(member: Member, pax: dict[bytes, bytes], names: dict[bytes, bytes], start: int) -> None:
    """What the pax records say of the member. An empty value takes back what an earlier header said."""
    for key in _NAMES:
        if b"\0" in pax.get(key, b""):
            raise FormatError("NUL in a name of a pax record", start)
    if pax.get(b"path") and LONG_NAME not in names:
        member.path = pax[b"path"]
    if pax.get(b"linkpath") and LONG_LINK not in names:
        member.link = pax[b"linkpath"]
    if pax.get(b"uid"):
        member.uid = pax_number(b"uid", pax[b"uid"], start)
    if pax.get(b"gid"):
        member.gid = pax_number(b"gid", pax[b"gid"], start)
    if pax.get(b"size") and member.kind is Kind.FILE:
        member.size = pax_number(b"size", pax[b"size"], start)
    if pax.get(b"mtime"):
        member.mtime_ns = _pax_time(pax[b"mtime"], start)
    member.xattrs = _xattrs(pax, start)


def _pax_time(value: bytes, offset: int) -> int:
    """Decimal seconds with a fraction; what is finer than a nanosecond is cut off."""
    sign, digits = (-1, value[1:]) if value[:1] == b"-" else (1, value)
    seconds, _, fraction = digits.partition(b".")
    right = seconds.isdigit() and (not fraction or fraction.isdigit())
    if not right or len(seconds) > 19 or int(seconds) >= _INT64:
        raise FormatError("bad mtime in a pax record", offset)
    return sign * (int(seconds) * _SECOND + int(fraction[:9].ljust(9, b"0")))


def _xattrs(pax: dict[bytes, bytes], offset: int) -> Xattrs:
    found: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            found.setdefault(unquote_to_bytes(key[len(_LIBARCHIVE) :]), _unpacked(value, offset))
    return tuple(sorted(found.items()))


def _unpacked(value: bytes, offset: int) -> bytes:
    """base64, whose padding libarchive leaves away."""
    try:
        return base64.b64decode(value.rstrip(b"=") + b"=" * (-len(value.rstrip(b"=")) % 4), validate=True)
    except binascii.Error:
        raise FormatError("bad base64 in a pax record", offset) from None
