# SPDX-License-Identifier: Apache-2.0
"""Layer blobs are uncompressed whatever they are, in bounded pieces, and a cut one is an error."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blockdev.build.plain import plain
from formats.errors import FormatError
from tests.mutations import damaged, value_or_format_error
from tests.tars import reader

TEXT = b"".join(b"%d some text of a layer\n" % i for i in range(40_000))
PIECE = 1 << 20


def zstd(content: bytes, level: int = 3, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level, **options).compress(content)


def skippable(content: bytes) -> bytes:
    return (0x184D2A5E).to_bytes(4, "little") + len(content).to_bytes(4, "little") + content


def unpacked(blob: bytes, piece: int = PIECE, wanted: int = PIECE) -> bytes:
    read = plain(reader(blob, piece))
    out = bytearray()
    while part := read(wanted):
        assert len(part) <= wanted
        out += part
    return bytes(out)


BLOBS: dict[str, bytes] = {
    "plain": TEXT,
    "gzip": gzip.compress(TEXT),
    "gzip of many members": b"".join(gzip.compress(TEXT[at : at + 5000]) for at in range(0, len(TEXT), 5000)),
    "gzip of empty members": gzip.compress(b"") * 50 + gzip.compress(TEXT) + gzip.compress(b"") * 50,
    "gzip with zeros behind": gzip.compress(TEXT) + bytes(100_000),
    "gzip with a name": b"\x1f\x8b\x08\x08\0\0\0\0\0\x03layer.tar\0" + gzip.compress(TEXT)[10:],
    "zstd": zstd(TEXT),
    "zstd of many frames": b"".join(zstd(TEXT[at : at + 5000]) for at in range(0, len(TEXT), 5000)),
    "zstd with checksum": zstd(TEXT, write_checksum=True),
    "zstd without size": zstd(TEXT, write_content_size=False),
    "zstd of high level": zstd(TEXT, 19),
    "zstd with skippable frames": skippable(b"x" * 100_000) + zstd(TEXT) + skippable(b"table of contents"),
    "zstd of empty frames": zstd(b"") * 20 + zstd(TEXT) + zstd(b"") * 20,
}
WHOLE = {name: blob for name, blob in BLOBS.items() if name != "plain"}


@pytest.mark.parametrize("blob", BLOBS.values(), ids=BLOBS)
@pytest.mark.parametrize(("piece", "wanted"), [(PIECE, PIECE), (1000, PIECE), (PIECE, 700)])
def test_every_form_gives_its_content(blob: bytes, piece: int, wanted: int) -> None:
    assert zlib.crc32(unpacked(blob, piece, wanted)) == zlib.crc32(TEXT)


@pytest.mark.parametrize("content", [b"", b"x", b"\x1f", b"\x28\xb5\x2f", bytes(5)])
def test_what_is_too_short_for_a_magic_is_plain(content: bytes) -> None:
    assert unpacked(content) == content


@pytest.mark.parametrize(
    "blob", [gzip.compress(TEXT[:3000]), zstd(TEXT[:3000], write_checksum=True)], ids=["gzip", "zstd"]
)
def test_a_blob_cut_anywhere_is_an_error(blob: bytes) -> None:
    for cut in range(4, len(blob)):
        with pytest.raises(FormatError):
            unpacked(blob[:cut])


@pytest.mark.parametrize(
    "cut",
    [
        BLOBS["gzip"] + gzip.compress(TEXT)[:20],
        BLOBS["zstd"] + zstd(TEXT)[:20],
        BLOBS["zstd"] + zstd(TEXT)[:6],
        BLOBS["zstd"] + skippable(b"x" * 100)[:50],
        BLOBS["zstd"] + skippable(b"x" * 100)[:6],
        BLOBS["gzip"] + b"\x1f\x8b",
        BLOBS["zstd"] + b"\x28",
    ],
)
def test_a_later_member_or_frame_that_is_cut_is_an_error(cut: bytes) -> None:
    with pytest.raises(FormatError):
        unpacked(cut)


@pytest.mark.parametrize("behind", [b"junk", bytes(100_000) + b"x", b"\x1f\x8c" + bytes(100)])
@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_what_follows_a_compressed_layer_is_an_error(form: str, behind: bytes) -> None:
    with pytest.raises(FormatError):
        unpacked(BLOBS[form] + behind)


def changed(blob: bytes, place: int) -> bytes:
    return blob[:place] + bytes([blob[place] ^ 0x55]) + blob[place + 1 :]


@pytest.mark.parametrize("form", ["gzip", "zstd with checksum"])
def test_changed_content_is_an_error(form: str) -> None:
    blob = BLOBS[form]
    for place in (-1, -3, len(blob) // 2):
        with pytest.raises(FormatError):
            unpacked(changed(blob, place % len(blob)))


def zstd_of_one_byte_blocks(blocks: int) -> bytes:
    """A frame without a size whose blocks are of one repeated byte: 128 KiB out of 4 bytes."""
    head = b"\x28\xb5\x2f\xfd" + b"\0" + b"\x38"  # window of 128 KiB
    block = (1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"\0"
    last = (1).to_bytes(3, "little")
    return head + block * blocks + last


@pytest.mark.parametrize(
    "bomb", [gzip.compress(bytes(1 << 28)), zstd_of_one_byte_blocks(1 << 11)], ids=["gzip", "zstd"]
)
def test_a_bomb_comes_in_pieces(bomb: bytes) -> None:
    """256 MiB out of 256 KiB and out of 8 KiB."""
    read = plain(reader(bomb))
    total = 0
    tracemalloc.start()
    try:
        while part := read(PIECE):
            assert len(part) <= PIECE
            total += len(part)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert total == 1 << 28


def test_a_window_beyond_bounds_is_refused() -> None:
    with pytest.raises(FormatError, match="damaged zstd frame"):
        unpacked(b"\x28\xb5\x2f\xfd" + b"\0" + b"\xf8" + zstd_of_one_byte_blocks(1)[6:])


@pytest.mark.parametrize(
    "blob", [b"\x28\xb5\x2f\xfd" + b"\x08" * 20, b"\x28\xb5\x2f\xfd\0\x38\xff\xff\xff" + bytes(50)]
)
def test_bad_heads_and_blocks_of_zstd_are_refused(blob: bytes) -> None:
    with pytest.raises(FormatError):
        unpacked(blob)


@given(content=damaged([blob for blob in WHOLE.values() if len(blob) < 20_000] + [gzip.compress(b"x"), zstd(b"x")]))
def test_damaged_blobs_are_bytes_or_format_errors(content: bytes) -> None:
    value_or_format_error(lambda: unpacked(content))


@given(
    parts=st.lists(st.binary(max_size=300), max_size=6),
    compress=st.sampled_from((gzip.compress, zstd)),
    piece=st.integers(1, 100),
)
def test_any_split_into_members_is_the_same_content(
    parts: list[bytes], compress: Callable[[bytes], bytes], piece: int
) -> None:
    assert unpacked(b"".join(map(compress, parts)), piece) == b"".join(parts)
