# SPDX-License-Identifier: Apache-2.0
"""The plain bytes of a layer blob: gzip, zstd or neither, told by its first bytes.

A gzip may have many members and a zstd many frames, skippable ones among them. One call
gives a bounded piece, however well the blob is compressed; a blob that ends early, or has
something else behind it, is a FormatError with the offset in the blob.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import zstandard

from formats.errors import FormatError

Read = Callable[[int], bytes]

_INPUT = 32 << 10  # bytes given to zlib at once: it copies what it leaves over, per member and per piece of output
_READ = 1 << 20  # bytes asked of the blob at once
_GZIP = b"\x1f\x8b"
_ZSTD = 0xFD2FB528
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_MAGIC_SIZE = 4
_WINDOW_MAX = 128 << 20  # of a zstd frame: zstd's own limit without --long; the most that decoding keeps
_GZIP_WRAPPER = 16 + zlib.MAX_WBITS


def plain(read: Read) -> Read:
    """A reader of the uncompressed stream: up to n bytes at each call, none at the end.

    `read(n)` gives up to n bytes of the blob, none at its end.
    """
    blob = _Blob(read)
    start = blob.peek(_MAGIC_SIZE)
    if start[:2] == _GZIP:
        return _Pieces(_gunzipped(blob)).read
    if len(start) == _MAGIC_SIZE and _is_zstd(int.from_bytes(start, "little")):
        return _Pieces(_frames(blob)).read
    return blob.some


def _is_zstd(magic: int) -> bool:
    return magic == _ZSTD or magic in _SKIPPABLE


class _Blob:
    """The compressed bytes, with a look ahead."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._buffer = b""
        self._at = 0
        self._base = 0

    @property
    def offset(self) -> int:
        return self._base + self._at

    def peek(self, wanted: int) -> bytes:
        """The next bytes, fewer if the blob ends; they stay."""
        pieces = [self._buffer[self._at :]]
        have = len(pieces[0])
        if have < wanted:
            self._base += self._at
            self._at = 0
            while have < wanted and (piece := self._read(_READ)):
                pieces.append(piece)
                have += len(piece)
            self._buffer = b"".join(pieces)
        return self._buffer[self._at : self._at + wanted]

    def some(self, wanted: int) -> bytes:
        """Up to `wanted` bytes; none at the end."""
        if self._at == len(self._buffer):
            self._base += self._at
            self._at = 0
            self._buffer = self._read(_READ)
        piece = self._buffer[self._at : self._at + wanted]
        self._at += len(piece)
        return piece

    def take(self, wanted: int) -> bytes:
        """Exactly the next `wanted` bytes."""
        if len(self._buffer) - self._at < wanted:
            self.peek(wanted)
        piece = self._buffer[self._at : self._at + wanted]
        if len(piece) < wanted:
            raise FormatError("the compressed layer is cut off", self._base + len(self._buffer))
        self._at += wanted
        return piece


class _Pieces:
    """A reader over pieces of any size."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, wanted: int) -> bytes:
        piece = self._left or next(self._pieces, b"")
        self._left = piece[wanted:]
        return piece[:wanted]


# ---- gzip ----


def _gunzipped(blob: _Blob) -> Iterator[bytes]:
    """What all members hold, one after the other; zeros may follow the last, as gzip(1) has it."""
    compressed = b""
    while True:
        start = blob.offset - len(compressed)
        member = zlib.decompressobj(_GZIP_WRAPPER)
        while not member.eof:
            compressed = member.unconsumed_tail or compressed or blob.some(_INPUT)
            if not compressed:
                raise FormatError("the compressed layer is cut off", blob.offset)
            try:
                piece = member.decompress(compressed, _READ)
            except zlib.error as error:
                raise FormatError(f"damaged gzip member ({error})", start) from None
            compressed = b""
            if piece:
                yield piece
        compressed = member.unused_data or blob.some(_INPUT)
        if not compressed.lstrip(b"\0"):
            _only_zeros(blob)
            return


def _only_zeros(blob: _Blob) -> None:
    while piece := blob.some(_READ):
        if piece.strip(b"\0"):
            raise FormatError("something follows the zeros behind the last gzip member", blob.offset - len(piece))


# ---- zstd ----

_BLOCK_HEAD = 3
_RLE = 1
_BLOCK_MAX = 128 << 10
_CHECKSUM_FLAG = 4
_CHECKSUM_SIZE = 4
_HEAD_MAX = 18


def _frames(blob: _Blob) -> Iterator[bytes]:
    """What all frames hold. A block at a time: no block gives more than 128 KiB, however few its bytes are."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
    while start := blob.peek(_MAGIC_SIZE):
        magic = int.from_bytes(blob.take(_MAGIC_SIZE), "little")
        if magic in _SKIPPABLE:
            _skip(blob, int.from_bytes(blob.take(4), "little"))
            continue
        if magic != _ZSTD:
            raise FormatError("something follows the last zstd frame", blob.offset - _MAGIC_SIZE)
        yield from _frame(blob, start, decompressor.decompressobj())


def _skip(blob: _Blob, length: int) -> None:
    while length:
        piece = blob.some(length)
        if not piece:
            raise FormatError("the compressed layer is cut off", blob.offset)
        length -= len(piece)


def _frame(blob: _Blob, magic: bytes, decoder: zstandard.ZstdDecompressionObj) -> Iterator[bytes]:
    start = blob.offset - _MAGIC_SIZE
    head = blob.peek(_HEAD_MAX - _MAGIC_SIZE)
    try:
        size = zstandard.frame_header_size(magic + head) - _MAGIC_SIZE
    except zstandard.ZstdError as error:
        raise FormatError(f"damaged zstd frame ({error})", start) from None
    given = magic + blob.take(size)
    checked = head[0] & _CHECKSUM_FLAG
    last = False
    while not last:
        block = blob.take(_BLOCK_HEAD)
        field = int.from_bytes(block, "little")
        last, kind, length = bool(field & 1), field >> 1 & 3, field >> 3
        if length > _BLOCK_MAX:
            raise FormatError("impossible size of a zstd block", blob.offset - _BLOCK_HEAD)
        block += blob.take(1 if kind == _RLE else length)
        block += blob.take(_CHECKSUM_SIZE) if last and checked else b""
        try:
            piece = decoder.decompress(given + block)
        except zstandard.ZstdError as error:
            raise FormatError(f"damaged zstd frame ({error})", start) from None
        given = b""
        if piece:
            yield piece
