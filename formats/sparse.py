# SPDX-License-Identifier: Apache-2.0
"""The maps of GNU tar's sparse files: where in the file the stored bytes belong.

Four forms: the old header of type S with its blocks of further entries, and pax records 0.0
(a pair of records for each segment), 0.1 (one record) and 1.0 (text at the front of the body).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from formats.errors import FormatError
from formats.tarheader import BLOCK, EXTENSION_LIMIT, natural, pax_number

Segments = list[tuple[int, int]]  # offset in the file, bytes
NextBlock = Callable[[], bytes | None]

NAME = b"GNU.sparse.name"

_MAP = b"GNU.sparse.map"
_OFFSET = b"GNU.sparse.offset"
_LENGTH = b"GNU.sparse.numbytes"
_SIZES = (b"GNU.sparse.realsize", b"GNU.sparse.size")
_MAJOR = b"GNU.sparse.major"
_MINOR = b"GNU.sparse.minor"

_ENTRY = 24  # bytes: offset and length, 12 each
_IN_HEADER = range(386, 386 + 4 * _ENTRY, _ENTRY)
_IN_BLOCK = range(0, 21 * _ENTRY, _ENTRY)
_HEADER_GOES_ON = 482
_BLOCK_GOES_ON = 504
_REAL_SIZE = slice(483, 495)


def gathered(records: list[tuple[bytes, bytes]], offset: int) -> dict[bytes, bytes]:
    """Records by key, the last of each; the pairs of form 0.0, whose keys repeat, as the one record of form 0.1."""
    pairs = [(key, value) for key, value in records if key in (_OFFSET, _LENGTH)]
    found = dict(records)
    if not pairs:
        return found
    if any(key != (_OFFSET, _LENGTH)[i % 2] or b"," in value for i, (key, value) in enumerate(pairs)):
        raise FormatError("bad sparse map in a pax header", offset)
    return found | {_MAP: b",".join(value for _, value in pairs)}


def old(block: bytes, next_block: NextBlock, start: int) -> tuple[int, Segments]:
    """The real size and the map of a header of type S; the blocks of the map that follow it are read."""
    segments = list(_old_entries(block, _IN_HEADER, start))
    goes_on = block[_HEADER_GOES_ON]
    for _ in range(EXTENSION_LIMIT // BLOCK):
        if not goes_on:
            return natural(block[_REAL_SIZE], start + _REAL_SIZE.start), segments
        further = next_block()
        if further is None:
            break
        segments += _old_entries(further, _IN_BLOCK, start)
        goes_on = further[_BLOCK_GOES_ON]
    raise FormatError("sparse map without an end", start)


def _old_entries(block: bytes, places: range, start: int) -> Iterator[tuple[int, int]]:
    for at in places:
        if not block[at]:
            return
        yield natural(block[at : at + 12], start), natural(block[at + 12 : at + _ENTRY], start)


def is_sparse(pax: dict[bytes, bytes]) -> bool:
    """Whether the pax records are those of a sparse file, of whatever form."""
    return _MAP in pax or _MAJOR in pax or _MINOR in pax


def pax(records: dict[bytes, bytes], body_block: NextBlock, start: int) -> tuple[int, Segments]:
    """The real size and the map that the records hold, or that the front of the body does."""
    version = records.get(_MAJOR, b"0") + b"." + records.get(_MINOR, b"0")
    size_key = next((key for key in _SIZES if key in records), None)
    if size_key is None or version not in (b"0.0", b"0.1", b"1.0"):
        raise FormatError("unknown form of a sparse file", start)
    size = pax_number(size_key, records[size_key], start)
    if version == b"1.0":
        return size, _text_map(body_block, start)
    texts = records[_MAP].split(b",") if records.get(_MAP) else []
    return size, _paired([pax_number(_MAP, text, start) for text in texts], start)


def _text_map(body_block: NextBlock, start: int) -> Segments:
    """Lines of decimal numbers: how many pairs, then the pairs; padded to a block."""
    count = 0
    pieces: list[bytes] = []
    lines = 0
    for _ in range(EXTENSION_LIMIT // BLOCK):
        block = body_block()
        if block is None:
            break
        pieces.append(block)
        lines += block.count(b"\n")
        if not count and lines:
            count = pax_number(_MAP, b"".join(pieces).partition(b"\n")[0], start) * 2 + 1
        if count and lines >= count:
            texts = b"".join(pieces).split(b"\n")[1:count]
            return _paired([pax_number(_MAP, text, start) for text in texts], start)
    raise FormatError("sparse map without an end", start)


def _paired(numbers: list[int], start: int) -> Segments:
    if len(numbers) % 2:
        raise FormatError("sparse map of an odd count of numbers", start)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def check(segments: Segments, size: int, stored: int, start: int) -> None:
    """FormatError unless the segments are in order, within `size`, and as long as what is stored."""
    end = 0
    for offset, length in segments:
        if offset < end:
            raise FormatError("sparse map that goes back", start)
        end = offset + length
    if end > size or sum(length for _, length in segments) != stored:
        raise FormatError("sparse map that does not fit its file", start)
