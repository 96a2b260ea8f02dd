# SPDX-License-Identifier: Apache-2.0
"""The writable layer: pairs are made whole, written under a lock, and lie on their parents only."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev.engine import Engine
from blockdev.errors import CorruptImage, DeviceError, NotFound, UsageError
from blockdev.origin import NOTHING, locate
from blockdev.stack import open_local
from blockdev.upper import create_pair
from formats import lsmt
from formats.lsmt import HEAD_SIZE, NULL_UUID, SECTOR, CommitWriter, Head
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
