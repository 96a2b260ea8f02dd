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
from formats.tarheader import (
    BLOCK,
    EXTENSION_COUNT,
    EXTENSION_LIMIT,
    GNU_MAGIC,
    LONG_LINK,
    LONG_NAME,
    PAX,
    PAX_GLOBAL,
    POSIX_MAGIC,
    checksum_fits,
    natural,
    pax_number,
    pax_records,
    rounded,
    text_of,
)

WRAP_HEAD_SIZE = 3 * BLOCK

_REGULAR = (b"0", b"\0", b"7")
_EXTENSIONS = (PAX, PAX_GLOBAL, LONG_NAME, LONG_LINK)

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
    for _ in range(EXTENSION_COUNT + 1):
        header = _HEADER.parse(block)
        body = position + BLOCK
        if header.typeflag in _REGULAR:
            length = size or natural(header.size, position + 124)
            check_range(body, length, r.size)
            return Payload(body, length, name or _header_name(header))
        if header.typeflag not in _EXTENSIONS:
            raise FormatError("the first member of the tar is not a regular file", position + 156)
        length = natural(header.size, position + 124)
        if length > EXTENSION_LIMIT:
            raise FormatError(f"tar extension header of {length} bytes", position)
        extension = r.read_at(body, length)
        if header.typeflag == PAX:
            records = dict(pax_records(extension, body))
            size = pax_number(b"size", records.get(b"size", b"0"), body) or size
            name = _text(records[b"path"]) if b"path" in records else name
        elif header.typeflag == LONG_NAME:
            name = _text(text_of(extension))
        position = body + rounded(length)
        block = r.read_at(position, BLOCK)
        if not _is_header(block):
            raise FormatError("tar header is damaged", position)
    raise FormatError(f"more than {EXTENSION_COUNT} tar extension headers", position)


def _is_header(block: bytes) -> bool:
    magic = block[257:265]
    if magic != GNU_MAGIC and not (magic[:5] == POSIX_MAGIC and magic[6:] == b"00"):
        return False
    return checksum_fits(block)


def _header_name(header: c.Container) -> str:
    name = _text(text_of(header.name))
    prefix = _text(text_of(header.prefix)) if header.magic != GNU_MAGIC else ""
    return f"{prefix}/{name}" if prefix else name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def wrap_head(payload_size: int) -> bytes:
    """The WRAP_HEAD_SIZE bytes overlaybd-commit puts before a payload, byte exact."""
    if not 0 <= payload_size < 1 << 63:
        raise FormatError(f"impossible payload size {payload_size}")
    record = _size_record(payload_size)
    pax = _header_block(name=b"overlaybd.pax", size=_padded_octal(len(record)), typeflag=PAX)
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
    return bytes(rounded(size) - size)


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
