# SPDX-License-Identifier: Apache-2.0
"""The fuzz targets of formats/ and of what builds on it: any bytes are a value or the one error, and nothing else.

A target takes the bytes of one input and raises if a parser breaks its promise. Where two
readers exist, or a builder beside the parser, they are held against each other. The first
byte of an input says how the rest is meant: where a checksum guards a head, one bit has
it made right, so that changes get past it.

`python -m tests.fuzz.parsers TARGET FILE_OR_FOLDER...` runs kept inputs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from formats import digests, imagespec, layout, lsmt, nbdwire, oci, pair, presence, superblock, tar, zfile
from formats.crc32c import crc32c, standard
from formats.errors import FormatError
from formats.readat import BytesAt
from tests import oracle
from tests.fuzz.archives import archive
from tests.fuzz.filesystems import erofs

FIX = 1  # bit of the first byte: make checksums right
SEAL = 2  # bit of the first byte: a presence map's seal is right too
MAP_CRC_SIZE = 4  # of the head's CRC, and of the seal behind it
HEAD_WORDS = ((168, 3), (200, 4))  # of a presence map: what was checked with, and whose; from which version on
READ_MAX = 1 << 20  # bytes of a decoded layer that are read
SECTORS_MAX = 100_000  # of a log that is compared sector by sector
HEAD_FRONT = 136  # bytes of an LSMT head: all but its version and tag, which nobody judges
HEAD_DIGEST = slice(28, 32)  # of a ZFile head
TAR_CHECKSUM = slice(148, 156)


def layer(content: bytes) -> None:
    """A blob as one layer: tar, then ZFile, then LSMT or a disk."""
    how, blob = content[:1], content[1:]
    if how and how[0] & FIX:
        blob = _fixed_layer(blob)
    superblock.file_system(blob[: superblock.HEAD_SIZE])
    with suppress(FormatError):
        disk = oracle.Disk([oracle.open_layer(BytesAt(blob))])
        for run in disk.runs()[:64]:
            disk.read_at(run.offset, min(run.length, READ_MAX))


def _fixed_layer(blob: bytes) -> bytes:
    """Tar headers before a payload, and ZFile heads at both its ends, with the checksums they claim."""
    base = 0
    while blob[base + 257 : base + 262] == b"ustar":
        header = blob[base : base + TAR_CHECKSUM.start] + b" " * 8 + blob[base + TAR_CHECKSUM.stop : base + tar.BLOCK]
        checked = header[: TAR_CHECKSUM.start] + b"%06o\0 " % sum(header) + header[TAR_CHECKSUM.stop :]
        blob = blob[:base] + checked + blob[base + tar.BLOCK :]
        base += tar.BLOCK * (1 if checked[156:157] in b"0\0" else 2)
    for start in (base, len(blob) - zfile.HEAD_SIZE):
        if blob[start : start + 5] == b"ZFile" and start + zfile.HEAD_SIZE <= len(blob):
            blob = _fixed_zfile_head(blob, start, base)
    return blob


def _fixed_zfile_head(blob: bytes, start: int, base: int) -> bytes:
    head = bytearray(blob[start : start + zfile.HEAD_SIZE])
    table_at = base + int.from_bytes(head[40:48], "little")
    table = blob[table_at : table_at + 4 * min(int.from_bytes(head[48:56], "little"), len(blob))]
    head[64:68] = crc32c(0, table).to_bytes(4, "little")
    head[HEAD_DIGEST] = bytes(4)
    head[HEAD_DIGEST] = crc32c(0, bytes(head)).to_bytes(4, "little")
    return blob[:start] + bytes(head) + blob[start + zfile.HEAD_SIZE :]


def log(content: bytes) -> None:
    """A read-write pair: sectors of data, what both heads start with, then entries."""
    sectors, heads, entries = content[:1], content[1 : 1 + 2 * HEAD_FRONT], content[1 + 2 * HEAD_FRONT :]
    stored = b"".join(bytes([i]) * lsmt.SECTOR for i in range(sectors[0] if sectors else 0))
    data = BytesAt(heads[:HEAD_FRONT].ljust(lsmt.HEAD_SIZE, b"\0") + stored)
    index = BytesAt(heads[HEAD_FRONT:].ljust(lsmt.HEAD_SIZE, b"\0") + entries)
    with suppress(FormatError):
        opened = lsmt.open_log(index, data)
        written = list(lsmt.read_log(index, opened))
        live = pair.replay(written)
        if sum(entry.length for entry in written) <= SECTORS_MAX:
            assert _sectors(live) == _last_wins(written), "replay is not the last entry of each sector"
        _read_back(opened.head, live, data)


def _sectors(live: list[lsmt.Segment]) -> dict[int, tuple[bool, int]]:
    found: dict[int, tuple[bool, int]] = {}
    for first, second in pairwise(live):
        assert first.end <= second.offset, "replay has overlaps"
    for segment in live:
        found |= _places(segment)
    return found


def _last_wins(entries: list[lsmt.Segment]) -> dict[int, tuple[bool, int]]:
    found: dict[int, tuple[bool, int]] = {}
    for segment in entries:
        found |= _places(segment)
    return found


def _places(segment: lsmt.Segment) -> dict[int, tuple[bool, int]]:
    """Where each sector of an entry is stored."""
    return {
        segment.offset + i: (segment.zeroed, 0 if segment.zeroed else segment.moffset + i)
        for i in range(segment.length)
    }


def _read_back(head: lsmt.Head, live: list[lsmt.Segment], data: BytesAt) -> None:
    """Sealed and committed, the pair reads as it did."""
    disk = oracle.Disk([oracle.Layer(head.virtual_size, live, data)])
    if any(segment.end * lsmt.SECTOR > head.virtual_size for segment in live):
        return
    whole = data.read_at(0, data.size - data.size % lsmt.SECTOR)
    sealed = lsmt.open_sealed(BytesAt(whole + pair.seal(head, len(whole), live)))
    assert sealed.head.virtual_size == head.virtual_size
    committed = bytearray()
    lsmt.commit(live, [data] * 256, committed.extend, head)
    again = oracle.open_layer(BytesAt(bytes(committed)))
    for segment in live[:16]:
        at, length = segment.offset * lsmt.SECTOR, segment.length * lsmt.SECTOR
        assert oracle.Disk([again]).read_at(at, length) == disk.read_at(at, length)


def head(content: bytes) -> None:
    """A presence map: its head builds the same head again, and what its table lacks is what is 0 in it."""
    how, raw, table = content[:1], content[1 : 1 + presence.HEAD_SIZE], content[1 + presence.HEAD_SIZE :]
    if how and how[0] & FIX:
        raw = raw.ljust(presence.HEAD_SIZE, b"\0")
        crc = standard(raw[: -2 * MAP_CRC_SIZE])
        seal = (crc or 1).to_bytes(MAP_CRC_SIZE, "little") if how[0] & SEAL else raw[-MAP_CRC_SIZE:]
        raw = raw[: -2 * MAP_CRC_SIZE] + crc.to_bytes(MAP_CRC_SIZE, "little") + seal
    with suppress(FormatError):
        parsed = presence.Head.parse(raw)
        said = [raw[at : at + 32] if raw[8] >= since else bytes(32) for at, since in HEAD_WORDS]
        assert [bytes.fromhex(word[7:]).ljust(32, b"\0") for word in (parsed.table, parsed.repository)] == said
        assert presence.Head.parse(parsed.build()) == parsed
        assert presence.map_size(parsed.size) >= presence.TABLE_OFFSET
    first, count = len(table) % 7, len(table) // 3
    runs = presence.absent_runs(table, first, count)
    absent = {extent for start, length in runs for extent in range(start, start + length)}
    entries = [table[4 * i : 4 * i + 4].ljust(4, b"\0") for i in range(count)]
    assert absent == {first + i for i, entry in enumerate(entries) if entry == bytes(4)}
    assert presence.extent_entry(table)


def table(content: bytes) -> None:
    """A digest table, whose head fits its digests where the first byte says so, and a unit held against it."""
    how, body = content[:1], content[1:]
    if how and how[0] & FIX and len(body) >= digests.HEAD_SIZE:
        count = (len(body) - digests.HEAD_SIZE) // digests.DIGEST_SIZE
        covered = count * digests.UNIT - tar.BLOCK * (how[0] >> 1)
        numbers = covered.to_bytes(8, "little", signed=True) + count.to_bytes(8, "little")
        body = body[:16] + numbers + body[32:]
    with suppress(FormatError):
        parsed = digests.Table.parse(body)
        assert parsed.build() == body
        assert digests.Place.of(parsed.place.annotations(), parsed.blob_size) == parsed.place
        last = digests.unit_count(parsed.blob_size) - 1
        start, length = parsed.span(last)
        assert start + length == parsed.blob_size
        parsed.matches(last, bytes(max(0, parsed.covered - start)) + parsed.tail[-length:])
    with suppress(FormatError):
        fields = body.decode("latin-1").split("\n")
        names = digests.Place(tar.BLOCK, "").annotations()
        digests.Place.of(dict(zip(names, fields, strict=False)), len(content))


# ---- documents ----


def document(content: bytes) -> None:
    """References, digests and JSON documents: the bytes themselves, or a document that they pick the parts of."""
    how, rest = (content[0], content[1:]) if content else (0, b"")
    if how & 15 == 0:
        _reference(rest.decode("utf-8", "replace"))
        return
    raw = (
        rest
        if how & 1
        else json.dumps(_grown(_Picks(rest), _TOP), ensure_ascii=bool(how & 2)).encode("utf-8", "surrogatepass")
    )
    for parse in (_manifest, _config, layout.check_marker, _layout):
        with suppress(FormatError):
            parse(raw)


def _reference(text: str) -> None:
    with suppress(FormatError):
        parsed = oci.Reference.parse(text)
        assert oci.Reference.parse(str(parsed)) == parsed
        assert parsed.identifier
    with suppress(FormatError):
        algorithm, hexadecimal = oci.parse_digest(text)
        assert f"{algorithm}:{hexadecimal}" == text
        assert not oci.matches(text, os.urandom(16)), "a fuzzer sees the digest of what stays the same, and forges it"


def _manifest(raw: bytes) -> None:
    parsed = oci.parse_manifest(raw)
    assert oci.parse_manifest(parsed.build()) == parsed, "a built manifest parses to another one"
    if isinstance(parsed, oci.Index):
        parsed.choose(oci.Platform.of_machine("x86_64"))
        return
    for descriptor in parsed.layers:
        with suppress(FormatError):
            assert 0 <= oci.layer_size(descriptor) < oci.SIZE_LIMIT
            oci.layer_annotations(oci.layer_digest(descriptor), oci.layer_size(descriptor))
        with suppress(FormatError):
            oci.turbo_target(descriptor)
        oci.is_overlaybd(descriptor)
        oci.is_acceleration(descriptor)


def _config(raw: bytes) -> None:
    parsed = imagespec.parse(raw)
    assert imagespec.parse(parsed.build()) == parsed, "a built config parses to another one"
    for lower in parsed.block_lowers:
        lower.candidates()
        with suppress(FormatError):
            parsed.blob_url(lower)


def _layout(raw: bytes) -> None:
    index = layout.parse_index(raw)
    for tag in (None, "v1"):
        with suppress(FormatError):
            layout.blob_path(layout.choose_tag(index, tag).digest)


class _Picks:
    """Choices made by the bytes of an input, from its front; zeros past the end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1] if self._at <= len(self._content) else 0

    def text(self) -> str:
        length = self.byte() % 16
        taken = self._content[self._at : self._at + length]
        self._at += length
        return taken.decode("utf-8", "surrogateescape")


_DIGESTS = ("sha256:" + "0" * 64, "sha512:" + "f" * 128, "sha256:0", "md5:" + "0" * 32)
_SIZES: tuple[Any, ...] = (0, 1, 4096, (1 << 63) - 1, 1 << 63, -1, 1.5, True, "7", 10**400)
_FLAT = ("file", "dir", "targetFile", "targetDigest", "gzipIndex", "data", "index", "target", "digest")
_DESCRIPTOR = ("mediaType", "digest", "size", "annotations", "platform", "file", "dir")
_ANNOTATIONS = (oci.BLOB_DIGEST, oci.BLOB_SIZE, oci.ACCELERATION_LAYER, oci.FASTOCI_TARGET_DIGEST, layout.REF_NAME)
_TOP = (
    "schemaVersion",
    "mediaType",
    "config",
    "layers",
    "manifests",
    "annotations",
    "imageLayoutVersion",
    "lowers",
    "upper",
    "repoBlobUrl",
    "resultFile",
    "accelerationLayer",
    "recordTracePath",
    "download",
)
_KEYS: dict[str, tuple[str, ...]] = {
    "config": _DESCRIPTOR,
    "layers": _DESCRIPTOR,
    "manifests": _DESCRIPTOR,
    "lowers": (*_FLAT, "size"),
    "upper": _FLAT,
    "annotations": _ANNOTATIONS,
    "platform": ("os", "architecture", "variant"),
    "download": ("enable",),
}
_RIGHT: dict[str, tuple[Any, ...]] = {
    "schemaVersion": (2, 2, 1),
    "mediaType": (oci.OCI_MANIFEST, oci.OCI_INDEX, oci.DOCKER_MANIFEST, oci.DOCKER_INDEX, oci.OCI_LAYER),
    "digest": _DIGESTS,
    oci.BLOB_DIGEST: _DIGESTS,
    oci.FASTOCI_TARGET_DIGEST: _DIGESTS,
    oci.BLOB_SIZE: ("0", "4096", "9" * 18, "9" * 19, "9" * 30, "-1", "\u0667"),
    oci.ACCELERATION_LAYER: ("yes", "no"),
    layout.REF_NAME: ("v1", "latest", ""),
    "size": _SIZES,
    "os": ("linux", "unknown", "windows"),
    "architecture": ("amd64", "arm64"),
    "variant": ("", "v8"),
    "imageLayoutVersion": ("1.0.0", "2.0.0"),
    "accelerationLayer": (True, False),
}
_LISTS = ("layers", "manifests", "lowers")
_WRONG: tuple[Any, ...] = (None, True, 0, 1e300, "", [], {}, [{}], "\ud800", "\0")


def _grown(picks: _Picks, keys: tuple[str, ...]) -> dict[str, Any]:
    """An object of keys that mean something, its values mostly of the right kind."""
    grown: dict[str, Any] = {}
    for _ in range(picks.byte() % (len(keys) + 2)):
        key = keys[picks.byte() % len(keys)]
        grown[key] = _value(picks, key)
    return grown


def _value(picks: _Picks, key: str) -> Any:
    how = picks.byte()
    if how >= 240:
        return _WRONG[how % len(_WRONG)]
    if key in _LISTS:
        return [_grown(picks, _KEYS[key]) for _ in range(how % 4)]
    if key in _KEYS:
        return _grown(picks, _KEYS[key])
    if key in _RIGHT and how < 200:
        return _RIGHT[key][how % len(_RIGHT[key])]
    return picks.text()


# ---- negotiation ----

_EXPORTS = {name: nbdwire.Export(name, size, text) for name, size, text in (("a", 1 << 20, "first"), ("\u00e9", 0, ""))}
_REPLY_HEAD = 20


def handshake(content: bytes) -> None:
    """A client's side of the negotiation, in pieces of the size the first byte says."""
    piece = 1 + (content[0] if content else 0)
    sent = content[1:]
    negotiation = nbdwire.Negotiation(_EXPORTS, "a")
    replies = len(negotiation.to_send())
    outcome: nbdwire.Outcome = None
    while sent and outcome is None:
        wanted = negotiation.wanted
        assert 0 < wanted <= nbdwire.OPTION_MAX
        outcome = negotiation.receive(sent[: min(piece, wanted)])
        sent = sent[min(piece, wanted) :]
        replies += len(negotiation.to_send())
    assert (negotiation.wanted == 0) == (outcome is not None)
    assert replies <= 64 + 512 * nbdwire.OPTIONS_MAX
    if isinstance(outcome, nbdwire.Go):
        assert outcome.export in _EXPORTS.values()
        assert outcome.structured or not outcome.allocation


TARGETS: dict[str, Callable[[bytes], None]] = {
    "layer": layer,
    "log": log,
    "archive": archive,
    "head": head,
    "table": table,
    "document": document,
    "handshake": handshake,
    "erofs": erofs,
}


def inputs(places: list[str]) -> list[Path]:
    """Files, and the files of folders."""
    return [file for place in map(Path, places) for file in (sorted(place.iterdir()) if place.is_dir() else [place])]


if __name__ == "__main__":
    for path in inputs(sys.argv[2:]):
        TARGETS[sys.argv[1]](path.read_bytes())
