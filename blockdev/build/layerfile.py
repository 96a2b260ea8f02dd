# SPDX-License-Identifier: Apache-2.0
"""The file a layer is written to: bytes in, compressed and wrapped as asked, bytes out.

LayerFile is the write function of formats.lsmt.CommitWriter. Blocks are compressed by
`jobs` threads; the bytes are the same with any number, as each task is whole blocks and
results are taken in order. Memory is bounded: a few pieces for each thread, however
large the layer.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Self

from blockdev.engine import Codec, Compressor, crc32c
from blockdev.errors import UsageError
from blockdev.ranges import write_at
from formats import tar, zfile
from formats.digests import UNIT, Table, TableWriter

log = logging.getLogger(__name__)

CODECS = ("none", *zfile.CODECS)
BLOCK_SIZES = tuple(4096 << shift for shift in range(5))  # what overlaybd's own reader takes
PIECE = 1 << 20  # plain bytes compressed at a time; a multiple of every block size
_COPIED_BELOW = 64 << 10  # bytes; a shorter write joins others: a task costs as much as copying this
_AHEAD = 2  # tasks under way for each thread: one is worked on, one waits
_TABLE_MEMORY = 4 << 20  # bytes of jump table held in memory: 4 GiB of plain content in 4 KiB blocks
_TABLE_PIECE = 1 << 20
_SEND = 8 << 20  # bytes written between two calls that start the disk
_MOVE = 1 << 20  # bytes moved at a time
_FOREIGN_BLOCK_MAX = 65535  # overlaybd cannot read a longer stored block


@dataclass(frozen=True)
class Wrapping:
    """How a layer is stored. codec: one of CODECS; block_size is of no meaning without one.

    digests: with the table that lets a reader check each part by itself (docs/formats/digest-table.md).
    """

    codec: str = "lz4"
    block_size: int = 4096
    tar: bool = False
    digests: bool = False

    def check(self) -> None:
        """UsageError if no layer can be stored so."""
        if self.codec not in CODECS:
            raise UsageError(f"write layer: codec {self.codec!r}: want one of {', '.join(CODECS)}")
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"write layer: block size {self.block_size}: want one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        if self.digests and not self.tar:
            raise UsageError("write layer: a digest table is a member of the tar: want a tar around the layer")


class LayerFile:
    """Writes one layer to a seekable, empty file. write() in order, then finish(). OSError as the file raises it."""

    def __init__(self, fd: int, wrapping: Wrapping, jobs: int = 1, late: int = 0) -> None:
        """The first `late` plain bytes, at most BLOCK_SIZES[0], may be given anew until finish()."""
        wrapping.check()
        self._fd = fd
        self._tar = wrapping.tar
        self._base = tar.WRAP_HEAD_SIZE if wrapping.tar else 0
        self._place = self._base  # where the next bytes go
        self._sent = 0  # bytes on their way to the disk
        self._late = late > 0
        self._buffers: deque[tuple[bytearray, int]] = deque()  # each with the task that must be over first
        self._lent = 0  # the last task that reads from a buffer
        self._blocks = None
        self._wants_table = wrapping.digests
        self._digests: TableWriter | None = None
        self.table: Table | None = None  # what finish() has written, if one is wanted
        self._expect(self._base)
        if wrapping.codec != "none":
            self._blocks = _Blocks(zfile.Options(zfile.CODECS[wrapping.codec], wrapping.block_size), jobs, late > 0)
            self._put(self._blocks.head())
            self._start = self._place
            self._place += self._blocks.reserved
            if self._blocks.reserved:
                self._digests = None  # all of it will be written once more

    def buffer(self) -> bytearray:
        """PIECE bytes to fill, and to write() from until the next call. Written parts stay as they are until then."""
        lent = self._blocks.lent if self._blocks else 0
        if self._buffers and lent == self._lent:
            return self._buffers[-1][0]  # what was written from it was copied
        if self._blocks and self._buffers:
            self._lent = lent
            self._buffers[-1] = (self._buffers[-1][0], lent)
            oldest, task = self._buffers[0]
            if task <= self._blocks.taken:
                self._buffers.rotate(-1)
                return oldest
        self._buffers.append((bytearray(PIECE), 0))
        return self._buffers[-1][0]

    def write(self, content: bytes | memoryview) -> None:
        """The next plain bytes of the layer; a memoryview of buffer(), or bytes."""
        if self._blocks is None:
            self._put(content)
            return
        for stored in self._blocks.add(memoryview(content)):
            self._put(stored)

    def rewrite(self, content: bytes) -> None:
        """The late bytes anew."""
        if self._blocks is None:
            write_at(self._fd, content, self._base)
        else:
            self._blocks.rewrite(content)

    def finish(self) -> int:
        """Write what comes last; the file's size."""
        if self._blocks:
            for stored in self._blocks.flush():
                self._put(stored)
            self._put_first(self._blocks.first())
            header, trailer = self._blocks.heads(self._place - self._base)
            for piece in self._blocks.table():
                self._put(piece)
            self._put(trailer)
            write_at(self._fd, header, self._base)
        if self._tar:
            payload = self._place - self._base
            write_at(self._fd, tar.wrap_head(payload), 0)
            self._put(tar.padding(payload))
            self._put_tail()
        os.ftruncate(self._fd, self._place)
        return self._place

    def _put_tail(self) -> None:
        """What comes behind the payload: the table, if one is wanted, and the tar's end."""
        if self._digests is None:
            self._put(tar.END)
            return
        self.table = self._digests.finish(os.pread(self._fd, min(UNIT, self._place), 0))
        self._digests = None
        self._put(self.table.tail)

    def _expect(self, place: int) -> None:
        """What is written from here on is written for the last time, but for the first unit."""
        if self._wants_table:
            self._digests = TableWriter(place)

    def close(self) -> None:
        """Let go of threads and scratch space; the file is its opener's."""
        if self._blocks:
            self._blocks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, content: bytes | memoryview) -> None:
        write_at(self._fd, content, self._place)
        if self._digests:
            self._digests.add(content)
        self._place += len(content)
        if self._place - self._sent >= _SEND and not self._late:
            # Asks the disk to begin, and does not wait: else all of it is left to the fsync in the end.
            os.posix_fadvise(self._fd, self._sent, self._place - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self._place

    def _put_first(self, first: bytes | memoryview) -> None:
        """A first block that was held back; what was written behind the room for it moves up to it."""
        if not self._blocks or not self._blocks.reserved:
            return
        source, self._place, end = self._start + self._blocks.reserved, self._start, self._place
        self._expect(self._start)
        self._put(first)
        while source < end:
            piece = os.pread(self._fd, min(_MOVE, end - source), source)
            source += len(piece)
            self._put(piece)


class _Blocks:
    """Plain bytes to stored blocks in order, and the jump table of them."""

    def __init__(self, options: zfile.Options, jobs: int, hold: bool) -> None:
        """hold: keep the first block until first()."""
        self._options = options
        self._held: bytearray | None = bytearray() if hold else None
        self.reserved = zfile.stored_length_max(options.block_size) if hold else 0
        self._submitted = self.taken = 0  # tasks
        self.lent = 0  # the last task that reads the caller's memory
        self._plain = bytearray()  # less than a piece
        self._plain_size = 0
        self._ahead = _AHEAD * jobs
        self._pool = ThreadPoolExecutor(jobs, "compress")
        self._under_way: deque[tuple[Compressor, Future[tuple[memoryview, memoryview]]]] = deque()
        self._idle: list[Compressor] = []
        self._table = SpooledTemporaryFile(_TABLE_MEMORY)  # noqa: SIM115 - close() closes it
        self._table_crc = 0
        self._warned = False

    def head(self) -> bytes:
        """The header to begin with."""
        return zfile.provisional_head(self._options).build()

    def add(self, content: memoryview) -> Iterator[memoryview]:
        """Take plain bytes; stored blocks that are ready, in order."""
        self._plain_size += len(content)
        if self._held is not None and len(self._held) < self._options.block_size:
            taken = min(len(content), self._options.block_size - len(self._held))
            self._held += content[:taken]
            content = content[taken:]
        size = self._options.block_size
        if len(content) >= _COPIED_BELOW:
            if self._plain:
                short = -len(self._plain) % size
                self._plain += content[:short]
                content = content[short:]
                yield from self._submit_plain()
            whole = len(content) // size * size
            self.lent = self._submitted + 1
            yield from self._submit(content[:whole])
            content = content[whole:]
        self._plain += content
        if len(self._plain) >= PIECE:
            rest = self._plain[len(self._plain) // size * size :]
            del self._plain[len(self._plain) - len(rest) :]
            yield from self._submit_plain()
            self._plain = rest

    def rewrite(self, content: bytes) -> None:
        """The first plain bytes anew; they are still held."""
        assert self._held is not None
        self._held[: len(content)] = content

    def flush(self) -> Iterator[memoryview]:
        """The rest of the stored blocks."""
        if self._plain:
            yield from self._submit_plain()
        while self._under_way:
            yield from self._take()

    def first(self) -> memoryview:
        """The block that was held; nothing if none was."""
        if not self._held:
            return memoryview(b"")
        stored, lengths = self._compressor().compress(self._held)
        later = self._table
        self._table = SpooledTemporaryFile(_TABLE_MEMORY)  # noqa: SIM115 - as above
        self._table_crc = 0
        self._note(lengths)
        later.seek(0)
        while piece := later.read(_TABLE_PIECE):
            self._note(memoryview(piece).cast("I"))
        later.close()
        return stored

    def heads(self, index_offset: int) -> tuple[bytes, bytes]:
        """The final header, and the trailer."""
        count = -(-self._plain_size // self._options.block_size)
        header, trailer = (
            replace(head, block_count=count, index_crc=self._table_crc)
            for head in zfile.final_heads(self._options, self._plain_size, index_offset, b"")
        )
        return header.build(), trailer.build()

    def table(self) -> Iterator[bytes]:
        """The jump table in pieces."""
        self._table.seek(0)
        return iter(lambda: self._table.read(_TABLE_PIECE), b"")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._table.close()

    def _submit_plain(self) -> Iterator[memoryview]:
        plain, self._plain = self._plain, bytearray()
        return self._submit(memoryview(plain))

    def _submit(self, plain: memoryview) -> Iterator[memoryview]:
        """Have whole blocks compressed; results of earlier ones, once enough are under way."""
        if plain:
            compressor = self._idle.pop() if self._idle else self._compressor()
            self._under_way.append((compressor, self._pool.submit(compressor.compress, plain)))
            self._submitted += 1
        while len(self._under_way) > self._ahead:
            yield from self._take()

    def _compressor(self) -> Compressor:
        return Compressor(Codec(self._options.codec), self._options.block_size, crc=self._options.verify)

    def _take(self) -> Iterator[memoryview]:
        """The oldest task's stored blocks, valid until whoever gets them asks for more."""
        compressor, task = self._under_way.popleft()
        stored, lengths = task.result()
        self.taken += 1
        self._note(lengths)
        yield stored
        self._idle.append(compressor)

    def _note(self, lengths: memoryview) -> None:
        """The next lengths of the jump table."""
        if self._options.block_size > _FOREIGN_BLOCK_MAX and max(lengths) > _FOREIGN_BLOCK_MAX and not self._warned:
            self._warned = True
            log.warning(
                "incompressible blocks of %d bytes: overlaybd itself cannot read them", self._options.block_size
            )
        entries = lengths.tobytes() if sys.byteorder == "little" else struct.pack(f"<{len(lengths)}I", *lengths)
        self._table_crc = crc32c(self._table_crc, entries)
        self._table.write(entries)
