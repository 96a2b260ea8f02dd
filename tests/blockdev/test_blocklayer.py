# SPDX-License-Identifier: Apache-2.0
"""A block layer holds what files were stored in it, each content once, in order, and no long zeros."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import pack

import pytest

from blockdev.build.blocklayer import DISK_BLOCKS_MAX, LATE, BlockLayer, Content, Contents, Nowhere
from blockdev.build.layerfile import PIECE, LayerFile, Wrapping
from blockdev.errors import CorruptImage
from formats.lsmt import Head
from formats.readat import BytesAt
from formats.tree import BLOCK_SIZE
from tests import oracle

FIRST_BLOCK = b"S" * BLOCK_SIZE
METADATA = b"M" * (3 * BLOCK_SIZE)


@dataclass
class Built:
    """A layer, and where its files are."""

    blob: bytes
    blocks: list[int]
    end: int


def _pieces(content: bytes, step: int = 100_000) -> Iterator[tuple[int, bytes]]:
    for at in range(0, len(content), step):
        yield at, content[at : at + step]


def _build(
    folder: Path,
    files: list[tuple[int, Content]],
    *,
    contents: Contents | None = None,
    start: int = 1,
    wrapping: Wrapping | None = None,
    jobs: int = 2,
) -> Built:
    path = folder / "layer"
    with path.open("w+b") as file, LayerFile(file.fileno(), wrapping or Wrapping(tar=True), jobs, LATE) as out:
        layer = BlockLayer(out, Head(0, 0), contents or Contents(), start)
        blocks = [layer.store(size, content) for size, content in files]
        layer.put([METADATA[:5000], METADATA[5000:]])
        layer.finish(FIRST_BLOCK)
        out.finish()
        return Built(path.read_bytes(), blocks, layer.next_block)


def _disk(*blobs: bytes) -> oracle.Disk:
    return oracle.flatten(map(BytesAt, blobs))


def _same(found: bytes, wanted: bytes) -> bool:
    """Digests: pytest takes minutes to show how megabytes differ."""
    return (len(found), hashlib.sha256(found).digest()) == (len(wanted), hashlib.sha256(wanted).digest())


def test_files_lie_in_their_order_then_metadata_then_the_first_block(tmp_path: Path) -> None:
    chance = random.Random(1)
    contents = [chance.randbytes(size) for size in (1, BLOCK_SIZE, BLOCK_SIZE + 1, PIECE, PIECE + 1, 3 * PIECE + 77, 5)]
    built = _build(tmp_path, [(len(content), _pieces(content)) for content in contents])
    disk = _disk(built.blob)
    expected = FIRST_BLOCK
    for content, block in zip(contents, built.blocks, strict=True):
        assert block == len(expected) // BLOCK_SIZE
        expected += content + bytes(-len(content) % BLOCK_SIZE)
    expected += METADATA
    assert disk.size == len(expected) == built.end * BLOCK_SIZE
    assert _same(disk.read_at(0, disk.size), expected)
    layer = oracle.open_layer(BytesAt(built.blob))
    first, last = layer.segments[0], max(layer.segments, key=lambda segment: segment.moffset)
    assert first == last, "the first block comes last in the file, and first in the index"


@pytest.mark.parametrize("size", [100, PIECE + 1])
def test_content_that_is_stored_already_is_not_stored_again(tmp_path: Path, size: int) -> None:
    content = random.Random(2).randbytes(size)
    contents = Contents()
    lower = _build(tmp_path, [(size, _pieces(content)), (size, _pieces(content))], contents=contents)
    assert lower.blocks[0] == lower.blocks[1] == 1
    other = content[:-1] + bytes([content[-1] ^ 1])
    upper = _build(
        tmp_path,
        [(size, _pieces(content, 7777)), (size, _pieces(other)), (size, _pieces(content))],
        contents=contents,
        start=lower.end,
    )
    assert upper.blocks == [1, lower.end, 1]
    disk = _disk(lower.blob, upper.blob)
    assert _same(disk.read_at(BLOCK_SIZE, size), content)
    assert _same(disk.read_at(lower.end * BLOCK_SIZE, size), other)


def test_long_zeros_are_not_stored_whether_they_are_holes_or_bytes(tmp_path: Path) -> None:
    size = 40 * PIECE
    holes = [(5000, b"a" * 3000), (20 * PIECE + 1, b"b" * 10), (30 * PIECE, bytes(PIECE))]
    plain = bytearray(size)
    for at, piece in holes:
        plain[at : at + len(piece)] = piece
    built = _build(tmp_path, [(size, iter(holes)), (len(plain), _pieces(bytes(plain)))], wrapping=Wrapping("none"))
    assert len(built.blob) < 100_000
    disk = _disk(built.blob)
    for block in built.blocks:
        assert _same(disk.read_at(block * BLOCK_SIZE, size), bytes(plain))


def test_files_with_other_holes_are_other_files(tmp_path: Path) -> None:
    size = 4 * PIECE
    first, second = [(0, b"x"), (PIECE, b"y")], [(0, b"x"), (2 * PIECE, b"y")]
    built = _build(tmp_path, [(size, iter(first)), (size, iter(second)), (size, iter(first))])
    assert built.blocks[0] == built.blocks[2] != built.blocks[1]
    disk = _disk(built.blob)
    assert disk.read_at(built.blocks[1] * BLOCK_SIZE + 2 * PIECE, 1) == b"y"
    assert disk.read_at(built.blocks[0] * BLOCK_SIZE + PIECE, 1) == b"y"


def test_no_content_passes_for_a_file_with_holes(tmp_path: Path) -> None:
    """A small file of every text that could have been hashed to stand for the one with a hole."""
    size, end = 2 * PIECE, 2 * PIECE - 1
    content, gaps = hashlib.sha256(b"x").digest(), hashlib.sha256(pack("<QQ", 0, end)).digest()
    texts = [content + gaps, b"sparse" + content + gaps]
    built = _build(tmp_path, [(size, [(end, b"x")]), *((len(text), [(0, text)]) for text in texts)])
    disk = _disk(built.blob)
    for block, text in zip(built.blocks[1:], texts, strict=True):
        assert disk.read_at(block * BLOCK_SIZE, len(text)) == text


@pytest.mark.parametrize("wrapping", [Wrapping("lz4", 4096, tar=True), Wrapping("zstd", 65536, tar=True, digests=True)])
def test_the_bytes_do_not_depend_on_threads_nor_on_the_pieces_that_content_comes_in(
    tmp_path: Path, wrapping: Wrapping
) -> None:
    chance = random.Random(3)
    contents = [chance.choice((bytes, chance.randbytes))(chance.randrange(1, 2 * PIECE)) for _ in range(12)]

    def build(jobs: int, step: int) -> bytes:
        files = [(len(content), _pieces(content, step)) for content in contents]
        return _build(tmp_path, files, wrapping=wrapping, jobs=jobs).blob

    assert len({hashlib.sha256(build(jobs, step)).digest() for jobs, step in ((1, PIECE), (8, 65536), (3, 999))}) == 1


def test_a_layer_that_goes_nowhere_has_the_same_effects(tmp_path: Path) -> None:
    chance = random.Random(4)
    files = [chance.randbytes(size) for size in (10, PIECE + 5, 10, 70000)] * 2
    built = _build(tmp_path, [(len(content), _pieces(content)) for content in files])
    layer = BlockLayer(Nowhere(), Head(0, 0), Contents(), 1)
    assert [layer.store(len(content), _pieces(content)) for content in files] == built.blocks


@pytest.mark.parametrize("size", [PIECE // 2, PIECE * 2])
@pytest.mark.parametrize("pieces", [[(0, b"x"), (0, b"y")], [(-1, b"x")]])
def test_content_that_is_not_in_order_is_refused(tmp_path: Path, size: int, pieces: list[tuple[int, bytes]]) -> None:
    with pytest.raises(CorruptImage, match="out of place"):
        _build(tmp_path, [(size, pieces)])


@pytest.mark.parametrize("size", [100, PIECE * 2])
def test_content_past_the_size_of_its_file_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(CorruptImage, match="building a layer failed"):
        _build(tmp_path, [(size, [(0, bytes(size)), (size, b"x")])])


def test_a_disk_that_no_file_system_could_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match="16 TiB"):
        _build(tmp_path, [(DISK_BLOCKS_MAX * BLOCK_SIZE, [])])
