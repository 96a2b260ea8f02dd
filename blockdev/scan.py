# SPDX-License-Identifier: Apache-2.0
"""Reading what is in the cache, to find what has gone bad: each extent against its checksum.

The files are read as they are on the disk, beside an engine that may be changing them: an
extent counts as bad only if it differs from its table entry, and the entry is still the
same afterwards. Nothing is changed here.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from blockdev import entryfiles
from blockdev.engine import crc32c
from blockdev.entryfiles import Found
from blockdev.errors import from_os
from blockdev.ownfile import open_own
from formats.presence import EXTENT_SIZE, TABLE_OFFSET

_ENTRY = 4  # bytes of a table entry
_PIECE = 64  # extents looked at together: 4 MiB
_ONES = 0xFFFFFFFF
_UNREAD = "it cannot be read"
_OTHER = "its CRC32C is not what the map says"

Progress = Callable[[int], None]  # bytes looked at since the last call


@dataclass(frozen=True)
class Bad:
    """A part of a blob that is not what it was: extents in a row. whole: all of it, since none alone is to blame."""

    digest: str
    offset: int
    length: int
    why: str
    whole: bool = False


def scan(blobs: Path, found: Found, progress: Progress, *, hashed: bool) -> list[Bad]:
    """What is bad of a blob, from its start; if it is `hashed`, also its digest is taken."""
    path = entryfiles.path_of(blobs, found.digest)
    try:
        with ExitStack() as undo:
            data = undo.enter_context(open(open_own(path), "rb", buffering=0)).fileno()
            table = undo.enter_context(open(open_own(entryfiles.map_of(path)), "rb", buffering=0)).fileno()
            whole = hashlib.new(found.digest.partition(":")[0]) if hashed else None
            bad: list[Bad] = []
            for first, present, piece in _pieces(data, table, found.size, progress):
                for offset, length, why in _bad_extents(data, table, first, present, piece):
                    _add(bad, Bad(found.digest, offset, length, why))
                if whole:
                    whole.update(piece)
    except FileNotFoundError:  # pruned meanwhile
        return []
    except OSError as error:
        raise from_os("checking the cache failed", error, str(path)) from error
    if whole and not bad and whole.hexdigest() != found.digest.partition(":")[2]:
        why = f"every checksum is right, but the {whole.name} is {whole.hexdigest()}"
        return [Bad(found.digest, 0, found.size, why, whole=True)]
    return bad


def is_bad(data_fd: int, map_fd: int, offset: int, length: int) -> bool:
    """Whether an extent differs from its table entry, and does not change while one looks."""
    while entry := _entry(map_fd, offset):
        content = _content(data_fd, length, offset)
        if content and len(content) == length and _checksum(content) == entry:
            return False
        if _entry(map_fd, offset) == entry:
            return True
    return False


def _pieces(
    data_fd: int, map_fd: int, size: int, progress: Progress
) -> Iterator[tuple[int, memoryview, memoryview]]:
    """First extent, table entries and content of each piece that has an extent. Valid until the next one."""
    buffer = memoryview(bytearray(min(_PIECE * EXTENT_SIZE, size)))
    for first, present in _present(map_fd, size):
        start = first * EXTENT_SIZE
        length = min(len(buffer), size - start)
        try:
            got = os.preadv(data_fd, [buffer[:length]], start)
            buffer[got:length] = bytes(length - got)
        except OSError:
            _read_each(data_fd, buffer[:length], start)
        yield first, present, buffer[:length]
        progress(sum(min(EXTENT_SIZE, length - at * EXTENT_SIZE) for at, entry in enumerate(present) if entry))


def _present(map_fd: int, size: int) -> Iterator[tuple[int, memoryview]]:
    for first, entries in entryfiles.table_pieces(map_fd, size):
        for at in range(0, len(entries), _PIECE):
            piece = entries[at : at + _PIECE]
            if any(piece):
                yield first + at, piece


def _bad_extents(
    data_fd: int, map_fd: int, first: int, present: memoryview, piece: memoryview
) -> Iterator[tuple[int, int, str]]:
    for number, entry in enumerate(present):
        content = piece[number * EXTENT_SIZE : (number + 1) * EXTENT_SIZE]
        offset = (first + number) * EXTENT_SIZE
        if entry and _checksum(content) != entry and is_bad(data_fd, map_fd, offset, len(content)):
            yield offset, len(content), _UNREAD if _content(data_fd, len(content), offset) is None else _OTHER


def _add(bad: list[Bad], one: Bad) -> None:
    """To the last one, if it is the same that is bad right behind it: a power cut takes extents by the thousand."""
    last = bad[-1] if bad else None
    if last and last.offset + last.length == one.offset and last.why == one.why:
        bad[-1] = replace(last, length=last.length + one.length)
    else:
        bad.append(one)


def _read_each(data_fd: int, piece: memoryview, start: int) -> None:
    """As one read of the piece; what the disk does not give becomes what matches no checksum."""
    for at in range(0, len(piece), EXTENT_SIZE):
        length = min(EXTENT_SIZE, len(piece) - at)
        content = _content(data_fd, length, start + at)
        piece[at : at + length] = os.urandom(length) if content is None else content.ljust(length, b"\0")


def _content(data_fd: int, length: int, offset: int) -> bytes | None:
    """What the file holds there; None: the disk does not say."""
    try:
        return os.pread(data_fd, length, offset)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


def _entry(map_fd: int, offset: int) -> int:
    raw = os.pread(map_fd, _ENTRY, TABLE_OFFSET + offset // EXTENT_SIZE * _ENTRY)
    return int.from_bytes(raw, "little") if len(raw) == _ENTRY else 0


def _checksum(content: bytes | memoryview) -> int:
    """As formats.presence.extent_entry(), by the engine."""
    return (crc32c(_ONES, content) ^ _ONES) or 1
