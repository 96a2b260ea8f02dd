# SPDX-License-Identifier: Apache-2.0
"""Commit: the bytes of overlaybd-commit, from pairs and from sealed layers, whatever wraps them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from blockdev.build.commit import CommitOptions, commit_pair, merge_image
from blockdev.build.disk import LayerOptions
from blockdev.build.layerfile import Wrapping
from blockdev.engine import RunKind
from blockdev.errors import CorruptImage, DeviceError, UsageError
from blockdev.upper import create_pair, lock, resize_pair
from formats.lsmt import HEAD_SIZE, NULL_UUID, SECTOR, Head
from formats.pair import PairWriter
from tests import fixtures
from tests.opened import opened, sha256

UUID = "11111111-2222-4333-8444-555555555555"
PARENT = "AAAAAAAA-BBBB-4CCC-8DDD-EEEEEEEEEEEE"
# Of overlaybd's own tools, for golden_pair() (overlaybd-commit --uuid UUID -p PARENT).
GOLDEN = {
    "data": "8f87187f5c740390c771603322cac41b001ef281abaa9941350de329a6fd4bad",
    "index": "23559ca141dc0fa25f0f9c9a64960492e595be3a1e7293a34a0eefa058d1721b",
    "none": "88e48374012ba88fbdc5cebafb9dfcf4013edaf9f8399894952e9cd298bca1a2",
    "lz4": "18fcd1ad5d3c3bb1ab5ebbe68d6ab91f6c9932ef8fc51719f31a8ec22dc76801",
    "lz4 tar": "4e6fc9d52f416a792f50cc3121ba4f7a167c15a3a64005bec1649180ec144469",
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def golden_pair(folder: Path) -> tuple[Path, Path]:
    """The writes and discards of which GOLDEN is made."""
    data, index = folder / "data", folder / "index"

    def pattern(sectors: int, seed: int) -> bytes:
        return bytes((7 * place + 31 * seed) % 256 for place in range(sectors * SECTOR))

    with data.open("wb") as data_file, index.open("wb") as index_file:
        writer = PairWriter(data_file.write, index_file.write, Head(0, 1 << 20, uuid=UUID))
        writer.write(0, pattern(100, 1))
        writer.write(200, pattern(8, 2))
        writer.discard(50, 4)
        writer.write(98, pattern(4, 3))
        writer.discard(1000, 16)
    return data, index


def options(wrapping: Wrapping, uuid: str = NULL_UUID, parent: str | None = None, message: str = "") -> CommitOptions:
    return CommitOptions(LayerOptions(wrapping, uuid), parent, message)


@pytest.mark.parametrize(
    ("name", "wrapping"),
    [
        ("none", Wrapping("none")),
        ("lz4", Wrapping("lz4", 4096)),
        ("lz4 tar", Wrapping("lz4", 4096, tar=True)),
    ],
)
def test_committing_the_golden_pair_gives_the_golden_layer(tmp_path: Path, name: str, wrapping: Wrapping) -> None:
    data, index = golden_pair(tmp_path)
    assert (digest(data), digest(index)) == (GOLDEN["data"], GOLDEN["index"])
    commit_pair(data, index, tmp_path / "out", options(wrapping, UUID, PARENT))
    assert digest(tmp_path / "out") == GOLDEN[name]


def test_committing_the_reference_pair_gives_the_reference_layer(tmp_path: Path) -> None:
    folder = fixtures.folder() / "01-raw-lsmt"
    made = commit_pair(
        folder / "basic.rw.data", folder / "basic.rw.index", tmp_path / "out", options(Wrapping("none"))
    )
    assert digest(tmp_path / "out") == digest(folder / "basic.lsmt")
    assert made.size == 8 << 20


def test_committing_the_sealed_reference_layer_gives_the_same(tmp_path: Path) -> None:
    folder = fixtures.folder() / "01-raw-lsmt"
    commit_pair(folder / "basic.sealed", None, tmp_path / "out", options(Wrapping("none")))
    assert digest(tmp_path / "out") == digest(folder / "basic.from-sealed.lsmt")


def test_a_message_becomes_the_user_tag(tmp_path: Path) -> None:
    folder = fixtures.folder() / "01-raw-lsmt"
    tagged = Head.parse((folder / "tagged.lsmt").read_bytes()[:HEAD_SIZE])
    text = options(Wrapping("none"), tagged.uuid, tagged.parent_uuid, tagged.user_tag.decode())
    commit_pair(folder / "basic.rw.data", folder / "basic.rw.index", tmp_path / "out", text)
    assert digest(tmp_path / "out") == digest(folder / "tagged.lsmt")


def test_the_pair_names_the_parent_unless_the_user_does(tmp_path: Path) -> None:
    data, index = tmp_path / "data", tmp_path / "index"
    create_pair(data, index, 1 << 20, PARENT.lower())
    assert commit_pair(data, index, tmp_path / "out").parent_uuid == PARENT
    assert commit_pair(data, index, tmp_path / "out", options(Wrapping(), parent=UUID)).parent_uuid == UUID


def test_a_committed_image_reads_as_the_pair_did(tmp_path: Path) -> None:
    data, index = golden_pair(tmp_path)
    commit_pair(data, index, tmp_path / "out", options(Wrapping("zstd", 16384)))
    with opened(tmp_path / "out") as layer, opened(upper=(data, index)) as pair:
        assert layer.size == pair.size == 1 << 20
        assert layer.read_at(0, layer.size) == pair.read_at(0, pair.size)


@pytest.mark.parametrize("missing", ["data", "index"])
def test_what_is_no_pair_is_refused_and_leaves_nothing(tmp_path: Path, missing: str) -> None:
    data, index = golden_pair(tmp_path)
    broken = (tmp_path / missing).read_bytes()
    (tmp_path / missing).write_bytes(broken[: 5 * SECTOR])
    with pytest.raises(CorruptImage):
        commit_pair(data, index, tmp_path / "out")
    (tmp_path / missing).write_bytes(broken)
    with pytest.raises(UsageError):
        commit_pair(data, index, tmp_path / "out", options(Wrapping(), message="x" * 257))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index"]


def test_a_pair_that_is_written_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockdev.upper.LOCK_PATIENCE", 0.0)
    data, index = golden_pair(tmp_path)
    with data.open("r+b") as held:
        lock(held.fileno(), "data", exclusive=True)
        with pytest.raises(DeviceError, match="in use"):
            commit_pair(data, index, tmp_path / "out")
    commit_pair(data, index, tmp_path / "out")
    with data.open("rb") as shared:
        lock(shared.fileno(), "data", exclusive=False)
        commit_pair(data, index, tmp_path / "out")


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_layers_merged_into_one_read_as_they_did(tmp_path: Path, codec: str) -> None:
    folder = fixtures.folder() / "03-stack"
    layers = [folder / f"a-l{place}.lsmt" for place in range(3)]
    with opened(*layers) as stack:
        made = merge_image(stack, tmp_path / "merged", options(Wrapping(codec), UUID, message="one of three"))
        size, expected = stack.size, sha256(stack)
    with opened(tmp_path / "merged") as merged:
        assert (made.size, merged.size, sha256(merged)) == (size, size, expected)
        [head] = [layer.lsmt for layer in merged.layers]
        assert head
        assert (head.uuid, head.user_tag) == (UUID, b"one of three")


def test_merging_the_reference_layers_gives_the_reference_merge(tmp_path: Path) -> None:
    folder = fixtures.folder() / "03-stack"
    with opened(*(folder / f"a-l{number}.lz4-4k.zlsmt" for number in range(3))) as stack:
        merge_image(stack, tmp_path / "merged", options(Wrapping("none")))
    assert digest(tmp_path / "merged") == digest(folder / "a-merged.raw.lsmt")


def test_a_merged_layer_has_the_size_of_the_resized_upper_and_hides_what_it_zeroed(tmp_path: Path) -> None:
    data, index = golden_pair(tmp_path)
    resize_pair(data, index, 2 << 20)
    with opened(upper=(data, index)) as pair:
        merge_image(pair, tmp_path / "merged", options(Wrapping("none")))
        kinds = {(run.offset, run.kind) for run in pair.runs(0, pair.size)}
    with opened(tmp_path / "merged") as merged:
        assert merged.size == 2 << 20
        assert {(run.offset, run.kind) for run in merged.runs(0, merged.size)} == kinds
        assert (1000 * SECTOR, RunKind.ZERO) in kinds
