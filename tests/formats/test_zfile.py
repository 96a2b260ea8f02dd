# SPDX-License-Identifier: Apache-2.0
"""ZFiles decode to what was compressed, are built with overlaybd's bytes, and every damage with a checksum is seen."""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import zfile
from formats.crc32c import crc32c
from formats.errors import FormatError
from formats.readat import BytesAt
from formats.zfile import HEAD_SIZE, LZ4, ZSTD, Decoder, Head, Options
from tests import fixtures, requires
from tests.mutations import damaged, value_or_format_error

SEEDS = [
    (fixtures.DATA / name).read_bytes()
    for name in ("one.lz4-4k.zfile", "one.zstd-64k.zfile", "exact4096.zstd-4k.zfile", "a-l2.lz4-4k.zlsmt")
]
ZFILES = sorted(path.name for path in (fixtures.locate() or Path("/nowhere")).glob("02-zfile/*.z*"))
PLAIN = bytes(range(256)) * 40 + bytes(3000) + b"the end"

options = st.builds(
    Options,
    codec=st.sampled_from((LZ4, ZSTD)),
    block_size=st.sampled_from((512, 4096, 65536)),
    verify=st.booleans(),
    overwrite_header=st.booleans(),
)
heads = st.builds(
    Head,
    flags=st.integers(0, (1 << 64) - 1),
    index_offset=st.integers(0, (1 << 64) - 1),
    block_count=st.integers(0, (1 << 64) - 1),
    plain_size=st.integers(0, (1 << 64) - 1),
    index_crc=st.integers(0, (1 << 32) - 1),
    block_size=st.integers(0, (1 << 32) - 1),
    codec=st.integers(0, 255),
    verify=st.booleans(),
    level=st.integers(0, 255),
    use_dict=st.booleans(),
    dict_size=st.integers(0, (1 << 32) - 1),
)


def decoded(blob: bytes) -> bytes:
    r = BytesAt(blob)
    head = zfile.open_zfile(r)
    assert head is not None
    decoder = Decoder(r, head)
    return decoder.read_at(0, decoder.size)


def parts(blob: bytes) -> tuple[Head, list[bytes]]:
    """The head that counts, and the stored blocks."""
    r = BytesAt(blob)
    head = zfile.open_zfile(r)
    assert head is not None
    offsets = zfile.read_table(r, head)
    return head, [blob[start:end] for start, end in pairwise(offsets)]


def assembled(blocks: list[bytes], plain_size: int, how: Options) -> bytes:
    """A ZFile around stored blocks, however wrong, with right checksums in heads and index."""
    body = b"".join(blocks)
    table = struct.pack(f"<{len(blocks)}I", *map(len, blocks))
    header, trailer = zfile.final_heads(how, plain_size, HEAD_SIZE + len(body), table)
    return header.build() + body + table + trailer.build()


@given(heads)
def test_a_head_survives_a_round_trip(head: Head) -> None:
    assert len(head.build()) == HEAD_SIZE
    assert Head.parse(head.build()) == head


def test_the_golden_header_bytes() -> None:
    head = Head(
        flags=0x1B,
        index_offset=4890,
        block_count=17,
        plain_size=66560,
        index_crc=0x7B7A08B8,
        block_size=4096,
        codec=LZ4,
        verify=True,
    )
    expected = (
        "60000000 ebc69558 1b00000000000000 1a13000000000000 1100000000000000 0004010000000000 b8087a7b 00000000"
        "00100000 01000000 00000000 00000000 01000000 00000000"
    )
    assert head.build()[24:96] == bytes.fromhex(expected)


@pytest.mark.parametrize("name", ZFILES)
def test_heads_flags_and_digests_of_reference_files_are_reproduced(name: str) -> None:
    blob = (fixtures.folder() / "02-zfile" / name).read_bytes()
    head, blocks = parts(blob)
    how = Options(head.codec, head.block_size, head.verify, overwrite_header=bool(head.flags & zfile.HAS_INDEX))
    assert assembled(blocks, head.plain_size, how) == blob


@pytest.mark.parametrize("name", [name for name in ZFILES if not re.match("basic|odd|exact4096.lz4", name)])
def test_reference_files_are_built_to_the_byte_where_the_codec_has_no_choice(name: str) -> None:
    """Noise, zeros and tiny inputs compress to the same bytes in every version of the libraries."""
    blob = (fixtures.folder() / "02-zfile" / name).read_bytes()
    head, _ = parts(blob)
    how = Options(head.codec, head.block_size, head.verify, overwrite_header=bool(head.flags & zfile.HAS_INDEX))
    assert zfile.build(decoded(blob), how) == blob


@pytest.mark.parametrize("row", [row for row in fixtures.rows("02") if row.kind == "zfile"], ids=str)
def test_reference_files_decode_to_the_listed_bytes(row: fixtures.Row) -> None:
    plain = decoded((fixtures.folder() / row.paths[0]).read_bytes())
    assert (len(plain), hashlib.sha256(plain).hexdigest()) == (row.size, row.sha256)


@settings(deadline=None)
@given(st.binary(max_size=9000) | st.integers(0, 70_000).map(bytes), options)
def test_what_is_built_decodes_again(plain: bytes, how: Options) -> None:
    assert decoded(zfile.build(plain, how)) == plain


@given(st.data())
def test_any_range_reads_as_that_range_of_the_whole(data: st.DataObject) -> None:
    r = BytesAt(zfile.build(PLAIN, Options(block_size=512)))
    head = zfile.open_zfile(r)
    assert head is not None
    offset = data.draw(st.integers(0, len(PLAIN)))
    length = data.draw(st.integers(0, len(PLAIN) - offset))
    assert Decoder(r, head).read_at(offset, length) == PLAIN[offset : offset + length]


def test_trailing_bytes_or_a_missing_trailer_do_not_matter_if_the_header_has_the_index() -> None:
    blob = zfile.build(PLAIN, Options())
    assert decoded(blob + bytes(512)) == PLAIN
    assert decoded(blob[:-512]) == PLAIN
    with pytest.raises(FormatError):
        decoded(blob[:-513])


def test_without_the_index_in_the_header_the_trailer_must_be_whole() -> None:
    blob = zfile.build(PLAIN, Options(overwrite_header=False))
    assert decoded(blob) == PLAIN
    for damaged_blob in (blob + bytes(512), blob[:-512], blob[:-1], blob[:600], blob[:512]):
        with pytest.raises(FormatError):
            decoded(damaged_blob)


@given(st.integers(0, 2**32), st.integers(1, 255), st.booleans())
def test_with_checksums_no_changed_byte_gives_other_content(place: int, change: int, overwrite: bool) -> None:
    blob = bytearray(zfile.build(PLAIN, Options(overwrite_header=overwrite)))
    blob[place % len(blob)] ^= change
    r = BytesAt(bytes(blob))
    try:
        head = zfile.open_zfile(r)
        if head is None:
            return
        assert Decoder(r, head).read_at(0, head.plain_size) == PLAIN
    except FormatError:
        return


def test_without_its_digest_flag_a_head_is_taken_as_it_is() -> None:
    """Files of old writers: the flag is clear, digest and index CRC are rubbish, bytes past 96 too."""
    blob = zfile.build(PLAIN, Options())
    head, _ = parts(blob)
    old = bytearray(replace(head, flags=head.flags & ~zfile.HAS_DIGEST | 0xFF00_0000, index_crc=7).build())
    old[28:32] = b"\xaa" * 4
    old[96:] = b"\xbb" * (HEAD_SIZE - 96)
    assert decoded(bytes(old) + blob[HEAD_SIZE:]) == PLAIN


def test_a_dictionary_area_moves_the_blocks() -> None:
    head, blocks = parts(zfile.build(PLAIN, Options()))
    body, table = b"".join(blocks), struct.pack(f"<{len(blocks)}I", *map(len, blocks))
    moved = replace(head, dict_size=100, index_offset=head.index_offset + 100)
    assert moved.data_offset == HEAD_SIZE + 100
    assert decoded(moved.build() + bytes(100) + body + table) == PLAIN


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 0},
        {"block_size": 256},
        {"block_size": 4097},
        {"block_size": 131072},
        {"codec": 0},
        {"codec": 3},
        {"use_dict": True},
        {"flags": zfile.FINAL_HEADER | zfile.INDEX_COMPRESSED},
        {"flags": zfile.FINAL_HEADER & ~zfile.IS_HEADER},
        {"plain_size": len(PLAIN) + 4096},
        {"plain_size": 0},
        {"plain_size": 1 << 51, "block_count": 1 << 39},
        {"block_count": (1 << 64) - 1},
        {"block_count": 1_000_000_001, "plain_size": 1_000_000_001 * 4096},
        {"index_offset": (1 << 64) - 1},
        {"index_offset": 100},
        {"index_offset": 1 << 20},
        {"dict_size": 1 << 31},
    ],
    ids=str,
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_head_that_cannot_be_is_refused(changes: dict[str, int], overwrite: bool) -> None:
    how = Options(overwrite_header=overwrite)
    blob = zfile.build(PLAIN, how)
    head, _ = parts(blob)
    changed = replace(head, **changes)  # type: ignore[arg-type]
    if overwrite:
        blob = changed.build() + blob[HEAD_SIZE:]
    else:
        blob = blob[:-HEAD_SIZE] + replace(changed, flags=changed.flags & ~zfile.HAS_INDEX).build()
        if "flags" in changes and not changes["flags"] & zfile.INDEX_COMPRESSED:
            return
    with pytest.raises(FormatError):
        zfile.open_zfile(BytesAt(blob))


def test_the_table_may_not_reach_into_the_trailer_that_describes_it() -> None:
    blob = zfile.build(PLAIN, Options(overwrite_header=False))
    trailer = Head.parse(blob[-HEAD_SIZE:])
    for shift, refused in ((0, False), (1, True)):
        changed = replace(trailer, index_offset=trailer.index_offset + shift).build()
        if refused:
            with pytest.raises(FormatError):
                zfile.open_zfile(BytesAt(blob[:-HEAD_SIZE] + changed))
        else:
            assert zfile.open_zfile(BytesAt(blob[:-HEAD_SIZE] + changed)) == trailer


def test_blocks_may_not_reach_into_the_table() -> None:
    head, blocks = parts(zfile.build(PLAIN, Options()))
    body, table = b"".join(blocks), struct.pack(f"<{len(blocks)}I", *map(len, blocks))
    changed = replace(head, index_offset=head.index_offset - 1)
    r = BytesAt(changed.build() + body[:-1] + table)
    with pytest.raises(FormatError, match="run into the index"):
        zfile.read_table(r, changed)


@pytest.mark.parametrize("flags", [0x17, 0x12, 0x14])
def test_a_trailer_not_marked_as_one_is_refused(flags: int) -> None:
    blob = zfile.build(PLAIN, Options(overwrite_header=False))
    with pytest.raises(FormatError):
        decoded(blob[:-HEAD_SIZE] + replace(Head.parse(blob[-HEAD_SIZE:]), flags=flags).build())


def with_crc(stored: bytes) -> bytes:
    return stored + crc32c(100007, stored).to_bytes(4, "little")


def zstd(plain: bytes, **parameters: bool) -> bytes:
    return zstandard.ZstdCompressor(**parameters).compress(plain)  # type: ignore[arg-type]


def zstd_with_window(descriptor: int) -> bytes:
    """A frame of one raw block of 4096 zeros, of unknown size, that asks its decoder for a window."""
    return bytes.fromhex("28b52ffd 00") + bytes([descriptor]) + (4096 << 3 | 1).to_bytes(3, "little") + bytes(4096)


@pytest.mark.parametrize(
    ("codec", "stored"),
    [
        (LZ4, with_crc(b"\xff garbage \xff\xff\xff")),
        (LZ4, with_crc(b"\x10A")),
        (ZSTD, with_crc(b"garbage")),
        (ZSTD, with_crc(zstd(bytes(4095)))),
        (ZSTD, with_crc(zstd(bytes(1 << 27)))),
        (ZSTD, with_crc(zstd(bytes(1 << 20), write_content_size=False))),
        (ZSTD, with_crc(zstd(bytes(4096)) + b"more")),
        (ZSTD, with_crc(zstd_with_window(0x88))),
        (LZ4, b"1234"),
        (LZ4, b""),
    ],
    ids=[
        "lz4-noise",
        "lz4-short",
        "zstd-noise",
        "zstd-short",
        "zstd-bomb",
        "zstd-silent-bomb",
        "zstd-more",
        "zstd-window",
        "4",
        "0",
    ],
)
def test_a_block_that_does_not_decode_to_its_size_is_refused_within_bounds(codec: int, stored: bytes) -> None:
    blob = assembled([stored], 4096, Options(codec))
    assert value_or_format_error(lambda: decoded(blob)) is None


def test_a_zstd_block_without_its_size_decodes() -> None:
    assert decoded(assembled([with_crc(zstd_with_window(0x10))], 4096, Options(ZSTD))) == bytes(4096)
    assert decoded(assembled([with_crc(zstd(bytes(4096), write_content_size=False))], 4096, Options(ZSTD))) == bytes(
        4096
    )


def test_a_table_is_not_believed_before_its_entries_are_seen() -> None:
    class Sparse:
        """A terabyte of zeros behind a good header."""

        size = 1 << 40

        def read_at(self, offset: int, length: int) -> bytes:
            return head.build()[:length] if offset == 0 else bytes(length)

    count = zfile.BLOCK_COUNT_MAX
    head = Head(zfile.FINAL_HEADER, 1 << 39, count, count * 4096, 0, 4096, LZ4, verify=True)
    assert zfile.open_zfile(Sparse()) == head
    assert value_or_format_error(lambda: Decoder(Sparse(), head)) is None


@pytest.mark.parametrize("blob", [b"", b"ZFile", b"LSMT" * 200, bytes(512), zfile.build(b"", Options())[1:]])
def test_what_has_no_magic_is_no_zfile(blob: bytes) -> None:
    assert zfile.open_zfile(BytesAt(blob)) is None


@settings(deadline=None, max_examples=requires.scaled(300, 20_000))
@given(damaged(SEEDS, hot=[range(24, 96), range(-512, -416), range(-560, -512)]), st.booleans())
def test_any_bytes_give_content_or_a_format_error(blob: bytes, fix: bool) -> None:
    if fix and len(blob) >= HEAD_SIZE:
        digest = crc32c(0, blob[:28] + bytes(4) + blob[32:HEAD_SIZE])
        blob = blob[:28] + digest.to_bytes(4, "little") + blob[32:]
    r = BytesAt(blob)
    head = value_or_format_error(lambda: zfile.open_zfile(r))
    if isinstance(head, Head):
        assert head.index_offset + 4 * head.block_count <= len(blob)
        value_or_format_error(lambda: Decoder(r, head).read_at(0, min(head.plain_size, 1 << 20)))


@settings(deadline=None, max_examples=requires.scaled(100, 20_000))
@given(heads, st.binary(max_size=600))
def test_any_head_gives_content_or_a_format_error(head: Head, rest: bytes) -> None:
    head = replace(head, flags=head.flags | zfile.FINAL_HEADER)
    value_or_format_error(lambda: zfile.open_zfile(BytesAt(head.build() + rest)))
