# SPDX-License-Identifier: Apache-2.0
"""One block layer of an image's disk: new content of files, then all metadata, then the disk's first block.

A layer owns the disk's blocks from where the one below ends, and block 0 (docs/formats/erofs-image.md).
Content that a lower layer or this one stores already is found by its sha256, and where its
holes are, and not stored again. Long zeros are not stored either. What is small is hashed where
it will be written from; what is larger goes through a scratch file, and only if it may be a
duplicate. So memory is bounded by a few pieces, and by about 150 bytes for each different
content of a file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from struct import pack
from tempfile import TemporaryFile

from blockdev.build.cutter import HOLE_MIN, Cutter, Out
from blockdev.build.layerfile import PIECE
from blockdev.errors import CorruptImage
from blockdev.ranges import data_ranges, write_at
from formats.lsmt import HEAD_SIZE, CommitWriter, Head
from formats.tree import BLOCK_SIZE

DISK_BLOCKS_MAX = (1 << 32) - 2  # EROFS counts blocks in 32 bits, and the last number stands for none
LATE = HEAD_SIZE  # of the layer's first bytes: the disk's size is known last
_SCRATCH = "/var/tmp"  # for what may be a duplicate: /tmp is often memory

Content = Iterable[tuple[int, bytes | memoryview]]  # offset in the file and piece, in order; what is left out is zeros


class Nowhere:
    """An Out that keeps nothing: for a layer that exists, and of which only the effects are wanted."""

    def __init__(self) -> None:
        self._buffer = bytearray(PIECE)

    def buffer(self) -> bytearray:
        return self._buffer

    def write(self, content: bytes | memoryview) -> None:
        pass

    def rewrite(self, content: bytes) -> None:
        pass


class Contents:
    """What the layers so far store, by what stands for it (_Hasher), and where it lies on the disk."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._sizes: set[int] = set()  # of files larger than a piece

    def find(self, digest: bytes) -> int | None:
        return self._blocks.get(digest)

    def add(self, digest: bytes, block: int) -> None:
        self._blocks[digest] = block

    def may_have(self, size: int) -> bool:
        """Whether a large file of this size was stored. From now on, one was."""
        if size in self._sizes:
            return True
        self._sizes.add(size)
        return False


class BlockLayer:
    """Writes one layer. store() for every file, put() for the metadata, then finish()."""

    def __init__(self, out: Out, head: Head, contents: Contents, start: int) -> None:
        """head: UUIDs. start: the disk's first block that is this layer's."""
        self._out = out
        self._contents = contents
        self._writer = CommitWriter(out.write, head)
        self._cutter = Cutter(self._writer, out, mask=False, start=start * BLOCK_SIZE)
        self._buffer = out.buffer()
        self._filled = 0  # bytes of the buffer
        self._given = 0  # bytes of files so far
        self.next_block = start

    @property
    def stored(self) -> int:
        """Bytes that the layer holds so far, before compression."""
        return self._cutter.stored + self._filled

    def store(self, size: int, content: Content) -> int:
        """The block where a file of `size` bytes, more than 0, starts: its content is in this layer or below."""
        if size > (DISK_BLOCKS_MAX - self.next_block) * BLOCK_SIZE:
            raise CorruptImage(f"building a layer failed: a file of {size} bytes: the disk would exceed 16 TiB")
        return self._store_small(size, content) if size <= PIECE else self._store_large(size, content)

    def put(self, pieces: Iterable[bytes]) -> None:
        """Whole blocks in a row, as they are."""
        at = 0
        for piece in pieces:
            self._append(memoryview(piece))
            at += len(piece)
        self._claim(at)

    def finish(self, first_block: bytes) -> Head:
        """Write the disk's first block and the index; the layer's trailer."""
        self._flush()
        self._cutter.finish()
        self._writer.elsewhere()
        self._writer.data(0, first_block)
        self._out.rewrite(self._writer.resize(self.next_block * BLOCK_SIZE))
        return self._writer.finish()

    # ---- content --------------------------------------------------------------------------

    def _store_small(self, size: int, content: Content) -> int:
        """Into the buffer, which it leaves again if it is a duplicate."""
        room = -(-size // BLOCK_SIZE) * BLOCK_SIZE
        if self._filled + room > PIECE:
            self._flush()
        start = self._filled
        end = _gather(memoryview(self._buffer)[start : start + room], content)
        if end > size:
            raise CorruptImage(f"building a layer failed: a file of {size} bytes: its content is longer")
        digest = hashlib.sha256(memoryview(self._buffer)[start : start + size]).digest()
        block = self._contents.find(digest)
        if block is None:
            self._filled += room
            block = self._claim(size)
            self._contents.add(digest, block)
        return block

    def _store_large(self, size: int, content: Content) -> int:
        hasher = _Hasher()
        if not self._contents.may_have(size):
            self._append_file(size, hasher.over(size, content))
        else:
            with TemporaryFile(dir=os.environ.get("TMPDIR", _SCRATCH)) as spool:
                for offset, piece in hasher.over(size, content):
                    write_at(spool.fileno(), piece, offset)
                block = self._contents.find(hasher.digest(size))
                if block is not None:
                    return block
                spool.truncate(size)
                self._append_file(size, _pieces(spool.fileno(), size))
        block = self._claim(size)
        self._contents.add(hasher.digest(size), block)
        return block

    def _claim(self, size: int) -> int:
        """Blocks for `size` bytes; the first of them."""
        block = self.next_block
        self.next_block += -(-size // BLOCK_SIZE)
        return block

    # ---- the buffer -------------------------------------------------------------------------

    def _append_file(self, size: int, content: Content) -> None:
        end = 0
        for offset, piece in content:
            self._append_zeros(offset - end)
            self._append(memoryview(piece))
            end = offset + len(piece)
        self._append_zeros(-(-size // BLOCK_SIZE) * BLOCK_SIZE - end)

    def _append(self, piece: memoryview) -> None:
        while piece:
            taken = min(len(piece), PIECE - self._filled)
            self._buffer[self._filled : self._filled + taken] = piece[:taken]
            self._filled += taken
            piece = piece[taken:]
            if self._filled == PIECE:
                self._flush()

    def _append_zeros(self, length: int) -> None:
        if length >= HOLE_MIN:
            short = -self._filled % BLOCK_SIZE
            self._append(memoryview(bytes(short)))
            self._flush()
            whole = (length - short) // BLOCK_SIZE * BLOCK_SIZE
            self._cutter.skip(whole)
            length -= short + whole
        self._append(memoryview(bytes(length)))

    def _flush(self) -> None:
        """What the buffer holds, whole blocks, to the layer."""
        if self._filled:
            self._cutter.add(self._buffer, self._filled)
            self._buffer = self._out.buffer()
            self._filled = 0


class _Hasher:
    """What stands for a file's content: its digest; of one with holes, also where they are: zeros can be terabytes."""

    def __init__(self) -> None:
        self._content = hashlib.sha256()
        self._gaps = hashlib.sha256()
        self._end = 0
        self._whole = True

    def over(self, size: int, content: Content) -> Iterator[tuple[int, bytes | memoryview]]:
        """The content as it goes by. CorruptImage if it is not in order within the size."""
        for offset, piece in content:
            if not self._end <= offset <= offset + len(piece) <= size:
                raise CorruptImage(f"building a layer failed: a file of {size} bytes: its content is out of place")
            if offset > self._end:
                self._note_gap(offset)
            self._content.update(piece)
            self._end = offset + len(piece)
            yield offset, piece

    def digest(self, size: int) -> bytes:
        """Once all of it has gone by."""
        if self._end < size:
            self._note_gap(size)
            self._end = size
        if self._whole:
            return self._content.digest()
        return self._content.digest() + self._gaps.digest()  # twice as long: no content has a digest like this

    def _note_gap(self, end: int) -> None:
        self._whole = False
        self._gaps.update(pack("<QQ", self._end, end))


def _gather(room: memoryview, content: Content) -> int:
    """Content into its place, zeros around it; where it ends. What does not fit is refused."""
    end = 0
    for offset, piece in content:
        after = offset + len(piece)
        if not end <= offset <= after <= len(room):
            raise CorruptImage(f"building a layer failed: a file of {len(room)} bytes: its content is out of place")
        if offset > end:
            room[end:offset] = bytes(offset - end)
        room[offset:after] = piece
        end = after
    room[end:] = bytes(len(room) - end)
    return end


def _pieces(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """What a scratch file holds, without its holes."""
    for at, end in data_ranges(fd, size):
        while at < end:
            piece = os.pread(fd, min(PIECE, end - at), at)
            yield at, piece
            at += len(piece)
