# SPDX-License-Identifier: Apache-2.0
"""The digest table: what is written is what tar and sha256 say, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import digests, tar
from formats.digests import UNIT, Place, Table, TableWriter
from formats.errors import FormatError
from formats.readat import BytesAt
from tests.mutations import damaged, value_or_format_error
from tests.tabled import tabled

START = 1536


def table_of(content: bytes, pieces: random.Random | None = None) -> Table:
    """By TableWriter, in pieces."""
    writer = TableWriter(START)
    at = START
    while at < len(content):
        size = pieces.randrange(1, 3 * UNIT) if pieces else len(content)
        writer.add(content[at : at + size])
        at += size
    return writer.finish(content[:UNIT])


def covered(size: int, seed: int = 1) -> bytes:
    """`size` bytes that begin as a layer's tar does."""
    payload = size - START
    head = tar.wrap_head(payload)
    return head + random.Random(seed).randbytes(payload)


SIZES = (2048, UNIT - 512, UNIT, UNIT + 512, 2 * UNIT, 5 * UNIT + 1024)


@pytest.mark.parametrize("size", SIZES)
def test_each_unit_has_its_sha256_whatever_pieces_came(size: int) -> None:
    content = covered(size)
    table = table_of(content, random.Random(size))
    assert table.build() == table_of(content).build()
    units = [content[at : at + UNIT] for at in range(0, size, UNIT)]
    expected = [f"sha256:{hashlib.sha256(unit).hexdigest()}" for unit in units]
    assert [table.digest(number) for number in range(len(units))] == expected
    assert digests.unit_count(size) == len(units)


def test_a_table_is_in_memory_once() -> None:
    body = Table(1 << 32, bytes(digests.DIGEST_SIZE << 14)).build()
    tracemalloc.start()
    try:
        table = Table.parse(body)
        assert len(body) < tracemalloc.get_traced_memory()[0] < 1.5 * len(body)
        assert table.build() == body
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", SIZES)
def test_any_tar_reader_finds_the_table_as_the_second_member(size: int) -> None:
    content = covered(size)
    table = table_of(content)
    blob = content + table.tail
    assert len(blob) == table.blob_size == table.place.blob_size
    with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
        first, second = archive.getmembers()
        assert (first.name, first.size, second.name) == ("overlaybd.commit", size - START, "dev.ociblk.digests")
        assert second.offset == table.covered == size
        assert (second.offset_data, second.size) == (table.place.offset, table.place.length)
        body = archive.extractfile(second)
        assert body is not None
        assert body.read() == table.build()
    assert tar.wrap_head(size - START) == blob[:START]
    assert blob[-1024:] == bytes(1024)


def test_a_table_survives_a_round_trip_and_so_do_its_annotations() -> None:
    table = table_of(covered(3 * UNIT + 512))
    again = Table.parse(table.build())
    assert (again.build(), again.place, again.tail) == (table.build(), table.place, table.tail)
    annotations = table.place.annotations()
    assert annotations == {
        "dev.ociblk.digests.covered": str(3 * UNIT + 512),
        "dev.ociblk.digests.offset": str(3 * UNIT + 1024),
        "dev.ociblk.digests.length": str(64 + 4 * 32),
        "dev.ociblk.digests.digest": f"sha256:{hashlib.sha256(table.build()).hexdigest()}",
    }
    assert Place.of(annotations | {"other": "x"}, table.blob_size) == table.place
    assert Place.of({"other": "x"}, table.blob_size) is None


def test_the_bytes_are_those_of_the_document() -> None:
    body = table_of(covered(UNIT + 512)).build()
    assert body[:32].hex() == b"OCIBLKDT".hex() + "01000000" + "00000400" + "0002040000000000" + "0200000000000000"
    assert body[32:64] == bytes(32)
    assert len(body) == 128


def test_a_layers_table_is_found_and_nothing_else_is_taken_for_one() -> None:
    blob, place = tabled(random.Random(3).randbytes(UNIT + 99))
    found = digests.find(BytesAt(blob))
    assert found is not None
    assert found.place == place
    plain = blob[: place.covered] + tar.END
    assert digests.find(BytesAt(plain)) is None
    assert digests.find(BytesAt(random.Random(3).randbytes(UNIT))) is None
    other = blob[: place.covered] + tar.member_head(b"other", place.length) + blob[place.offset :]
    assert digests.find(BytesAt(other)) is None
    assert digests.find(BytesAt(blob[: place.offset + 70])) is None
    for wrong in (blob + bytes(512), blob[:-512], blob[:-1] + b"x"):
        with pytest.raises(FormatError):
            digests.find(BytesAt(wrong))


class Followed:
    """A blob, and zeros for ever after it."""

    size = 1 << 45

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def read_at(self, offset: int, length: int) -> bytes:
        return self._blob[offset : offset + length].ljust(length, b"\0")


def test_what_follows_a_table_is_not_read_to_be_refused() -> None:
    blob, _ = tabled(random.Random(3).randbytes(UNIT + 99))
    with pytest.raises(FormatError, match="does not end"):
        digests.find(Followed(blob))


@pytest.mark.parametrize("size", SIZES)
def test_any_changed_byte_of_the_blob_is_noticed(size: int) -> None:
    content = covered(size)
    table = table_of(content)
    blob = content + table.tail
    spans = [table.span(unit) for unit in range(-(-len(blob) // UNIT))]
    assert sum(length for _, length in spans) == len(blob)
    pieces = [blob[start : start + length] for start, length in spans]
    assert all(table.matches(unit, piece) for unit, piece in enumerate(pieces))
    places = {0, START, size - 1, size, size + 512, len(blob) - 1025, len(blob) - 1, size // 2}
    for place in places:
        altered = bytearray(pieces[place // UNIT])
        altered[place % UNIT] ^= 1
        assert not table.matches(place // UNIT, altered)
    assert not table.matches(0, pieces[0][:-1])
    assert not table.matches(0, pieces[0] + b"\0")


@pytest.mark.parametrize(
    "change",
    [
        {"covered": "0"},
        {"covered": ""},
        {"covered": "-512"},
        {"covered": "1000"},
        {"covered": "\u0661\u0662"},
        {"covered": "9" * 40},
        {"covered": str(1 << 60), "offset": str((1 << 60) + 512)},
        {"covered": "512"},
        {"offset": "0"},
        {"offset": None},
        {"length": "1" * 9},
        {"digest": "sha256:" + "g" * 64},
        {"digest": "sha256:" + "0" * 63},
        {"digest": "sha512:" + "0" * 64},
        {"digest": "sha256:" + "0" * 64 + "\n"},
        {"digest": None},
    ],
)
def test_annotations_that_cannot_be_right_are_refused(change: dict[str, str | None]) -> None:
    table = table_of(covered(2 * UNIT))
    named = {f"dev.ociblk.digests.{name}": value for name, value in change.items()}
    wrong = {name: value for name, value in (table.place.annotations() | named).items() if value is not None}
    with pytest.raises(FormatError):
        Place.of(wrong, table.blob_size)


@pytest.mark.parametrize("size", [0, 1, 2 * UNIT])
def test_annotations_of_another_blob_are_refused(size: int) -> None:
    with pytest.raises(FormatError, match="the blob has"):
        Place.of(table_of(covered(2 * UNIT)).place.annotations(), size)


@given(damaged([table_of(covered(size)).build() for size in (2048, 3 * UNIT)], [range(64)]))
def test_any_bytes_are_that_table_or_an_error(content: bytes) -> None:
    table = value_or_format_error(lambda: Table.parse(content))
    if isinstance(table, Table):
        assert table.build() == content
        assert table.place.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


@given(st.dictionaries(st.sampled_from(["covered", "offset", "length", "digest"]), st.text(max_size=20)), st.integers())
def test_any_annotations_are_a_place_or_an_error(annotations: dict[str, str], size: int) -> None:
    named = {f"dev.ociblk.digests.{name}": value for name, value in annotations.items()}
    assert not value_or_format_error(lambda: Place.of(named, size))
