# SPDX-License-Identifier: Apache-2.0
"""Read-write pairs: replay equals a plain model, sealing and committing equal overlaybd's bytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats import lsmt, pair
from formats.errors import FormatError
from formats.lsmt import HEAD_SIZE, SECTOR, Head, Segment
from formats.pair import PairWriter, compact, replay, seal
from formats.readat import BytesAt
from tests import fixtures, requires
from tests.mutations import damaged, value_or_format_error

UUID = "11111111-2222-4333-8444-555555555555"


def made(*ops: tuple[int, bytes | int]) -> tuple[bytes, bytes]:
    """Data and index file of writes (sector, content) and discards (sector, sectors)."""
    data, index = bytearray(), bytearray()
    writer = PairWriter(data.extend, index.extend, Head(0, 1 << 30, uuid=UUID))
    for offset, what in ops:
        if isinstance(what, int):
            writer.discard(offset, what)
        else:
            writer.write(offset, what)
    return bytes(data), bytes(index)


def live(data: bytes, index: bytes) -> list[Segment]:
    return replay(lsmt.read_log(BytesAt(index), lsmt.open_log(BytesAt(index), BytesAt(data))))


def reference(name: str) -> bytes:
    return (fixtures.folder() / "01-raw-lsmt" / name).read_bytes()


def test_committing_a_reference_pair_gives_the_reference_layer() -> None:
    data, index = reference("basic.rw.data"), reference("basic.rw.index")
    head = replace(Head.parse(data[:HEAD_SIZE]), uuid=lsmt.NULL_UUID)
    out = bytearray()
    trailer = lsmt.commit(live(data, index), [BytesAt(data)], out.extend, head)
    assert out == reference("basic.lsmt")
    assert trailer == Head.parse(bytes(out[-HEAD_SIZE:]))


def test_a_user_tag_and_uuids_are_the_only_difference_of_the_tagged_layer() -> None:
    data, index = reference("basic.rw.data"), reference("basic.rw.index")
    tagged = Head.parse(reference("tagged.lsmt")[:HEAD_SIZE])
    assert tagged.user_tag
    out = bytearray()
    lsmt.commit(live(data, index), [BytesAt(data)], out.extend, tagged)
    assert out == reference("tagged.lsmt")


def test_sealing_a_reference_pair_gives_the_reference_layer_but_for_its_rubbish() -> None:
    data, index = reference("basic.rw.data"), reference("basic.rw.index")
    entries = live(data, index)
    sealed = data + seal(Head.parse(data[:HEAD_SIZE]), len(data), entries)
    expected = reference("basic.sealed")
    index_end = len(data) + len(entries) * lsmt.ENTRY_SIZE
    assert len(sealed) == len(expected)
    assert sealed[:index_end] == expected[:index_end]
    assert sealed[-HEAD_SIZE:] == expected[-HEAD_SIZE:]


def test_committing_a_sealed_layer_equals_committing_its_pair() -> None:
    r = BytesAt(reference("basic.sealed"))
    sealed = lsmt.open_sealed(r)
    out = bytearray()
    lsmt.commit(lsmt.read_segments(r, sealed), [r], out.extend, replace(sealed.header, uuid=lsmt.NULL_UUID))
    assert out == reference("basic.from-sealed.lsmt")


@pytest.mark.parametrize("name", ["basic.rw"])
def test_the_heads_of_a_reference_pair_are_reproduced(name: str) -> None:
    for suffix in ("data", "index"):
        head = reference(f"{name}.{suffix}")[:HEAD_SIZE]
        assert Head.parse(head).build() == head


entries = st.builds(
    Segment,
    offset=st.integers(0, 60),
    length=st.integers(0, 30),
    moffset=st.integers(8, 1000),
    zeroed=st.booleans(),
    tag=st.integers(0, 3),
)


@pytest.fixture(params=["at once", "in runs"])
def runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long logs, as it were."""
    if request.param == "in runs":
        monkeypatch.setattr(pair, "_RUN", 3)
        monkeypatch.setattr(pair, "_COVERING_MIN", 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("runs")
@given(st.lists(entries, max_size=30))
def test_replay_equals_a_dict_of_sectors(log: list[Segment]) -> None:
    expected: dict[int, tuple[int, bool, int]] = {}
    for entry in log:
        for step in range(entry.length):
            place = entry.moffset if entry.zeroed else entry.moffset + step
            expected[entry.offset + step] = (place, entry.zeroed, entry.tag)
    found: dict[int, tuple[int, bool, int]] = {}
    last_end = 0
    for entry in replay(log):
        assert entry.offset >= last_end
        assert entry.length > 0
        last_end = entry.end
        for step in range(entry.length):
            place = entry.moffset if entry.zeroed else entry.moffset + step
            found[entry.offset + step] = (place, entry.zeroed, entry.tag)
    assert found == expected


def _writes(order: str, count: int) -> Iterator[Segment]:
    """Of 4 KiB each: to one place, or over the disk twice, the second time half a write off."""
    for number in range(count):
        half = 4 * (number >= count // 2)
        place = 8 * (number % (count // 2)) + half if order == "twice" else 0
        yield Segment(place, 8, 8 + 8 * number, False, 0)


@pytest.mark.parametrize("order", ["one", "twice"])
def test_replay_takes_little_memory_for_each_write(order: str) -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        live = sum(1 for _ in pair.replaying(_writes(order, 100_000)))
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert live == {"one": 1, "twice": 50_001}[order]
    assert peak < 12 << 20


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.booleans()), max_size=30))
def test_compaction_moves_only_into_what_is_dead(writes: list[tuple[int, int, bool]]) -> None:
    log: list[Segment] = []
    end = 8
    for offset, length, zeroed in writes:
        log.append(Segment(offset, length, end, zeroed, 0))
        end += 0 if zeroed else length
    before = list(range(end))  # each sector of the file holds its own number

    def shown(entries: list[Segment], file: list[int]) -> dict[int, int]:
        return {
            entry.offset + step: 0 if entry.zeroed else file[entry.moffset + step]
            for entry in entries
            for step in range(entry.length)
        }

    plan = compact(replay(log))
    after = list(before)
    for source, target, length in plan.moves:
        after[target : target + length] = before[source : source + length]
    assert shown(replay(log), after) == shown(replay(log), before)
    assert shown(plan.live, after[: plan.data_end]) == shown(replay(log), before)
    stored = len({place for entry in replay(log) if not entry.zeroed for place in range(entry.moffset, entry.mend)})
    assert plan.data_end == 8 + stored


def test_long_writes_and_discards_are_split() -> None:
    data, index = made((0, bytes(8193 * SECTOR)), (0, 16384))
    log = list(lsmt.read_log(BytesAt(index), lsmt.open_log(BytesAt(index), BytesAt(data))))
    assert [(entry.offset, entry.length, entry.moffset, entry.zeroed) for entry in log] == [
        (0, 8192, 8, False),
        (8192, 1, 8200, False),
        (0, 16383, 8201, True),
        (16383, 1, 8201, True),
    ]


def test_padding_torn_tails_and_empty_entries_of_a_log_are_left_out() -> None:
    data, index = made((4, bytes(SECTOR)))
    index = index[:HEAD_SIZE] + lsmt.PADDING_ENTRY + index[HEAD_SIZE:] + bytes(16) + b"torn"
    assert live(data, index) == [Segment(4, 1, 8, False, 0)]


def test_an_entry_outside_the_data_file_refuses_the_whole_pair_even_if_overwritten() -> None:
    data, index = made((0, bytes(8 * SECTOR)), (0, 8))
    with pytest.raises(FormatError, match="outside the data area"):
        live(data[:-1], index)


def test_the_virtual_size_is_the_index_files() -> None:
    data, index = made()
    assert lsmt.open_log(BytesAt(index), BytesAt(data)).head.virtual_size == 1 << 30


def test_what_is_no_pair_is_refused() -> None:
    data, index = made((0, bytes(SECTOR)))
    other = replace(Head.parse(data[:HEAD_SIZE]), uuid=UUID.replace("1", "2")).build() + data[HEAD_SIZE:]
    sparse = replace(Head.parse(data[:HEAD_SIZE]), flags=0x13).build() + data[HEAD_SIZE:]
    for index_file, data_file in [(data, index), (index, other), (index, sparse), (index, b""), (index[:100], data)]:
        with pytest.raises(FormatError):
            lsmt.open_log(BytesAt(index_file), BytesAt(data_file))


PAIR = made((0, bytes(range(256)) * 20), (3, 5), (1 << 33, bytes(SECTOR)))


@settings(deadline=None, max_examples=requires.scaled(300, 20_000))
@given(damaged(PAIR[:1], hot=[range(0, 60)]), damaged(PAIR[1:], hot=[range(0, 60), range(4096, 4150)]))
def test_any_bytes_give_a_map_or_a_format_error(data: bytes, index: bytes) -> None:
    value_or_format_error(lambda: live(data, index))
    value_or_format_error(lambda: live(PAIR[0], index))
