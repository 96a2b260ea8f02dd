# SPDX-License-Identifier: Apache-2.0
"""ZFile: bytes cut into blocks that are compressed one by one, behind a table of their lengths.

open_zfile() checks heads; at run time the engine reads the table and the blocks
(native/zfile.c), so Decoder is the slow reader that judges it. docs/formats/zfile.md.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from dataclasses import dataclass

import construct as c
import lz4.block
import zstandard

from formats.crc32c import crc32c
from formats.errors import FormatError
from formats.readat import ReadAt, check_range

HEAD_SIZE = 512
LZ4 = 1
ZSTD = 2
CODECS = {"lz4": LZ4, "zstd": ZSTD}
BLOCK_SIZE_MIN = 512
BLOCK_SIZE_MAX = 65536
BLOCK_COUNT_MAX = 1_000_000_000  # every reader's limit
PLAIN_SIZE_MAX = 1 << 50  # far past any layer; keeps all products within 64 bits

IS_HEADER = 1 << 0
IS_DATA_FILE = 1 << 1
IS_SEALED = 1 << 2
HAS_INDEX = 1 << 3  # header overwritten: index fields are valid in it
HAS_DIGEST = 1 << 4
INDEX_COMPRESSED = 1 << 5

PROVISIONAL_HEADER = IS_HEADER | IS_DATA_FILE | HAS_DIGEST
FINAL_HEADER = PROVISIONAL_HEADER | HAS_INDEX
TRAILER = IS_DATA_FILE | IS_SEALED | HAS_DIGEST

_MAGIC = b"ZFile\0\1\0tuji.yyf@Alibaba"
_DEFINED_SIZE = 96
_DIGEST_AT = slice(28, 32)
_BLOCK_CRC_SEED = 100007
_CRC_SIZE = 4
_READ_BLOCKS = 1 << 18  # index entries read at a time: 1 MiB
_ZSTD_LEVEL = 3  # what overlaybd always uses
_ZSTD_WINDOW_MAX = 8 << 20  # what the format asks every decoder for; a block of ours needs 64 KiB

_HEAD = c.Struct(
    "magic" / c.Bytes(24),
    "size" / c.Int32ul,
    "digest" / c.Int32ul,
    "flags" / c.Int64ul,
    "index_offset" / c.Int64ul,
    "block_count" / c.Int64ul,
    "plain_size" / c.Int64ul,
    "index_crc" / c.Int32ul,
    c.Padding(4),
    "block_size" / c.Int32ul,
    "codec" / c.Int8ul,
    "level" / c.Int8ul,
    "use_dict" / c.Int8ul,
    c.Padding(5),
    "dict_size" / c.Int32ul,
    "verify" / c.Int8ul,
    c.Padding(HEAD_SIZE - 89),
)


@dataclass(frozen=True)
class Head:
    """A header or trailer. Sizes and offsets in bytes. The digest is checked and made, not kept."""

    flags: int
    index_offset: int
    block_count: int
    plain_size: int
    index_crc: int
    block_size: int
    codec: int
    verify: bool
    level: int = 0
    use_dict: bool = False
    dict_size: int = 0

    @property
    def data_offset(self) -> int:
        """Where block 0 starts."""
        return HEAD_SIZE + self.dict_size

    @property
    def check_index(self) -> bool:
        """Whether index_crc is meaningful."""
        return bool(self.flags & HAS_DIGEST)

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """HEAD_SIZE bytes: magic and, where there is one, the digest; nothing else is checked."""
        if len(head) != HEAD_SIZE:
            raise FormatError(f"ZFile head of {len(head)} bytes")
        fields = _HEAD.parse(head)
        if fields.magic != _MAGIC:
            raise FormatError("no ZFile magic", 0)
        if fields.flags & HAS_DIGEST and fields.digest != _digest(head):
            raise FormatError("ZFile head fails its checksum", 28)
        return cls(
            flags=fields.flags,
            index_offset=fields.index_offset,
            block_count=fields.block_count,
            plain_size=fields.plain_size,
            index_crc=fields.index_crc,
            block_size=fields.block_size,
            codec=fields.codec,
            verify=bool(fields.verify),
            level=fields.level,
            use_dict=bool(fields.use_dict),
            dict_size=fields.dict_size,
        )

    def build(self) -> bytes:
        """HEAD_SIZE bytes, with the digest if the flags announce one."""
        fields = dataclasses.asdict(self) | {"magic": _MAGIC, "size": _DEFINED_SIZE, "digest": 0}
        try:
            head: bytes = _HEAD.build(fields)
        except c.ConstructError as error:
            raise FormatError(f"no ZFile head can hold {self}") from error
        if self.flags & HAS_DIGEST:
            head = head[: _DIGEST_AT.start] + _digest(head).to_bytes(4, "little") + head[_DIGEST_AT.stop :]
        return head


def _digest(head: bytes) -> int:
    return crc32c(0, head[: _DIGEST_AT.start] + bytes(4) + head[_DIGEST_AT.stop :])


def open_zfile(r: ReadAt) -> Head | None:
    """The head that describes the content, checked against the file. None: not a ZFile. FormatError: a broken one."""
    if r.read_at(0, min(r.size, len(_MAGIC))) != _MAGIC:
        return None
    if r.size < HEAD_SIZE:
        raise FormatError(f"{r.size} bytes are too few for a ZFile")
    head = Head.parse(r.read_at(0, HEAD_SIZE))
    if not head.flags & IS_HEADER:
        raise FormatError("the ZFile header is not marked as one", 32)
    end = r.size
    if not head.flags & HAS_INDEX:
        head = _trailer(r, head)
        end -= HEAD_SIZE
    _check(head, end)
    return head


def _trailer(r: ReadAt, header: Head) -> Head:
    if not header.flags & IS_DATA_FILE:
        raise FormatError("the ZFile header is not that of a data file", 32)
    start = r.size - HEAD_SIZE
    if start < HEAD_SIZE:
        raise FormatError("the ZFile is cut: no trailer", start)
    try:
        trailer = Head.parse(r.read_at(start, HEAD_SIZE))
    except FormatError as error:
        raise FormatError(f"ZFile trailer: {error.what}", start + (error.offset or 0)) from error
    if trailer.flags & (IS_HEADER | IS_DATA_FILE | IS_SEALED) != IS_DATA_FILE | IS_SEALED:
        raise FormatError("the ZFile trailer is not that of a finished file", start + 32)
    return trailer


def _check(head: Head, end: int) -> None:
    """`end`: where the index must have ended."""
    if head.flags & INDEX_COMPRESSED:
        raise FormatError("compressed ZFile index: not supported", 32)
    if head.codec not in CODECS.values():
        raise FormatError(f"ZFile algorithm {head.codec}: not supported", 76)
    if head.use_dict:
        raise FormatError("ZFile with a dictionary: not supported", 78)
    size = head.block_size
    if not BLOCK_SIZE_MIN <= size <= BLOCK_SIZE_MAX or size & (size - 1):
        raise FormatError(f"impossible ZFile block size {size}", 72)
    if head.plain_size > PLAIN_SIZE_MAX or head.block_count > BLOCK_COUNT_MAX:
        raise FormatError(f"ZFile of {head.plain_size} bytes in {head.block_count} blocks is too large", 48)
    if head.block_count != -(-head.plain_size // size):
        raise FormatError(f"{head.plain_size} bytes do not make {head.block_count} blocks of {size}", 48)
    if head.index_offset < head.data_offset or head.index_offset + 4 * head.block_count > end:
        raise FormatError("the ZFile index does not lie within the file", 40)


def read_table(r: ReadAt, head: Head) -> list[int]:
    """Where each block starts, and where the last one ends: block_count + 1 offsets in the file, checked."""
    shortest = _CRC_SIZE + 1 if head.verify else 1
    longest = stored_length_max(head.block_size)
    offsets = [head.data_offset]
    crc = 0
    for first in range(0, head.block_count, _READ_BLOCKS):
        count = min(_READ_BLOCKS, head.block_count - first)
        piece = r.read_at(head.index_offset + 4 * first, 4 * count)
        crc = crc32c(crc, piece)
        for length in struct.unpack(f"<{count}I", piece):
            if not shortest <= length <= longest:
                place = head.index_offset + 4 * len(offsets) - 4
                raise FormatError(f"ZFile block {len(offsets) - 1} of {length} bytes", place)
            offsets.append(offsets[-1] + length)
    if head.check_index and crc != head.index_crc:
        raise FormatError("ZFile index fails its checksum", head.index_offset)
    if offsets[-1] > head.index_offset:
        raise FormatError("ZFile blocks run into the index", head.index_offset)
    return offsets


def stored_length_max(block_size: int) -> int:
    """A stored block, CRC included, is never longer: either codec adds less than 1 % and a few bytes to noise."""
    return 2 * block_size + 4096


class Decoder:
    """The plain content of a ZFile, block by block: slow, obvious, a ReadAt."""

    def __init__(self, r: ReadAt, head: Head) -> None:
        self._r = r
        self._head = head
        self._offsets = read_table(r, head)
        self._cached: tuple[int, bytes] = (-1, b"")

    @property
    def size(self) -> int:
        return self._head.plain_size

    def read_at(self, offset: int, length: int) -> bytes:
        check_range(offset, length, self.size)
        if not length:
            return b""
        size = self._head.block_size
        first, last = offset // size, (offset + length - 1) // size
        plain = b"".join(self.block(number) for number in range(first, last + 1))
        return plain[offset - first * size :][:length]

    def block(self, number: int) -> bytes:
        """One block's plain bytes; FormatError if its checksum or its content is bad."""
        if self._cached[0] == number:
            return self._cached[1]
        head, start = self._head, self._offsets[number]
        stored = self._r.read_at(start, self._offsets[number + 1] - start)
        if head.verify:
            stored, crc = stored[:-_CRC_SIZE], int.from_bytes(stored[-_CRC_SIZE:], "little")
            if crc32c(_BLOCK_CRC_SEED, stored) != crc:
                raise FormatError(f"ZFile block {number} fails its checksum", start)
        expected = min(head.block_size, head.plain_size - number * head.block_size)
        try:
            plain = _DECODE[head.codec](stored, expected)
        except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
            raise FormatError(f"ZFile block {number} does not decode: {error}", start) from error
        if len(plain) != expected:
            raise FormatError(f"ZFile block {number} decodes to {len(plain)} bytes, not {expected}", start)
        self._cached = (number, plain)
        return plain


def _decode_lz4(stored: bytes, expected: int) -> bytes:
    plain: bytes = lz4.block.decompress(stored, uncompressed_size=expected)
    return plain


def _decode_zstd(stored: bytes, expected: int) -> bytes:
    # A frame that declares its size makes the library allocate that much.
    declared = zstandard.get_frame_parameters(stored).content_size
    if declared not in (expected, zstandard.CONTENTSIZE_UNKNOWN):
        raise zstandard.ZstdError(f"frame declares {declared} bytes, not {expected}")
    decoder = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX)
    return decoder.decompress(stored, max_output_size=expected, allow_extra_data=False)


_DECODE: dict[int, Callable[[bytes, int], bytes]] = {LZ4: _decode_lz4, ZSTD: _decode_zstd}


@dataclass(frozen=True)
class Options:
    """How to write a ZFile. overwrite_header: the header ends up with the index fields too, as commit does it."""

    codec: int = LZ4
    block_size: int = 4096
    verify: bool = True
    overwrite_header: bool = True


def provisional_head(options: Options) -> Head:
    """The header written first, before anything is known."""
    return Head(
        flags=PROVISIONAL_HEADER,
        index_offset=0,
        block_count=0,
        plain_size=0,
        index_crc=0,
        block_size=options.block_size,
        codec=options.codec,
        verify=options.verify,
    )


def final_heads(options: Options, plain_size: int, index_offset: int, table: bytes) -> tuple[Head, Head]:
    """Header and trailer of a finished file; the header differs from the provisional one if it is overwritten."""
    first = provisional_head(options)
    trailer = dataclasses.replace(
        first,
        flags=TRAILER,
        index_offset=index_offset,
        block_count=len(table) // 4,
        plain_size=plain_size,
        index_crc=crc32c(0, table),
    )
    header = dataclasses.replace(trailer, flags=FINAL_HEADER) if options.overwrite_header else first
    return header, trailer


def build(plain: bytes, options: Options) -> bytes:
    """A whole ZFile in memory. The layout is overlaybd's to the byte; lz4 picks matches as its library version does."""
    size = options.block_size
    blocks = [_encode(plain[start : start + size], options) for start in range(0, len(plain), size)]
    table = struct.pack(f"<{len(blocks)}I", *map(len, blocks))
    body = b"".join(blocks)
    header, trailer = final_heads(options, len(plain), HEAD_SIZE + len(body), table)
    return header.build() + body + table + trailer.build()


def _encode(plain: bytes, options: Options) -> bytes:
    if options.codec == LZ4:
        stored: bytes = lz4.block.compress(plain, store_size=False)
    else:
        stored = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(plain)
    crc = crc32c(_BLOCK_CRC_SEED, stored).to_bytes(_CRC_SIZE, "little") if options.verify else b""
    return stored + crc
