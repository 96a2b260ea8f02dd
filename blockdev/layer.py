# SPDX-License-Identifier: Apache-2.0
"""One blob as one layer: what it is wrapped in, and where its tables are.

A layer is recognised by its content, always in the order tar, ZFile, LSMT, whatever its
name or media type. Heads are read here with formats/; tables are left to the engine.
This is where FormatError ends: whatever is wrong with the content comes out as a
CorruptImage that names blob and offset.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from blockdev.engine import EXTENT_SIZE, Blob, Codec, File, LayerKind, LayerTable, Priority, ZFileHead
from blockdev.errors import CorruptImage, SourceError
from blockdev.units import Units
from formats import lsmt, tar, zfile
from formats.errors import FormatError
from formats.readat import Window

SHA256 = "sha256"  # of each part, which the image's manifest vouches for
CRC_ONLY = "crc only"  # what has rotted shows, what was altered on purpose does not

log = logging.getLogger(__name__)

# A layer's tables are at its end: the jump table takes 1/1000 of the plain size, the index less.
# One request brings them for nearly every layer; the ceiling keeps a huge one's first read short.
_TAIL_SHARE = 256
_TAIL_MAX = 4 << 20
_DROP_SECONDS = 1.0  # a disk that takes longer to write 64 KiB is no cache
_DROP_POLL = 0.01


class NamedBlob(NamedTuple):
    """A blob and what messages call it: its path or its digest. Whoever opened it closes it.

    `doubtful`: its digest has not been checked, so that what came of it may not be what it is.
    `checked`: by what its parts are, when they come: SHA256 or CRC_ONLY. `units`: what they are held against.
    give_up(): whoever opened it waits for nothing of it any more.
    """

    name: str
    blob: Blob
    doubtful: bool = False
    checked: str = CRC_ONLY
    units: Units | None = None
    give_up: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Layer:
    """An opened layer: its place in an image, and what was found on the way there.

    virtual_size is in bytes, 0 = "that of what is below". `zfile` and `lsmt` are None where
    there is no such head; without `lsmt`, the layer's plain content is the disk itself.
    """

    name: str
    blob_size: int
    table: LayerTable
    virtual_size: int
    tar: tar.Payload | None = None
    zfile: zfile.Head | None = None
    lsmt: lsmt.Head | None = None

    @property
    def flat(self) -> bool:
        return self.table.kind is LayerKind.FLAT

    def place(self, offset: int) -> str:
        """What messages call an offset of the plain content: one of the blob, where that can be said."""
        if self.zfile:
            return f"offset {offset} of the decoded content"
        return f"offset {offset + (self.tar.base if self.tar else 0)}"

    def close(self) -> None:
        """Close the files; the blob is its opener's. Idempotent."""
        self.table.file.close()
        self.table.index.close()

    def describe(self) -> dict[str, Any]:
        """All of it as JSON values; sizes and offsets in bytes."""
        out: dict[str, Any] = {
            "name": self.name,
            "kind": self.table.kind.name.lower(),
            "size": self.blob_size,
            "plain_size": self.table.file.size,
            "virtual_size": self.virtual_size,
        }
        if self.tar:
            out["tar"] = {"member": self.tar.name, "offset": self.tar.base, "size": self.tar.length}
        if self.zfile:
            out["zfile"] = {
                "codec": Codec(self.zfile.codec).name.lower(),
                "block_size": self.zfile.block_size,
                "blocks": self.zfile.block_count,
                "crc": self.zfile.verify,
                "header_overwritten": bool(self.zfile.flags & zfile.HAS_INDEX),
            }
        if self.lsmt:
            out["lsmt"] = {
                "uuid": self.lsmt.uuid,
                "parent_uuid": self.lsmt.parent_uuid,
                "flags": self.lsmt.flags,
                "index_entries": self.table.index_count,
                "index_offset": self.table.index_offset,
                "user_tag": self.lsmt.user_tag.decode(errors="replace"),
            }
        return out


def ask_ahead(blob: Blob) -> None:
    """Have the parts of a blob that open_layer() reads fetched, all at once and without waiting."""
    for offset, length in _ends(blob):
        blob.prefetch(offset, length, Priority.PREFETCH)


def _ends(blob: Blob) -> list[tuple[int, int]]:
    tail = min(max(EXTENT_SIZE, blob.size // _TAIL_SHARE), _TAIL_MAX, blob.size)
    start = (blob.size - tail) // EXTENT_SIZE * EXTENT_SIZE
    head = [(0, min(EXTENT_SIZE, blob.size))] if start else []
    return [*head, (start, blob.size - start)]


def open_layer(source: NamedBlob) -> Layer:
    """Open a read-only layer. CorruptImage if it is none, or is broken; SourceError if it cannot be read.

    Not all heads have checksums: what a doubtful blob is broken by leaves the cache and comes once more.
    """
    try:
        return _open_layer(source)
    except CorruptImage as error:
        if not source.doubtful:
            raise
        log.warning("layer read again: %s", error)
        _drop_ends(source.blob)
    return _open_layer(source)


def _drop_ends(blob: Blob) -> None:
    """What has only just come may be on its way to the disk still, and goes when it is there."""
    deadline = time.monotonic() + _DROP_SECONDS
    for offset, length in _ends(blob):
        left = -(-length // EXTENT_SIZE) - blob.drop(offset, length)
        while left and time.monotonic() < deadline:
            time.sleep(_DROP_POLL)
            left -= blob.drop(offset, length)


def _open_layer(source: NamedBlob) -> Layer:
    name, blob = source.name, source.blob
    with _judge(name):
        payload = tar.find_payload(Window(blob, 0, blob.size))
    base, length = (payload.base, payload.length) if payload else (0, blob.size)
    with _judge(name, base):
        head = zfile.open_zfile(Window(blob, base, length))
    with _judge(name, base + head.index_offset if head else base):
        file = blob.open_zfile(_engine_head(head, base, length)) if head else blob.open_raw(base, length)
    try:
        with _judge(name, 0 if head else base, " of the decoded content" if head else ""):
            sealed = _open_sealed(file, compressed=head is not None)
    except BaseException:
        file.close()
        raise
    if sealed is None:
        return Layer(name, blob.size, LayerTable(LayerKind.FLAT, file, file), file.size, payload, head)
    table = LayerTable(
        LayerKind.SEALED, file, file, sealed.index_offset, sealed.index_count, sealed.data_end, sealed.extent_limit
    )
    return Layer(name, blob.size, table, sealed.head.virtual_size, payload, head, sealed.head)


def open_pair(data: NamedBlob, index: NamedBlob) -> Layer:
    """Open an append-only read-write layer, for reading."""
    with _judge(f"{data.name} with {index.name}"):
        log = lsmt.open_log(Window(index.blob, 0, index.blob.size), Window(data.blob, 0, data.blob.size))
    table = LayerTable(
        LayerKind.LOG,
        data.blob.open_raw(0, data.blob.size),
        index.blob.open_raw(0, index.blob.size),
        log.index_offset,
        log.index_count,
        log.data_end,
    )
    return Layer(data.name, data.blob.size, table, log.head.virtual_size, lsmt=log.head)


def _open_sealed(file: File, *, compressed: bool) -> lsmt.Sealed | None:
    """None: compressed content that is not LSMT at either end, so it must be the disk."""
    content = Window(file, 0, file.size)
    if lsmt.is_lsmt(content.read_at(0, min(lsmt.HEAD_SIZE, file.size))):
        return lsmt.open_sealed(content)
    if not compressed:
        raise FormatError("no LSMT or ZFile magic", 0)
    tail = max(0, file.size - lsmt.HEAD_SIZE)
    if lsmt.is_lsmt(content.read_at(tail, file.size - tail)):
        raise FormatError("an LSMT trailer, but no LSMT magic in the header", 0)
    return None


def _engine_head(head: zfile.Head, base: int, length: int) -> ZFileHead:
    return ZFileHead(
        base=base,
        length=length,
        data_offset=head.data_offset,
        index_offset=head.index_offset,
        block_count=head.block_count,
        plain_size=head.plain_size,
        block_size=head.block_size,
        index_crc=head.index_crc,
        codec=Codec(head.codec),
        block_crc=head.verify,
        check_index=head.check_index,
    )


@contextmanager
def _judge(name: str, base: int = 0, inside: str = "") -> Iterator[None]:
    """Bad content ends as CorruptImage; `base` is where in the blob the parsed object starts."""
    try:
        yield
    except FormatError as error:
        offset = base + (error.offset or 0)
        raise CorruptImage(f"open layer: {name}: offset {offset}{inside}: {error.what}") from error
    except CorruptImage as error:
        raise CorruptImage(f"open layer: {name}: offset {base}{inside}: {error}") from error
    except SourceError as error:
        raise SourceError(f"open layer: {name}: {error}") from error
