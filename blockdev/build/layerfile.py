# SPDX-License-Identifier: Apache-2.0
"""The file a layer is written to: bytes in, compressed and wrapped as asked, bytes out.

LayerFile is the write function of formats.lsmt.CommitWriter. Memory is bounded: a few
batches of blocks, however large the layer. Blocks are compressed by two threads; the
bytes are the same with any number, as each batch is whole blocks.
"""

from __future__ import annotations

import logging
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Self

from blockdev.engine import Codec, crc32c, zfile_compress
from blockdev.errors import UsageError
from formats import tar, zfile

log = logging.getLogger(__name__)

CODECS = ("none", *zfile.CODECS)
BLOCK_SIZES = tuple(4096 << shift for shift in range(5))  # what overlaybd's own reader takes
_BATCH = 1 << 20  # plain bytes compressed at a time; a multiple of every block size
_THREADS = 2  # one compresses while the other's result is written; more would starve a busy machine
_AHEAD = 2 * _THREADS  # batches under way
_TABLE_MEMORY = 4 << 20  # bytes of jump table held in memory: 4 GiB of plain content in 4 KiB blocks
_TABLE_PIECE = 1 << 20
_FOREIGN_BLOCK_MAX = 65535  # overlaybd cannot read a longer stored block


@dataclass(frozen=True)
class Wrapping:
    """How a layer is stored. codec: one of CODECS; block_size is of no meaning without one."""

    codec: str = "lz4"
    block_size: int = 4096
    tar: bool = False

    def check(self) -> None:
        """UsageError if no layer can be stored so."""
        if self.codec not in CODECS:
            raise UsageError(f"write layer: codec {self.codec!r}: want one of {', '.join(CODECS)}")
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"write layer: block size {self.block_size}: want one of {', '.join(map(str, BLOCK_SIZES))}"
            )


class LayerFile:
    """Writes one layer to a seekable, empty file. write() in order, then finish(). OSError as the file raises it."""

    def __init__(self, fd: int, wrapping: Wrapping) -> None:
        wrapping.check()
        self._fd = fd
        self._tar = wrapping.tar
        self._base = tar.WRAP_HEAD_SIZE if wrapping.tar else 0
        self._place = self._base  # where the next bytes go
        self._blocks = None
        if wrapping.codec != "none":
            self._blocks = _Blocks(zfile.Options(zfile.CODECS[wrapping.codec], wrapping.block_size))
            self._put(self._blocks.head())

    def write(self, content: bytes) -> None:
        """The next plain bytes of the layer."""
        if self._blocks is None:
            self._put(content)
            return
        for stored in self._blocks.add(content):
            self._put(stored)

    def finish(self) -> int:
        """Write what comes last; the file's size."""
        if self._blocks:
            for stored in self._blocks.flush():
                self._put(stored)
            header, trailer = self._blocks.heads(self._place - self._base)
            for piece in self._blocks.table():
                self._put(piece)
            self._put(trailer)
            _put_at(self._fd, header, self._base)
        if self._tar:
            payload = self._place - self._base
            _put_at(self._fd, tar.wrap_head(payload), 0)
            self._put(tar.wrap_tail(payload))
        return self._place

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
        _put_at(self._fd, content, self._place)
        self._place += len(content)


class _Blocks:
    """Plain bytes to stored blocks in order, and the jump table of them."""

    def __init__(self, options: zfile.Options) -> None:
        self._options = options
        self._plain = bytearray()
        self._plain_size = 0
        self._pool = ThreadPoolExecutor(_THREADS, "compress")
        self._under_way: deque[Future[tuple[memoryview, list[int]]]] = deque()
        self._table = SpooledTemporaryFile(_TABLE_MEMORY)  # noqa: SIM115 - close() closes it
        self._table_crc = 0
        self._warned = False

    def head(self) -> bytes:
        """The header to begin with."""
        return zfile.provisional_head(self._options).build()

    def add(self, content: bytes) -> list[memoryview]:
        """Take plain bytes; stored blocks that are ready, at most one batch behind for each that goes in."""
        self._plain += content
        self._plain_size += len(content)
        ready = []
        while len(self._plain) >= _BATCH:
            self._submit(bytes(self._plain[:_BATCH]))
            del self._plain[:_BATCH]
            if len(self._under_way) > _AHEAD:
                ready.append(self._take())
        return ready

    def flush(self) -> list[memoryview]:
        """The rest of the stored blocks."""
        if self._plain:
            self._submit(bytes(self._plain))
            self._plain.clear()
        return [self._take() for _ in range(len(self._under_way))]

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

    def _submit(self, plain: bytes) -> None:
        codec, size = Codec(self._options.codec), self._options.block_size
        self._under_way.append(self._pool.submit(zfile_compress, codec, size, plain, crc=self._options.verify))

    def _take(self) -> memoryview:
        stored, lengths = self._under_way.popleft().result()
        if max(lengths) > _FOREIGN_BLOCK_MAX and not self._warned:
            self._warned = True
            log.warning(
                "incompressible blocks of %d bytes: overlaybd itself cannot read them", self._options.block_size
            )
        entries = struct.pack(f"<{len(lengths)}I", *lengths)
        self._table_crc = crc32c(self._table_crc, entries)
        self._table.write(entries)
        return stored


def _put_at(fd: int, content: bytes | memoryview, place: int) -> None:
    view = memoryview(content)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], place + done)
