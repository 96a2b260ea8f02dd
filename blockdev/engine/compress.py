# SPDX-License-Identifier: Apache-2.0
"""What builders need of C: stored blocks of plain bytes, CRC32C, and the search for zeros."""

from __future__ import annotations

from enum import IntEnum

from blockdev.engine.border import check, ffi, lib


class Codec(IntEnum):
    """ZFile's codec numbers."""

    LZ4 = lib.OB_CODEC_LZ4
    ZSTD = lib.OB_CODEC_ZSTD


def crc32c(seed: int, content: bytes | bytearray | memoryview) -> int:
    """CRC32C without inversions, as ZFile uses it."""
    return int(lib.ob_crc32c(seed, ffi.from_buffer(content), len(content)))


def zero_run(content: bytes | bytearray | memoryview, grain: int) -> tuple[int, int]:
    """Start and end of the first grains in a row that are all zero; the content's length twice if there are none."""
    end = ffi.new("uint64_t *")
    return int(lib.ob_zero_run(ffi.from_buffer(content), len(content), grain, end)), int(end[0])


class Compressor:
    """Plain bytes to stored ZFile blocks, in memory that is kept for the next call. For one thread at a time."""

    def __init__(self, codec: Codec, block_size: int, *, crc: bool) -> None:
        self._how = codec, block_size
        self._crc = crc
        self._grow(0)

    def _grow(self, size: int) -> None:
        """Make room for what `size` plain bytes become."""
        self._size = size
        self._out = _uncleared("unsigned char[]", max(1, lib.ob_zfile_bound(*self._how, size)))
        self._lengths = _uncleared("uint32_t[]", max(1, -(-size // self._how[1])))

    def compress(self, content: bytes | bytearray | memoryview) -> tuple[memoryview, memoryview]:
        """Content as consecutive blocks: their bytes, and each one's stored length (uint32), until the next call.

        The GIL is free meanwhile.
        """
        size, block_size = len(content), self._how[1]
        if size > self._size:
            self._grow(size)
        plain, room = ffi.from_buffer(content), len(self._out)
        written = check(lib.ob_zfile_compress(*self._how, self._crc, plain, size, self._out, room, self._lengths))
        lengths = ffi.buffer(self._lengths, 4 * -(-size // block_size))
        return memoryview(ffi.buffer(self._out, written)), memoryview(lengths).cast("I")


_uncleared = ffi.new_allocator(should_clear_after_alloc=False)  # clearing costs as much as writing the result
