# SPDX-License-Identifier: Apache-2.0
"""LSMT heads and entries survive a round trip; layers open as the document says or are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import lsmt
from formats.errors import FormatError
from formats.lsmt import HEAD_SIZE, SECTOR, CommitWriter, Head, Segment
from formats.readat import BytesAt
from tests import fixtures, requires
from tests.mutations import damaged, value_or_format_error

UUID = "0193C1A0-1111-4222-8333-444455556666"
COMMITTED = [
    "01-raw-lsmt/basic.lsmt",
    "01-raw-lsmt/tagged.lsmt",
    "01-raw-lsmt/many.lsmt",
    "01-raw-lsmt/empty-1g.lsmt",
    "03-stack/a-l0.lsmt",
    "03-stack/a-merged.raw.lsmt",
    "03-stack/d-l1zero.lsmt",
]
LAYERS = [*COMMITTED, "01-raw-lsmt/basic.sealed", "01-raw-lsmt/sparse.lsmt"]
SEEDS = [(fixtures.DATA / name).read_bytes() for name in ("d-l0.lsmt", "d-l1small.lsmt", "huge-4t.lsmt")]

segments = st.builds(
    Segment,
    offset=st.integers(0, (1 << 50) - 2),
    length=st.integers(0, lsmt.LENGTH_MAX),
    moffset=st.integers(0, (1 << 55) - 1),
    zeroed=st.booleans(),
    tag=st.integers(0, 255),
)
heads = st.builds(
    Head,
    flags=st.integers(0, (1 << 32) - 1),
    virtual_size=st.integers(0, 1 << 50).map(lambda sectors: sectors * SECTOR),
    index_offset=st.integers(0, (1 << 64) - 1),
    index_count=st.integers(0, (1 << 64) - 1),
    uuid=st.sampled_from((lsmt.NULL_UUID, UUID, UUID.lower(), "")),
    parent_uuid=st.sampled_from((lsmt.NULL_UUID, UUID, "")),
    user_tag=st.binary(max_size=256).filter(lambda tag: not tag.endswith(b"\0")),
)


def layer(*parts: tuple[int, bytes | int], size: int = 4096, header_size: int | None = None) -> bytearray:
    """A committed layer of (sector, content) and (sector, zeroed sectors)."""
    out = bytearray()
    writer = CommitWriter(out.extend, Head(0, size * SECTOR))
    for offset, content in parts:
        if isinstance(content, int):
            writer.zeroed(offset, content)
        else:
            writer.data(offset, content)
    writer.finish()
    if header_size is not None:
        out[:HEAD_SIZE] = Head(lsmt.COMMIT_HEADER, header_size * SECTOR).build()
    return out


def opened(blob: bytes | bytearray) -> list[Segment]:
    r = BytesAt(bytes(blob))
    return lsmt.read_segments(r, lsmt.open_sealed(r))


def with_trailer(blob: bytes | bytearray, **changes: int) -> bytes:
    trailer = Head.parse(bytes(blob[-HEAD_SIZE:]))
    return bytes(blob[:-HEAD_SIZE]) + replace(trailer, **changes).build()  # type: ignore[arg-type]


def with_entries(*entries: Segment, **head: int) -> bytes:
    """A layer with 8 data sectors and exactly these entries, right or wrong."""
    blob = layer((0, bytes(8 * SECTOR)))
    table = lsmt.pack(entries)
    trailer = replace(Head.parse(bytes(blob[-HEAD_SIZE:])), index_count=len(entries), **head)  # type: ignore[arg-type]
    return bytes(blob[: HEAD_SIZE + 8 * SECTOR]) + table + trailer.build()


@given(heads)
def test_a_head_survives_a_round_trip(head: Head) -> None:
    assert len(head.build()) == HEAD_SIZE
    assert Head.parse(head.build()) == head


@given(st.lists(segments))
def test_a_table_survives_a_round_trip(table: list[Segment]) -> None:
    assert list(lsmt.unpack(lsmt.pack(table))) == table


def test_an_entry_has_the_documented_bytes_and_padding_is_dropped() -> None:
    table = bytes.fromhex("00000000 0000c800 08000000 0000000032000000 00001000 3a000000 00008000")
    assert list(lsmt.unpack(lsmt.PADDING_ENTRY + table + lsmt.PADDING_ENTRY)) == [
        Segment(0, 50, 8, False, 0),
        Segment(50, 4, 58, True, 0),
    ]
    assert bytes.fromhex("ffffffffffff0300 0000000000000000") == lsmt.PADDING_ENTRY


@pytest.mark.parametrize("path", LAYERS)
def test_the_heads_of_reference_layers_are_reproduced(path: str) -> None:
    blob = (fixtures.folder() / path).read_bytes()
    r = BytesAt(blob)
    sealed = lsmt.open_sealed(r)
    assert sealed.header.build() == blob[:HEAD_SIZE]
    assert sealed.head.build() == blob[-HEAD_SIZE:]
    assert sealed.extent_limit == 0
    assert lsmt.is_lsmt(blob)


@pytest.mark.parametrize("path", ["01-raw-lsmt/basic.lsmt", "01-raw-lsmt/basic.sealed", "01-raw-lsmt/many.lsmt"])
def test_the_index_is_what_the_reference_library_loads(path: str) -> None:
    listing = fixtures.folder() / f"{path}.index.txt"
    lines = [line.split() for line in listing.read_text().splitlines()[1:]]
    expected = [[int(field.split("=")[1]) for field in line] for line in lines]
    assert [list(segment) for segment in opened((fixtures.folder() / path).read_bytes())] == expected


@pytest.mark.parametrize("path", COMMITTED)
def test_committing_a_committed_layer_changes_nothing(path: str) -> None:
    blob = (fixtures.folder() / path).read_bytes()
    r = BytesAt(blob)
    sealed = lsmt.open_sealed(r)
    on_disk = lsmt.unpack(blob[sealed.index_offset : sealed.index_offset + 16 * sealed.index_count])
    out = bytearray()
    writer = CommitWriter(out.extend, sealed.header)
    for segment in on_disk:
        if segment.zeroed:
            writer.zeroed(segment.offset, segment.length, segment.tag)
        else:
            content = r.read_at(segment.moffset * SECTOR, segment.length * SECTOR)
            writer.data(segment.offset, content, segment.tag)
    writer.finish()
    assert out == blob


def test_coalescing_stops_before_the_entry_limit() -> None:
    """Steps of 64 sectors join up to 16320; zeroed entries keep what they were given."""
    entries = opened(layer((0, bytes(20000 * SECTOR)), (20000, 16000), (36000, 382), (36382, 1), size=1 << 16))
    assert [(entry.offset, entry.length, entry.zeroed) for entry in entries] == [
        (0, 16320, False),
        (16320, 3680, False),
        (20000, 16382, True),
        (36382, 1, True),
    ]


def test_a_long_discard_is_split() -> None:
    assert [entry.length for entry in opened(layer((0, 40000), size=1 << 16))] == [16383, 16383, 7234]


def test_pieces_of_whole_steps_commit_as_one_run() -> None:
    content = bytes(range(256)) * 2 * 300
    whole = layer((7, content))
    pieces = layer(
        *((7 + at // SECTOR, content[at : at + lsmt.COMMIT_STEP]) for at in range(0, len(content), lsmt.COMMIT_STEP))
    )
    assert whole == pieces


def test_the_writer_refuses_what_no_reader_would_open() -> None:
    writer = CommitWriter(lambda _: None, Head(0, SECTOR << 40))
    for sector in range(lsmt.SEALED_ENTRIES_MAX + 1):
        writer.zeroed(2 * sector, 1)
    with pytest.raises(FormatError, match="index entries"):
        writer.finish()


def test_the_writer_refuses_to_go_back() -> None:
    writer = CommitWriter(lambda _: None, Head(0, 1 << 20))
    writer.zeroed(8, 8)
    with pytest.raises(FormatError):
        writer.data(15, bytes(SECTOR))


def test_stretches_are_found_in_the_order_of_the_disk_whatever_order_they_were_written_in() -> None:
    out = bytearray()
    writer = CommitWriter(out.extend, Head(0, 64 * SECTOR))
    for offset in (40, 8, 0):
        writer.data(offset, bytes([offset]) * 4 * SECTOR)
        writer.elsewhere()
    writer.finish()
    entries = opened(out)
    assert [(entry.offset, entry.length) for entry in entries] == [(0, 4), (8, 4), (40, 4)]
    assert [out[entry.moffset * SECTOR] for entry in entries] == [0, 8, 40]


def test_stretches_that_overlap_are_refused() -> None:
    writer = CommitWriter(lambda _: None, Head(0, 64 * SECTOR))
    writer.data(8, bytes(8 * SECTOR))
    writer.elsewhere()
    writer.data(0, bytes(9 * SECTOR))
    with pytest.raises(FormatError, match="sector 8 is written twice"):
        writer.finish()


@pytest.mark.parametrize("head", [Head(0, 1), Head(0, -SECTOR), Head(0, 0, uuid="x"), Head(0, 0, user_tag=bytes(257))])
def test_heads_without_bytes_are_not_built(head: Head) -> None:
    with pytest.raises(FormatError):
        head.build()


def test_the_virtual_size_comes_from_the_trailer() -> None:
    blob = layer((0, bytes(SECTOR)), size=64, header_size=128)
    sealed = lsmt.open_sealed(BytesAt(bytes(blob)))
    assert (sealed.head.virtual_size, sealed.header.virtual_size) == (64 * SECTOR, 128 * SECTOR)


def test_entries_past_the_end_are_refused_only_if_header_and_trailer_disagree() -> None:
    far = (60, bytes(8 * SECTOR))
    assert opened(layer(far, size=64)) == [Segment(60, 8, 8, False, 0)]
    with pytest.raises(FormatError, match="past the virtual size"):
        opened(layer(far, size=64, header_size=128))
    assert opened(layer(far, size=68, header_size=128))


def test_a_size_of_zero_under_a_header_that_has_one_is_refused() -> None:
    assert opened(layer((0, bytes(SECTOR)), size=0))
    with pytest.raises(FormatError):
        opened(layer((0, bytes(SECTOR)), size=0, header_size=64))


def test_tags_of_ordinary_layers_mean_nothing() -> None:
    assert opened(with_entries(Segment(0, 8, 8, False, 3))) == [Segment(0, 8, 8, False, 0)]


def test_an_index_may_be_followed_by_less_than_a_page() -> None:
    blob = layer((0, bytes(8 * SECTOR)))
    assert opened(with_trailer(blob, index_count=1)) == [Segment(0, 8, 8, False, 0)]
    with pytest.raises(FormatError, match="index_size too small"):
        opened(with_trailer(blob, index_count=0))


@pytest.mark.parametrize(
    "changes",
    [
        {"index_count": 257},
        {"index_count": lsmt.SEALED_ENTRIES_MAX + 1},
        {"index_count": (1 << 64) - 1},
        {"index_offset": (1 << 64) - 16},
        {"index_offset": HEAD_SIZE + 9 * SECTOR},
        {"index_offset": 0},
        {"flags": lsmt.COMMIT_HEADER},
        {"flags": lsmt.IS_DATA_FILE},
        {"flags": lsmt.IS_SEALED},
    ],
    ids=str,
)
def test_a_trailer_that_cannot_be_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(FormatError):
        opened(with_trailer(layer((0, bytes(8 * SECTOR))), **changes))


@pytest.mark.parametrize(
    "entries",
    [
        [Segment(0, 0, 8, False, 0)],
        [Segment(0, 0, 8, True, 0)],
        [Segment(0, 4, 7, False, 0)],
        [Segment(0, 4, 7, True, 0)],
        [Segment(0, 4, 13, False, 0)],
        [Segment(0, 4, 17, True, 0)],
        [Segment((1 << 50) - 2, 4, 8, False, 0)],
        [Segment(8, 4, 8, False, 0), Segment(0, 4, 12, False, 0)],
        [Segment(0, 4, 8, False, 0), Segment(3, 4, 12, False, 0)],
        [Segment(0, 4, 8, False, 0), Segment(0, 4, 8, False, 0)],
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_refused(entries: list[Segment]) -> None:
    with pytest.raises(FormatError):
        opened(with_entries(*entries))


def test_zeroed_entries_may_point_at_the_end_of_the_data() -> None:
    assert opened(with_entries(Segment(0, 4, 16, True, 0)))


def test_a_layer_takes_at_most_a_million_entries() -> None:
    count = lsmt.SEALED_ENTRIES_MAX
    assert len(opened(with_entries(*(Segment(2 * at, 1, 16, True, 0) for at in range(count))))) == count
    with pytest.raises(FormatError, match="at most 1000000"):
        opened(with_trailer(layer((0, bytes(SECTOR))), index_count=count + 1))


@settings(deadline=None, max_examples=requires.scaled(300, 20_000))
@given(damaged(SEEDS, hot=[range(0, 60), range(-4096, -4030), range(-8192, -8128)]))
def test_any_bytes_give_a_layer_or_a_format_error(blob: bytes) -> None:
    segments = value_or_format_error(lambda: opened(blob))
    if isinstance(segments, list):
        assert all(segment.mend * SECTOR <= len(blob) for segment in segments)


@settings(deadline=None, max_examples=requires.scaled(300, 20_000))
@given(heads, heads, st.binary(max_size=2000))
def test_any_heads_give_a_layer_or_a_format_error(header: Head, trailer: Head, middle: bytes) -> None:
    flags = (header.flags | lsmt.COMMIT_HEADER, trailer.flags & ~lsmt.IS_HEADER | lsmt.SEALED_TRAILER)
    value_or_format_error(
        lambda: opened(replace(header, flags=flags[0]).build() + middle + replace(trailer, flags=flags[1]).build())
    )


class Endless:
    """A file of any size for nothing: good heads, and zeros between them."""

    def __init__(self, blob: bytes, size: int) -> None:
        self.size = size
        self._ends = blob[:HEAD_SIZE], blob[-HEAD_SIZE:]

    def read_at(self, offset: int, length: int) -> bytes:
        ends = {0: self._ends[0], self.size - HEAD_SIZE: self._ends[1]}
        return ends[offset][:length] if offset in ends else bytes(length)


def test_a_count_is_not_believed_before_its_entries_are_seen() -> None:
    size = 1 << 40
    index = {"index_count": 1_000_000, "index_offset": size - HEAD_SIZE - 16_000_000}
    blob = with_trailer(layer((0, bytes(SECTOR))), **index)
    r = Endless(blob, size)
    assert lsmt.open_sealed(r).index_count == 1_000_000
    assert value_or_format_error(lambda: lsmt.read_segments(r, lsmt.open_sealed(r))) is None


def test_the_header_is_no_index() -> None:
    """Header and trailer alone, with the header's own 4096 bytes named as the index."""
    blob = with_trailer(layer(), index_offset=0, index_count=256)
    assert len(blob) == 2 * HEAD_SIZE
    with pytest.raises(FormatError):
        lsmt.open_sealed(BytesAt(blob))


def test_short_files_are_refused() -> None:
    for size in (0, 100, HEAD_SIZE, 2 * HEAD_SIZE - 1):
        with pytest.raises(FormatError):
            opened(SEEDS[0][:size])


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40_000) | st.sampled_from((16320, 16382, 16383))), max_size=6)
)
def test_stored_runs_are_cut_and_joined_as_step_by_step(runs: list[tuple[int, int]]) -> None:
    """The slow way: every step of 64 sectors an entry, each joined to the one before if the rule allows it."""
    out = bytearray()
    writer = CommitWriter(out.extend, Head(0, SECTOR << 40))
    slow: list[Segment] = []
    at, place = 0, lsmt.HEAD_SECTORS
    for gap, length in runs:
        at += gap
        writer.stored(at, length)
        for start in range(0, length, 64):
            step = Segment(at + start, min(64, length - start), place + start, False, 0)
            last = slow[-1] if slow else None
            if last and (last.end, last.mend) == (step.offset, step.moffset) and last.length + step.length < 16383:
                slow[-1] = last._replace(length=last.length + step.length)
            else:
                slow.append(step)
        at, place = at + length, place + length
    trailer = writer.finish()
    assert trailer.index_offset == place * SECTOR
    assert list(lsmt.unpack(bytes(out[HEAD_SIZE : HEAD_SIZE + trailer.index_count * lsmt.ENTRY_SIZE]))) == slow
