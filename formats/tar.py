# SPDX-License-Identifier: Apache-2.0
"""The tar wrapper: finding the layer inside a tar, and writing overlaybd's own shape.

Only the first member counts, whatever its name; extension headers before it (pax, GNU
long names) may take any number of blocks. docs/formats/tar.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from formats.errors import FormatError
from formats.readat import ReadAt, check_range

BLOCK = 512
WRAP_HEAD_SIZE = 3 * BLOCK

_EXTENSION_LIMIT = 1 << 20  # of one pax or long-name body: real ones are a few hundred bytes
_EXTENSION_COUNT = 16  # headers before the member; writers use at most three
_SIZE_DIGITS = 19  # decimal digits of the largest 63-bit size
_OCTAL = frozenset(b"01234567")

_POSIX = b"ustar"
_GNU_MAGIC = b"ustar  \0"
_PAX = b"x"
_PAX_GLOBAL = b"g"
_LONG_NAME = b"L"
_LONG_LINK = b"K"
_REGULAR = (b"0", b"\0", b"7")

_HEADER = c.Struct(
    "name" / c.Bytes(100),
    "mode" / c.Bytes(8),
    "uid" / c.Bytes(8),
    "gid" / c.Bytes(8),
    "size" / c.Bytes(12),
    "mtime" / c.Bytes(12),
    "checksum" / c.Bytes(8),
    "typeflag" / c.Bytes(1),
    "linkname" / c.Bytes(100),
    "magic" / c.Bytes(8),
    "uname" / c.Bytes(32),
    "gname" / c.Bytes(32),
    "devmajor" / c.Bytes(8),
    "devminor" / c.Bytes(8),
    "prefix" / c.Bytes(155),
    c.Padding(12),
)
_CHECKSUM_AT = slice(148, 156)


@dataclass(frozen=True)
class Payload:
    """Where the first member's bytes are, and what the tar calls it."""

    base: int
    length: int
    name: str


def find_payload(r: ReadAt) -> Payload | None:
    """The first regular member of a tar. None: not a tar. FormatError: a tar that is cut or holds something else."""
    if r.size < BLOCK:
        return None
    block = r.read_at(0, BLOCK)
    if not _is_header(block):
        return None
    position = 0
    name: str | None = None
    size = 0
    for _ in range(_EXTENSION_COUNT + 1):
        header = _HEADER.parse(block)
        body = position + BLOCK
        if header.typeflag in _REGULAR:
            length = size or _number(header.size, position + 124)
            check_range(body, length, r.size)
            return Payload(body, length, name or _header_name(header))
        if header.typeflag not in (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK):
            raise FormatError("the first member of the tar is not a regular file", position + 156)
        length = _number(header.size, position + 124)
        if length > _EXTENSION_LIMIT:
            raise FormatError(f"tar extension header of {length} bytes", position)
        extension = r.read_at(body, length)
        if header.typeflag == _PAX:
            records = _pax_records(extension, body)
            size = _pax_size(records, body) or size
            name = _text(records[b"path"]) if b"path" in records else name
        elif header.typeflag == _LONG_NAME:
            name = _text(extension.split(b"\0", 1)[0])
        position = body + _rounded(length)
        block = r.read_at(position, BLOCK)
        if not _is_header(block):
            raise FormatError("tar header is damaged", position)
    raise FormatError(f"more than {_EXTENSION_COUNT} tar extension headers", position)


def _is_header(block: bytes) -> bool:
    magic = block[257:265]
    if magic != _GNU_MAGIC and not (magic[:5] == _POSIX and magic[6:] == b"00"):
        return False
    try:
        stored = _number(block[_CHECKSUM_AT], 148)
    except FormatError:
        return False
    return stored in _checksums(block)


def _checksums(block: bytes) -> tuple[int, int]:
    """Byte sums with the checksum field as blanks: unsigned, and signed as some old writers count."""
    blanked = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(blanked)
    return unsigned, unsigned - 256 * sum(byte >= 128 for byte in blanked)


def _number(field: bytes, offset: int) -> int:
    """Octal with blanks and NULs around it, or GNU's big-endian binary with the top bit set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40 or value >> 63:
            raise FormatError("impossible number in a tar header", offset)
        return value
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not _OCTAL.issuperset(digits):
        raise FormatError("bad octal number in a tar header", offset)
    return int(digits or b"0", 8)


def _pax_records(body: bytes, offset: int) -> dict[bytes, bytes]:
    """Records `<length> <key>=<value>\\n`; the length counts the whole record."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        digits, _, _ = body[at : at + _SIZE_DIGITS].partition(b" ")
        start = at + len(digits) + 1
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[start : end - 1].partition(b"=")
        if not start < end <= len(body) or body[end - 1] != ord("\n") or not equals:
            raise FormatError("bad pax record", offset + at)
        records[key] = value
        at = end
    return records


def _pax_size(records: dict[bytes, bytes], offset: int) -> int:
    value = records.get(b"size", b"0")
    if not value.isdigit() or len(value) > _SIZE_DIGITS:
        raise FormatError("bad size in a pax record", offset)
    return int(value)


def _header_name(header: c.Container) -> str:
    name = _text(header.name.split(b"\0", 1)[0])
    prefix = _text(header.prefix.split(b"\0", 1)[0]) if header.magic != _GNU_MAGIC else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _rounded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def wrap_head(payload_size: int) -> bytes:
    """The WRAP_HEAD_SIZE bytes overlaybd-commit puts before a payload, byte exact."""
    if not 0 <= payload_size < 1 << 63:
        raise FormatError(f"impossible payload size {payload_size}")
    record = _size_record(payload_size)
    pax = _header_block(name=b"overlaybd.pax", size=_padded_octal(len(record)), typeflag=_PAX)
    member = _header_block(
        name=b"overlaybd.commit",
        mode=b"100644 \0",
        uid=b"     0 \0",
        gid=b"     0 \0",
        size=_padded_octal(0),
        mtime=_padded_octal(0),
        typeflag=b"0",
        uname=b"root",
        gname=b"root",
    )
    return pax + record.ljust(BLOCK, b"\0") + member


def padding(size: int) -> bytes:
    """Zeros that follow a body of `size` bytes, up to a block."""
    return bytes(_rounded(size) - size)


END = bytes(2 * BLOCK)  # of an archive


def wrap_tail(payload_size: int) -> bytes:
    """What follows the payload: zeros up to a block, then two blocks of zeros."""
    return padding(payload_size) + END


def member_head(name: bytes, size: int) -> bytes:
    """The header of a plain file, as it stands before a member that comes after the payload."""
    return _header_block(
        name=name,
        mode=b"0000444\0",
        uid=b"0000000\0",
        gid=b"0000000\0",
        size=b"%011o\0" % size,
        mtime=b"%011o\0" % 0,
        typeflag=b"0",
    )


def _size_record(payload_size: int) -> bytes:
    body = f" size={payload_size}\n"
    length = len(body) + 1
    while len(f"{length}{body}") != length:
        length += 1
    return f"{length}{body}".encode()


def _padded_octal(value: int) -> bytes:
    return f"{value:11o} ".encode()


def _header_block(**fields: bytes) -> bytes:
    blank = {sub.name: b"" for sub in _HEADER.subcons if sub.name}
    values = blank | fields | {"magic": b"ustar\x0000", "checksum": b" " * 8}
    padded = {sub.name: values[sub.name].ljust(sub.sizeof(), b"\0") for sub in _HEADER.subcons if sub.name}
    block: bytes = _HEADER.build(padded)
    return block[:148] + f"{sum(block):6o} \0".encode() + block[156:]
