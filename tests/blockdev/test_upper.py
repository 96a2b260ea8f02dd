# SPDX-License-Identifier: Apache-2.0
"""The writable layer: pairs are made whole, written under a lock, and lie on their parents only."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from blockdev.engine import Engine
from blockdev.errors import CorruptImage, DeviceError, EngineError, NotFound, UsageError
from blockdev.origin import NOTHING, locate
from blockdev.stack import open_local
from blockdev.upper import compact_pair, create_pair, resize_pair, seal_pair
from formats import lsmt
from formats.lsmt import HEAD_SIZE, NULL_UUID, SECTOR, CommitWriter, Head
from tests import fixtures, oracle
from tests.opened import opened, opened_bytes

SIZE = 4 << 20
BASE = "AAAAAAAA-BBBB-4CCC-8DDD-EEEEEEEEEEEE"
OTHER = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """An empty one."""
    create_pair(tmp_path / "data", tmp_path / "index", SIZE)
    return tmp_path / "data", tmp_path / "index"


def layer(*, uuid: str = NULL_UUID, parent: str = NULL_UUID, fill: bytes = b"\x11") -> bytes:
    out = bytearray()
    writer = CommitWriter(out.extend, Head(0, SIZE, uuid=uuid, parent_uuid=parent))
    writer.data(0, fill * 64 * SECTOR)
    writer.finish()
    return bytes(out)


def test_a_new_pair_is_what_overlaybd_would_make(pair: tuple[Path, Path]) -> None:
    data, index = (Head.parse(path.read_bytes()) for path in pair)
    assert (data.flags, index.flags) == (lsmt.LOG_DATA_HEADER, lsmt.LOG_INDEX_HEADER)
    assert (data.virtual_size, index.virtual_size, index.index_offset) == (SIZE, SIZE, HEAD_SIZE)
    assert data.uuid == index.uuid != NULL_UUID
    assert data.parent_uuid == index.parent_uuid == NULL_UUID


def test_nothing_is_made_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("mine")
    with pytest.raises(DeviceError, match="there already"):
        create_pair(tmp_path / "data", tmp_path / "index", SIZE)
    with pytest.raises(NotFound):
        create_pair(tmp_path / "data", tmp_path / "none/index", SIZE)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index", "mine")]


def test_a_size_or_parent_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        create_pair(tmp_path / "data", tmp_path / "index", 1000)
    with pytest.raises(UsageError):
        create_pair(tmp_path / "data", tmp_path / "index", SIZE, "nobody")
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_there_after_closing(pair: tuple[Path, Path]) -> None:
    upper = [str(path) for path in pair]
    with Engine(work_threads=1) as engine:
        with locate(NOTHING, upper, write=True) as origin, open_local(engine, origin) as stack:
            stack.image.image.write(SECTOR + 3, b"hello")
            stack.image.image.zero(0, SECTOR)
            assert stack.describe()["size"] == SIZE
        with locate(NOTHING, upper) as origin, open_local(engine, origin) as stack:
            assert stack.image.read_at(SECTOR, 10) == b"\0\0\0hello\0\0"
            assert not stack.image.image.writable


def test_a_pair_is_written_by_one_at_a_time(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockdev.upper.LOCK_PATIENCE", 0.0)
    upper = [str(path) for path in pair]
    with locate(NOTHING, upper, write=True), pytest.raises(DeviceError, match="in use"):
        locate(NOTHING, upper, write=True)
    locate(NOTHING, upper, write=True).close()


def test_an_image_without_a_writable_layer_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(layer())
    with pytest.raises(UsageError, match="no writable layer"):
        locate(str(tmp_path / "layer"), write=True)


def test_a_pair_over_a_layer_hides_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(layer())
    with (
        Engine(work_threads=1) as engine,
        locate(str(tmp_path / "layer"), [str(path) for path in pair], write=True) as origin,
        open_local(engine, origin) as stack,
    ):
        stack.image.image.write(SECTOR - 1, b"ab")
        stack.image.image.zero(4 * SECTOR, 2)
        assert stack.image.read_at(SECTOR - 2, 4) == b"\x11ab\x11"
        assert stack.image.read_at(4 * SECTOR - 1, 4) == b"\x11\0\0\x11"


@pytest.mark.parametrize("parent", [BASE, BASE.lower(), NULL_UUID])
def test_a_layer_lies_on_its_parent(parent: str) -> None:
    with (
        Engine(work_threads=1) as engine,
        opened_bytes(engine, layer(uuid=BASE), layer(uuid=OTHER, parent=parent, fill=b"\x22")) as image,
    ):
        assert image.read_at(0, 1) == b"\x22"


def test_layers_without_uuids_are_stacked_as_they_come() -> None:
    with Engine(work_threads=1) as engine:
        for lower, upper in [(NULL_UUID, OTHER), (OTHER, NULL_UUID), (NULL_UUID, NULL_UUID)]:
            with opened_bytes(engine, layer(uuid=lower), layer(parent=upper)) as image:
                assert image.size == SIZE


def test_a_layer_on_another_than_its_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(layer(uuid=OTHER))
    create_pair(tmp_path / "data", tmp_path / "index", SIZE, BASE)
    named = rf"layer 1: .*{BASE}.*{OTHER} \(layer 0\)"
    with (
        Engine(work_threads=1) as engine,
        pytest.raises(CorruptImage, match=named),
        opened_bytes(engine, layer(uuid=OTHER), layer(parent=BASE)),
    ):
        pass
    pair = tmp_path / "data", tmp_path / "index"
    with pytest.raises(CorruptImage, match=f"data: .*{BASE}"), opened(tmp_path / "layer", upper=pair):
        pass


# ---- changing a pair that nobody has open ----


def fill(pair: tuple[Path, Path], seed: int, *, base: Path | None = None) -> None:
    """Random writes and discards, many over each other."""
    noise = random.Random(seed)
    with (
        Engine(work_threads=1) as engine,
        locate(str(base or NOTHING), [str(path) for path in pair], write=True) as origin,
        open_local(engine, origin) as stack,
    ):
        for _ in range(200):
            offset = noise.randrange(SIZE // SECTOR // 4) * SECTOR
            length = min(noise.choice([1, 8, 100]) * SECTOR, stack.image.size - offset)
            if noise.random() < 0.8:
                stack.image.image.write(offset, noise.randbytes(length))
            else:
                stack.image.image.zero(offset, length)


def disk(pair: tuple[Path, Path]) -> str:
    return oracle.flatten([], (oracle.read_file(pair[0]), oracle.read_file(pair[1]))).sha256()


def test_sealing_the_reference_pair_gives_the_reference_layer_but_for_its_rubbish(tmp_path: Path) -> None:
    folder = fixtures.folder() / "01-raw-lsmt"
    for name in ("data", "index"):
        shutil.copyfile(folder / f"basic.rw.{name}", tmp_path / name)
    entries = seal_pair(tmp_path / "data", tmp_path / "index")
    made, expected = (tmp_path / "data").read_bytes(), (folder / "basic.sealed").read_bytes()
    index_end = (folder / "basic.rw.data").stat().st_size + entries * lsmt.ENTRY_SIZE
    assert len(made) == len(expected)
    assert made[:index_end] == expected[:index_end]
    assert made[-HEAD_SIZE:] == expected[-HEAD_SIZE:]


def test_a_sealed_layer_reads_as_the_pair_did_and_is_written_no_more(pair: tuple[Path, Path]) -> None:
    fill(pair, 1)
    before = disk(pair)
    seal_pair(*pair)
    assert oracle.flatten_files(pair[0]).sha256() == before
    for again in (lambda: seal_pair(*pair), lambda: fill(pair, 2), lambda: compact_pair(*pair)):
        with pytest.raises(UsageError, match="sealed"):
            again()


def test_a_pair_that_holds_a_sealed_layer_is_not_taken_for_one(pair: tuple[Path, Path]) -> None:
    with (
        Engine(work_threads=1) as engine,
        locate(NOTHING, [str(path) for path in pair], write=True) as origin,
        open_local(engine, origin) as stack,
    ):
        stack.image.image.write(0, layer(uuid=OTHER))
    fill(pair, 3)


@pytest.mark.parametrize("rounds", [1, 3])
def test_compaction_keeps_the_disk_and_drops_the_rest(pair: tuple[Path, Path], rounds: int) -> None:
    for seed in range(rounds):
        fill(pair, seed)
        before = disk(pair)
        done = compact_pair(*pair)
        assert disk(pair) == before
        live = oracle.flatten([], (oracle.read_file(pair[0]), oracle.read_file(pair[1]))).live
        stored = sum(segment.length for segment in live if not segment.zeroed)
        assert pair[0].stat().st_size == done.data_after == HEAD_SIZE + stored * SECTOR
        assert done.data_after < done.data_before
    assert compact_pair(*pair).data_after == done.data_after


def test_a_compaction_cut_off_before_the_new_index_changes_nothing(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(pair, 4)
    before = disk(pair)

    def broken(path: Path) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr("blockdev.upper.replacing", broken)
    with pytest.raises(EngineError):
        compact_pair(*pair)
    assert disk(pair) == before


def test_a_disk_made_smaller_and_larger_again_has_zeros_at_its_end(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(layer())
    fill(pair, 5, base=tmp_path / "layer")
    small = 16 * SECTOR
    assert resize_pair(*pair, small) == SIZE
    with opened(tmp_path / "layer", upper=pair) as image:
        kept = image.read_at(0, image.size)
        assert image.size == small
    assert resize_pair(*pair, 2 * SIZE) == small
    with opened(tmp_path / "layer", upper=pair) as image:
        assert image.size == 2 * SIZE
        assert image.read_at(0, small) == kept
        assert not any(image.read_at(small, SIZE))
    heads = [Head.parse(path.read_bytes()[:HEAD_SIZE]) for path in pair]
    assert [head.virtual_size for head in heads] == [2 * SIZE, 2 * SIZE]
    with pytest.raises(UsageError):
        resize_pair(*pair, 1000)


@pytest.mark.parametrize("size", [0, SIZE // 2])
def test_what_is_below_does_not_come_back_when_a_disk_grows(tmp_path: Path, size: int) -> None:
    """Whether it was cut off, or the disk was made smaller than that."""
    (tmp_path / "layer").write_bytes(layer())
    pair = tmp_path / "data", tmp_path / "index"
    create_pair(*pair, size)
    small = 16 * SECTOR
    resize_pair(*pair, small)
    resize_pair(*pair, SIZE)
    with opened(tmp_path / "layer", upper=pair) as image:
        assert image.read_at(0, small) == b"\x11" * small
        assert image.read_at(small, SIZE - small) == bytes(SIZE - small)
    with pytest.raises(UsageError, match="may reach beyond"):
        resize_pair(*pair, 0)
    with pytest.raises(UsageError, match="too far"):
        resize_pair(*pair, 1 << 50)
    assert Head.parse(pair[1].read_bytes()[:HEAD_SIZE]).virtual_size == SIZE
