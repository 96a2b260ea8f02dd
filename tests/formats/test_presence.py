# SPDX-License-Identifier: Apache-2.0
"""The presence map's head survives a round trip, and nothing but a whole head is taken."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import presence
from formats.crc32c import standard
from formats.errors import FormatError
from formats.presence import Head
from tests import golden_map
from tests.mutations import damaged, value_or_format_error

DIGEST = "sha256:" + "0123456789abcdef" * 4
HEAD = Head(DIGEST, 123_456_789, False)
_CRC_0 = b"\xab\x9b\xe0\x9b"  # the four bytes whose CRC32C is 0


@given(
    st.sampled_from((DIGEST, "sha512:" + "0" * 128)),
    st.integers(0, (1 << 63) - 1),
    st.booleans(),
    st.sampled_from(("", "sha256:" + "ab" * 32)),
    st.sampled_from(("", "sha256:" + "cd" * 32)),
)
def test_a_head_survives_a_round_trip(digest: str, size: int, verified: bool, table: str, repository: str) -> None:
    head = Head(digest, size, verified, table, repository)
    assert len(head.build()) == presence.HEAD_SIZE
    assert Head.parse(head.build()) == head


def test_the_bytes_are_those_of_the_document() -> None:
    head = Head(DIGEST, 65537, True).build()
    assert head[:8] == b"OCIBLKPM"
    assert head[8:24] == bytes.fromhex("02000000 00000100 0100010000000000")
    assert head[24:168] == DIGEST.encode().ljust(144, b"\0")
    assert head[168:504] == bytes(336)
    assert int.from_bytes(head[504:508], "little") == standard(head[:504])
    assert head[508:] == head[504:508]
    assert Head(DIGEST, 65537, False).build() == head[:508] + bytes(4)


def test_a_map_that_names_a_table_is_of_the_version_that_knows_tables() -> None:
    head = Head(DIGEST, 65537, True, "sha256:" + "c5" * 32).build()
    assert head[8:24] == bytes.fromhex("03000000 00000100 0100010000000000")
    assert head[168:504] == b"\xc5" * 32 + bytes(304)
    assert Head.parse(head).table == "sha256:" + "c5" * 32
    unknown = bytearray(HEAD.build())
    unknown[168:200] = b"\xc5" * 32
    unknown[504:508] = standard(bytes(unknown[:504])).to_bytes(4, "little")
    assert Head.parse(bytes(unknown)).table == "", "an older version's spare bytes are no table"


def test_a_map_that_names_a_repository_is_of_the_version_that_knows_them() -> None:
    head = Head(DIGEST, 65537, True, "", "sha256:" + "c5" * 32).build()
    assert head[8:24] == bytes.fromhex("04000000 00000100 0100010000000000")
    assert head[168:504] == bytes(32) + b"\xc5" * 32 + bytes(272)
    older = bytearray(Head(DIGEST, 65537, True, "sha256:" + "c5" * 32).build())
    older[200:232] = b"\xc5" * 32
    older[504:508] = standard(bytes(older[:504])).to_bytes(4, "little")
    assert Head.parse(bytes(older)).repository == "", "an older version's spare bytes are no repository"


@pytest.mark.parametrize("table", ["sha256:", "sha256:" + "AB" * 32, "sha512:" + "ab" * 32, "ab" * 32])
def test_what_is_no_digest_of_a_table_is_not_written(table: str) -> None:
    with pytest.raises(FormatError):
        Head(DIGEST, 1, False, table).build()


def _built(present: set[int], *, verified: bool, repository: str = "") -> bytes:
    """The map of golden_map.CONTENT with these extents."""
    table = b"".join(
        (presence.extent_entry(extent) if number in present else 0).to_bytes(4, "little")
        for number, extent in enumerate(golden_map.EXTENTS)
    )
    head = Head(golden_map.DIGEST, len(golden_map.CONTENT), verified, "", repository).build()
    return head.ljust(presence.TABLE_OFFSET, b"\0") + table


def test_whole_maps_are_those_that_are_kept() -> None:
    assert _built(golden_map.PARTIAL, verified=False) == golden_map.kept("partial")
    assert _built(golden_map.WHOLE, verified=True) == golden_map.kept("sealed")
    owned = _built(golden_map.PARTIAL, verified=False, repository=golden_map.REPOSITORY)
    assert owned == golden_map.kept("owned")


@given(st.integers(0, presence.SEAL_OFFSET - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(place: int, change: int) -> None:
    head = bytearray(HEAD.build())
    head[place] ^= change
    with pytest.raises(FormatError):
        Head.parse(bytes(head))


@given(st.integers(1, (1 << 32) - 1))
def test_any_other_word_is_no_seal(change: int) -> None:
    sealed = Head(DIGEST, 5, True).build()
    word = int.from_bytes(sealed[presence.SEAL_OFFSET :], "little") ^ change
    assert not Head.parse(sealed[: presence.SEAL_OFFSET] + word.to_bytes(4, "little")).verified


def test_the_seal_of_another_blob_is_none() -> None:
    other = Head(DIGEST, 6, True).build()
    assert not Head.parse(Head(DIGEST, 5, True).build()[: presence.SEAL_OFFSET] + other[-4:]).verified


@given(damaged([HEAD.build()]))
def test_any_bytes_give_a_head_or_a_format_error(head: bytes) -> None:
    value_or_format_error(lambda: Head.parse(head))


@pytest.mark.parametrize("change", [(8, b"\1"), (8, b"\5"), (12, b"\0\0\2\0"), (16, b"\xff" * 8), (24, b"../../")])
def test_another_version_extent_size_or_a_strange_blob_is_refused(change: tuple[int, bytes]) -> None:
    place, value = change
    head = HEAD.build()
    head = head[:place] + value + head[place + len(value) : 504]
    with pytest.raises(FormatError):
        Head.parse(head + standard(head).to_bytes(4, "little") + bytes(4))


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../../../etc/passwd", DIGEST.upper(), "md5:0", DIGEST + "\n"]
)
def test_what_is_no_digest_is_not_written(digest: str) -> None:
    with pytest.raises(FormatError):
        Head(digest, 0, False).build()


def test_the_table_has_an_entry_per_extent_begun() -> None:
    sizes = {0: 0, 1: 1, 65535: 1, 65536: 1, 65537: 2}
    assert {size: presence.extent_count(size) for size in sizes} == sizes
    assert presence.map_size(65537) == 4096 + 8


def test_an_entry_is_the_checksum_and_never_zero() -> None:
    assert presence.extent_entry(b"123456789") == 0xE3069283
    assert standard(_CRC_0) == 0
    assert presence.extent_entry(_CRC_0) == 1


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 1 << 30), st.integers(0, 60))
def test_absent_runs_are_those_entries_that_are_zero(entries: list[int], first: int, count: int) -> None:
    table = b"".join(entry.to_bytes(4, "little") for entry in entries)
    runs = presence.absent_runs(table, first, count)
    absent = [extent for start, length in runs for extent in range(start, start + length)]
    assert absent == [first + at for at in range(count) if at >= len(entries) or entries[at] == 0]
    assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(runs))
