# SPDX-License-Identifier: Apache-2.0
"""Import: raw disks become layers that read as the disk, byte for byte as a commit would write them."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdev.build.cutter import HOLE_MIN
from blockdev.build.disk import LayerOptions, import_disk
from blockdev.build.layerfile import BLOCK_SIZES, PIECE, LayerFile, Wrapping
from blockdev.engine import RunKind
from blockdev.errors import NotFound, UsageError
from formats import lsmt, tar, zfile
from formats.lsmt import LENGTH_MAX, SECTOR, Segment
from formats.readat import BytesAt
from tests.opened import opened
from tests.requires import scaled

UUID = "11111111-2222-4333-8444-555555555555"
PARENT = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
NONE = Wrapping("none")
GRAIN = 4096


def _import(disk: bytes, out: Path, options: LayerOptions) -> bytes:
    raw = out.with_name("raw")
    raw.write_bytes(disk)
    with open(raw, "rb") as file:
        made = import_disk(file.fileno(), str(raw), out, options)
    assert made.layer_size == out.stat().st_size
    assert made.disk_size == len(disk)
    return out.read_bytes()


def _read(*layers: Path) -> bytes:
    with opened(*layers) as image:
        return image.read_at(0, image.size)


def _zero_runs(disk: bytes) -> list[tuple[int, int]]:
    """The slow way: grains that are zero, joined, if there are enough of them in a row."""
    runs, start = [], None
    grains = [disk[at : at + GRAIN] for at in range(0, len(disk), GRAIN)]
    for number, grain in enumerate([*grains, b"x"]):
        if not any(grain):
            start = number if start is None else start
        elif start is not None:
            runs.append((start * GRAIN, min(number * GRAIN, len(disk))))
            start = None
    return [(start, end) for start, end in runs if end - start >= HOLE_MIN]


def _committed(disk: bytes, parent: str) -> bytes:
    """What committing the same disk gives, from a live map of its own making."""
    live: list[Segment] = []
    at = 0
    for start, end in [*_zero_runs(disk), (len(disk), len(disk))]:
        if start > at:
            live.append(Segment(at // SECTOR, (start - at) // SECTOR, at // SECTOR, False, 0))
        if parent != lsmt.NULL_UUID and end > start:
            live += [
                Segment(sector, min(LENGTH_MAX, end // SECTOR - sector), 0, True, 0)
                for sector in range(start // SECTOR, end // SECTOR, LENGTH_MAX)
            ]
        at = end
    out = bytearray()
    head = lsmt.Head(0, len(disk), uuid=UUID.upper(), parent_uuid=parent.upper())
    lsmt.commit(live, [BytesAt(disk)], out.extend, head)
    return bytes(out)


@st.composite
def disks(draw: st.DrawFn) -> bytes:
    """Runs of noise and zeros around the lengths that matter, cut at any sector."""
    lengths = st.sampled_from((512, 4096, HOLE_MIN - 4096, HOLE_MIN, HOLE_MIN + 512, 1 << 20, (1 << 20) + 8192))
    parts = draw(st.lists(st.tuples(st.booleans(), lengths), min_size=1, max_size=8))
    noise = random.Random(len(parts))
    return b"".join(noise.randbytes(length) if full else bytes(length) for full, length in parts)


@settings(max_examples=scaled(60, 1000), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(disk=disks(), parent=st.sampled_from((lsmt.NULL_UUID, PARENT)))
def test_a_disk_becomes_the_layer_that_commit_would_write(tmp_path: Path, disk: bytes, parent: str) -> None:
    layer = _import(disk, tmp_path / "layer", LayerOptions(NONE, UUID, parent))
    assert layer == _committed(disk, parent)
    assert _read(tmp_path / "layer") == disk


@pytest.fixture(scope="module")
def disk() -> bytes:
    noise = random.Random(3)
    text = b"".join(noise.choice((b"alpha ", b"beta ", b"gamma\n")) for _ in range(400_000))
    return (noise.randbytes(700_000) + bytes(3 << 20) + text).ljust(8 << 20, b"\0")


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("tarred", [False, True])
def test_every_wrapping_reads_as_the_disk(
    tmp_path: Path, disk: bytes, codec: str, block_size: int, tarred: bool
) -> None:
    out = tmp_path / "layer"
    blob = _import(disk, out, LayerOptions(Wrapping(codec, block_size, tarred)))
    assert _read(out) == disk
    payload = tar.find_payload(BytesAt(blob))
    assert (payload is not None) == tarred
    if payload:
        assert blob[: payload.base] == tar.wrap_head(payload.length)
        assert blob[payload.base + payload.length :] == tar.wrap_tail(payload.length)
        blob = blob[payload.base :][: payload.length]
    head = zfile.open_zfile(BytesAt(blob))
    assert (head is not None) == (codec != "none")
    if head:
        assert head.block_size == block_size
        assert head.verify
        assert head.flags == zfile.FINAL_HEADER


def test_the_compressed_layer_is_what_the_slow_writer_makes(tmp_path: Path, disk: bytes) -> None:
    plain = _import(disk, tmp_path / "plain", LayerOptions(NONE))
    packed = _import(disk, tmp_path / "packed", LayerOptions(Wrapping("zstd", 16384)))
    assert zfile.Decoder(BytesAt(packed), zfile.open_zfile(BytesAt(packed))).read_at(0, len(plain)) == plain  # type: ignore[arg-type]
    slow = zfile.build(plain, zfile.Options(zfile.ZSTD, 16384))
    assert abs(len(slow) - len(packed)) < len(slow) // 100  # two versions of the codec library may be at work


def test_equal_disks_give_equal_layers_sparse_or_not(tmp_path: Path, disk: bytes) -> None:
    first = _import(disk, tmp_path / "first", LayerOptions())
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        for at in range(0, len(disk), GRAIN):
            if any(disk[at : at + GRAIN]):
                os.pwrite(file.fileno(), disk[at : at + GRAIN], at)
        file.truncate(len(disk))
    assert sparse.stat().st_blocks * 512 < len(disk)
    with open(sparse, "rb") as file:
        import_disk(file.fileno(), "sparse", tmp_path / "second", LayerOptions())
    assert (tmp_path / "second").read_bytes() == first


def _import_stream(disk: bytes, out: Path, options: LayerOptions) -> bytes:
    reader, writer = os.pipe()

    def send() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(disk)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        made = import_disk(reader, "-", out, options)
    finally:
        sender.join()
        os.close(reader)
    assert (made.disk_size, made.layer_size) == (len(disk), out.stat().st_size)
    return out.read_bytes()


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_layer_is_the_same_whatever_the_threads_and_from_a_stream(
    tmp_path: Path, disk: bytes, codec: str, block_size: int
) -> None:
    wrapping = Wrapping(codec, block_size, tar=block_size == BLOCK_SIZES[0])
    expected = _import(disk, tmp_path / "first", LayerOptions(wrapping, UUID, PARENT, jobs=1))
    for jobs in (2, 8):
        assert _import(disk, tmp_path / "second", LayerOptions(wrapping, UUID, PARENT, jobs)) == expected
        assert _import_stream(disk, tmp_path / "third", LayerOptions(wrapping, UUID, PARENT, jobs)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "raw", "second", "third"]


@settings(max_examples=scaled(40, 500), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(disk=disks(), parent=st.sampled_from((lsmt.NULL_UUID, PARENT)), codec=st.sampled_from(("none", "lz4")))
def test_a_stream_of_any_shape_gives_the_same_layer(tmp_path: Path, disk: bytes, parent: str, codec: str) -> None:
    options = LayerOptions(Wrapping(codec), UUID, parent)
    assert _import_stream(disk, tmp_path / "second", options) == _import(disk, tmp_path / "first", options)


@pytest.mark.parametrize("first", [1, 512, 4096, 700_000])
def test_a_disk_begins_where_its_descriptor_stands(tmp_path: Path, disk: bytes, first: int) -> None:
    raw = tmp_path / "before"
    with open(raw, "w+b") as file:
        file.write(b"x" * first)
        for at in range(0, len(disk), GRAIN):  # with holes
            grain = disk[at : at + GRAIN]
            file.seek(first + at)
            file.write(grain) if any(grain) else None
        file.truncate(first + len(disk))
        file.seek(first)
        made = import_disk(file.fileno(), "raw", tmp_path / "second", LayerOptions(NONE))
    assert made.disk_size == len(disk)
    assert (tmp_path / "second").read_bytes() == _import(disk, tmp_path / "first", LayerOptions(NONE))


@pytest.mark.parametrize("size", [0, 1, 511, 4097, (1 << 20) + 1])
def test_a_stream_that_is_no_whole_number_of_sectors_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes"):
        _import_stream(b"x" * size, tmp_path / "layer", LayerOptions())
    assert list(tmp_path.iterdir()) == []


def test_zeros_of_a_child_hide_what_is_below(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent", tmp_path / "child"
    full = random.Random(4).randbytes(1 << 20)
    hidden = full[: 1 << 19] + bytes(1 << 19)
    _import(full, parent, LayerOptions())
    _import(hidden, child, LayerOptions(uuid=UUID, parent_uuid=PARENT))
    assert _read(parent, child) == hidden
    with opened(child) as image:
        assert image.layers[0].describe()["lsmt"]["parent_uuid"] == PARENT.upper()
        assert [run.kind for run in image.runs(0, image.size)] == [RunKind.DATA, RunKind.ZERO]


def test_a_huge_sparse_disk_takes_no_time_or_space(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "layer"
    with open(raw, "w+b") as file:
        file.truncate(5 << 40)
        os.pwrite(file.fileno(), b"end", (5 << 40) - 512)
        made = import_disk(file.fileno(), "raw", out, LayerOptions())
    assert made.stored == 4096
    assert made.layer_size < 65536
    with opened(out) as image:
        assert image.size == 5 << 40
        assert image.read_at((5 << 40) - 512, 3) == b"end"


@pytest.mark.parametrize("written", [4096, 32 << 10, PIECE])
def test_a_layer_holds_few_buffers_whatever_is_written_from_them(tmp_path: Path, written: int) -> None:
    noise, buffers = random.Random(5).randbytes(written), []
    with open(tmp_path / "layer", "w+b") as file, LayerFile(file.fileno(), Wrapping(), jobs=2) as layer:
        for _ in range(100):
            buffers.append(layer.buffer())
            buffers[-1][:written] = noise
            layer.write(memoryview(buffers[-1])[:written])
    assert len({id(buffer) for buffer in buffers}) <= 6  # two tasks for each thread, one more, and who fills


@pytest.mark.parametrize("size", [0, 1, 511, 513, 4097])
def test_what_is_no_whole_number_of_sectors_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(UsageError, match=f"{size} bytes"):
        _import(b"x" * size, tmp_path / "layer", LayerOptions())
    assert not (tmp_path / "layer").exists()


@pytest.mark.parametrize(
    "options",
    [
        LayerOptions(uuid="no uuid"),
        LayerOptions(parent_uuid=""),
        LayerOptions(Wrapping("gzip")),
        LayerOptions(Wrapping("lz4", 1000)),
        LayerOptions(Wrapping("lz4", 131072)),
        LayerOptions(jobs=0),
    ],
    ids=repr,
)
def test_bad_options_are_refused(tmp_path: Path, options: LayerOptions) -> None:
    with pytest.raises(UsageError):
        _import(bytes(4096), tmp_path / "layer", options)
    assert not (tmp_path / "layer").exists()


def test_more_entries_than_readers_take_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsmt, "SEALED_ENTRIES_MAX", 256)
    pieces = (b"x" * GRAIN + bytes(HOLE_MIN)) * 257
    with pytest.raises(UsageError, match="entries"):
        _import(pieces, tmp_path / "layer", LayerOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_a_failed_import_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "layer"
    out.write_bytes(b"older")
    out.chmod(0o640)
    with pytest.raises(UsageError):
        _import(b"x" * 100, out, LayerOptions())
    assert out.read_bytes() == b"older"
    _import(bytes(4096), out, LayerOptions())
    assert out.read_bytes() != b"older"
    assert out.stat().st_mode & 0o777 == 0o640


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(4096))
    with open(tmp_path / "raw", "rb") as raw, pytest.raises(UsageError, match="/dev/null"):
        import_disk(raw.fileno(), "raw", Path("/dev/null"))
    with open(tmp_path / "raw", "rb") as raw, pytest.raises(NotFound, match="nowhere"):
        import_disk(raw.fileno(), "raw", tmp_path / "nowhere" / "layer")


def test_progress_ends_at_the_size(tmp_path: Path, disk: bytes) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(disk)
    seen: list[tuple[int, int]] = []
    with open(raw, "rb") as file:
        import_disk(file.fileno(), "raw", tmp_path / "layer", None, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(disk), len(disk))
