# SPDX-License-Identifier: Apache-2.0
"""The presence map's head survives a round trip, and nothing but a whole head is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import presence
from formats.crc32c import standard
from formats.errors import FormatError
from formats.presence import Head
from tests.mutations import damaged, value_or_format_error

DIGEST = "sha256:" + "0123456789abcdef" * 4
HEAD = Head(DIGEST, 123_456_789, False)
_CRC_0 = b"\xab\x9b\xe0\x9b"  # the four bytes whose CRC32C is 0


@given(st.sampled_from((DIGEST, "sha512:" + "0" * 128)), st.integers(0, (1 << 63) - 1), st.booleans())
def test_a_head_survives_a_round_trip(digest: str, size: int, verified: bool) -> None:
    head = Head(digest, size, verified)
    assert len(head.build()) == presence.HEAD_SIZE
    assert Head.parse(head.build()) == head


def test_the_bytes_are_those_of_the_document() -> None:
    head = Head(DIGEST, 65537, True).build()
    assert head[:8] == b"OCIBLKPM"
    assert head[8:32] == bytes.fromhex("01000000 00000100 0100010000000000 01000000 00000000")
    assert head[32:176] == DIGEST.encode().ljust(144, b"\0")
    assert head[176:508] == bytes(332)
    assert int.from_bytes(head[508:], "little") == standard(head[:508])


@given(st.integers(0, presence.HEAD_SIZE - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(place: int, change: int) -> None:
    head = bytearray(HEAD.build())
    head[place] ^= change
    with pytest.raises(FormatError):
        Head.parse(bytes(head))


@given(damaged([HEAD.build()]))
def test_any_bytes_give_a_head_or_a_format_error(head: bytes) -> None:
    value_or_format_error(lambda: Head.parse(head))


@pytest.mark.parametrize("change", [(8, b"\2"), (12, b"\0\0\2\0"), (16, b"\xff" * 8), (32, b"../../")])
def test_another_version_extent_size_or_a_strange_blob_is_refused(change: tuple[int, bytes]) -> None:
    place, value = change
    head = HEAD.build()
    head = head[:place] + value + head[place + len(value) : 508]
    with pytest.raises(FormatError):
        Head.parse(head + standard(head).to_bytes(4, "little"))


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
