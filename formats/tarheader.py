# SPDX-License-Identifier: Apache-2.0
"""Tar's 512-byte headers, and the pax records that say what does not fit in them.

What all readers of tars have in common: numbers, checksums, names, records. Whether a block
is a header at all, and what follows it, is the readers' own matter.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

from formats.errors import FormatError

BLOCK = 512
EXTENSION_LIMIT = 1 << 20  # of one pax or long-name body, as in Go's reader: real ones are a few hundred bytes
EXTENSION_COUNT = 16  # headers before a member; writers use at most three

PAX = b"x"
PAX_GLOBAL = b"g"
LONG_NAME = b"L"
LONG_LINK = b"K"

POSIX_MAGIC = b"ustar"
GNU_MAGIC = b"ustar  \0"

_NUMBERS_KEPT = 4096  # fields whose values are remembered: modes, owners and times come again and again
_SIGN = 0x40  # in the first byte of a binary number
_INT64 = 1 << 63
_DIGITS_MAX = 19  # decimal digits of the largest 63-bit number
_CHECKSUM_AT = slice(148, 156)
_CHECKSUM_BLANKS = 8 * ord(" ")


def checksum_fits(block: bytes) -> bool:
    """Whether the header's checksum is right, of unsigned or signed bytes, as some old writers count."""
    try:
        stored = number(block[_CHECKSUM_AT], _CHECKSUM_AT.start)
    except FormatError:
        return False
    field = sum(block[_CHECKSUM_AT])
    if block.isascii():
        # Adler-32's lower half is the bytes' sum, which of ASCII does not reach its modulus: 5 times sum()'s speed.
        return (zlib.adler32(block, 0) & 0xFFFF) - field + _CHECKSUM_BLANKS == stored
    blanked = block[: _CHECKSUM_AT.start] + b" " * 8 + block[_CHECKSUM_AT.stop :]
    unsigned = sum(blanked)
    return stored in (unsigned, unsigned - 256 * sum(byte >= 128 for byte in blanked))


def number(field: bytes, offset: int) -> int:
    """Octal with blanks and NULs around it, or GNU's big-endian binary with the top bit set; 64 bits at most."""
    try:
        return _number(field)
    except FormatError as error:
        raise FormatError(error.what, offset) from None


def natural(field: bytes, offset: int) -> int:
    """A number that cannot be negative."""
    value = number(field, offset)
    if value < 0:
        raise FormatError("impossible number in a tar header", offset)
    return value


@lru_cache(_NUMBERS_KEPT)
def _number(field: bytes) -> int:
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        value -= (1 << bits) if field[0] & _SIGN else 0
        if not -_INT64 <= value < _INT64:
            raise FormatError("impossible number in a tar header")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if not digits:
        return 0
    try:
        return int(digits if digits.isdigit() else b"bad", 8)
    except ValueError:
        raise FormatError("bad octal number in a tar header") from None


def text_of(field: bytes) -> bytes:
    """The field up to its first NUL."""
    return field.partition(b"\0")[0]


def pax_records(body: bytes, offset: int) -> list[tuple[bytes, bytes]]:
    """Records `<length> <key>=<value>\\n`, in their order; the length counts the whole record."""
    records: list[tuple[bytes, bytes]] = []
    at = 0
    while at < len(body):
        digits, _, _ = body[at : at + _DIGITS_MAX].partition(b" ")
        start = at + len(digits) + 1
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[start : end - 1].partition(b"=")
        if not start < end <= len(body) or body[end - 1] != ord("\n") or not equals:
            raise FormatError("bad pax record", offset + at)
        records.append((key, value))
        at = end
    return records


def pax_number(key: bytes, value: bytes, offset: int) -> int:
    """The decimal number that a pax record holds; 63 bits at most."""
    if not value.isdigit() or len(value) > _DIGITS_MAX or int(value) >= _INT64:
        raise FormatError(f"bad {key.decode('ascii', 'replace')} in a pax record", offset)
    return int(value)


def rounded(length: int) -> int:
    """Bytes that a body of `length` takes in a tar."""
    return -(-length // BLOCK) * BLOCK
