# SPDX-License-Identifier: Apache-2.0
"""The presence map: which extents of a cached blob are there, and their checksums.

Layout in docs/formats/presence-map.md. This module owns the 512-byte head; the table
behind it is read and written by the engine (native/cache.c), which knows of the head only
where the seal lies, and takes it away. A head with a wrong CRC, an unknown version or
another extent size is a FormatError: the owner starts an empty map.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import construct as c

from formats.crc32c import standard
from formats.errors import FormatError

HEAD_SIZE = 512
TABLE_OFFSET = 4096  # own page: a torn write of the head leaves the table alone
EXTENT_SIZE = 65536
SEAL_OFFSET = HEAD_SIZE - 4
SEAL_SIZE = 4
VERSION = 4  # of maps that say whose extents they have; the others are written as what they were before
VERSION_TABLE = 3  # of those that say what their extents were held against
VERSION_UNCHECKED = 2  # of those that say neither

_MAGIC = b"OCIBLKPM"
_CRC_OFFSET = SEAL_OFFSET - 4
_SIZE_LIMIT = 1 << 63  # file offsets are signed
_DIGEST_SIZE = 144  # "sha512:" and 128 hex digits fit
_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[0-9a-f]{32,128}")
_SHA256_SIZE = 32
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}|")

_HEAD = c.Struct(
    "magic" / c.Bytes(8),
    "version" / c.Int32ul,
    "extent_size" / c.Int32ul,
    "size" / c.Int64ul,
    "digest" / c.Bytes(_DIGEST_SIZE),
    "table" / c.Bytes(_SHA256_SIZE),
    "repository" / c.Bytes(_SHA256_SIZE),
    c.Padding(_CRC_OFFSET - 168 - 2 * _SHA256_SIZE),
    "crc" / c.Int32ul,
    "seal" / c.Int32ul,
)


class NewerVersion(FormatError):
    """A later program wrote the map: not ours to throw away."""


@dataclass(frozen=True)
class Head:
    """Whose map this is. `verified`: the whole blob is there and its digest matched, says the seal.

    table: the digest of the table (formats/digests.py) that all of its extents were held against
    before they were entered, "" if they were held against none.

    repository: the sha256 of the name of the repository (blockdev/catalog.py, Place.name) that they
    came from, so far as neither seal nor table speaks for them; "" if that is not known.
    """

    blob_digest: str
    size: int
    verified: bool
    table: str = ""
    repository: str = ""

    def build(self) -> bytes:
        """HEAD_SIZE bytes. FormatError if the digest or the size cannot be written."""
        if not _DIGEST.fullmatch(self.blob_digest) or len(self.blob_digest) > _DIGEST_SIZE:
            raise FormatError(f"not a digest: {self.blob_digest!r}")
        if not 0 <= self.size < _SIZE_LIMIT:
            raise FormatError(f"impossible blob size {self.size}")
        for named in (self.table, self.repository):
            if not _SHA256.fullmatch(named):
                raise FormatError(f"not the sha256 of a table or repository: {named!r}")
        fields = {
            "magic": _MAGIC,
            "version": VERSION if self.repository else VERSION_TABLE if self.table else VERSION_UNCHECKED,
            "extent_size": EXTENT_SIZE,
            "size": self.size,
            "digest": self.blob_digest.encode().ljust(_DIGEST_SIZE, b"\0"),
            "table": _raw(self.table),
            "repository": _raw(self.repository),
            "crc": 0,
            "seal": 0,
        }
        head: bytes = _HEAD.build(fields)
        crc = standard(head[:_CRC_OFFSET])
        seal = _seal(crc) if self.verified else 0
        return head[:_CRC_OFFSET] + crc.to_bytes(4, "little") + seal.to_bytes(SEAL_SIZE, "little")

    @classmethod
    def parse(cls, head: bytes) -> Head:
        """The first HEAD_SIZE bytes of a map file."""
        if len(head) != HEAD_SIZE:
            raise FormatError(f"presence map head is {len(head)} bytes, not {HEAD_SIZE}")
        fields = _HEAD.parse(head)
        if fields.magic != _MAGIC:
            raise FormatError("not a presence map", 0)
        if fields.crc != standard(head[:_CRC_OFFSET]):
            raise FormatError("presence map head fails its checksum", _CRC_OFFSET)
        if fields.version > VERSION:
            raise NewerVersion(f"presence map version {fields.version}, this program knows {VERSION}", 8)
        if fields.version < VERSION_UNCHECKED:
            raise FormatError(f"presence map version {fields.version} is too old", 8)
        if fields.extent_size != EXTENT_SIZE:
            raise FormatError(f"presence map has extents of {fields.extent_size} bytes, not {EXTENT_SIZE}", 12)
        digest = fields.digest.rstrip(b"\0").decode("latin-1")
        if not _DIGEST.fullmatch(digest) or fields.size >= _SIZE_LIMIT:
            raise FormatError("presence map names no blob", 16)
        table = _sha256(fields.table) if fields.version >= VERSION_TABLE else ""
        repository = _sha256(fields.repository) if fields.version >= VERSION else ""
        return cls(digest, fields.size, fields.seal == _seal(fields.crc), table, repository)


def _raw(digest: str) -> bytes:
    return bytes.fromhex(digest.partition(":")[2]).ljust(_SHA256_SIZE, b"\0")


def _sha256(raw: bytes) -> str:
    return f"sha256:{raw.hex()}" if any(raw) else ""


def _seal(crc: int) -> int:
    """The seal of a head with this CRC: no other blob's, and never the 0 that says broken."""
    return crc or 1


def extent_count(size: int) -> int:
    """Table entries of a blob of `size` bytes."""
    return -(-size // EXTENT_SIZE)


def map_size(size: int) -> int:
    """Bytes of the whole map file for a blob of `size` bytes."""
    return TABLE_OFFSET + 4 * extent_count(size)


def absent_runs(table: bytes, first: int, count: int) -> list[tuple[int, int]]:
    """Runs (extent, extents) that a piece of the table, `count` entries from `first` on, has not got.

    What the piece is too short for is absent.
    """
    whole = table[: 4 * count].ljust(4 * count, b"\0")
    runs: list[tuple[int, int]] = []
    start = -1
    for extent, (entry,) in enumerate(struct.iter_unpack("<I", whole), first):
        if not entry and start < 0:
            start = extent
        elif entry and start >= 0:
            runs.append((start, extent - start))
            start = -1
    return [*runs, (start, first + count - start)] if start >= 0 else runs


def extent_entry(extent: bytes | memoryview) -> int:
    """The table entry that says these bytes are present: their CRC32C, and 1 where that is 0."""
    return standard(extent) or 1
