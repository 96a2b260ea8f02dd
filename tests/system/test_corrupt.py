# SPDX-License-Identifier: Apache-2.0
"""Broken layers end in one CorruptImage that names blob and offset, or read right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blockdev.engine import Engine
from blockdev.errors import BlockdevError, CorruptImage
from formats import lsmt, zfile
from tests import fixtures, stacks
from tests.opened import opened, opened_bytes, sha256

GOOD = "4a0679689981fa7b0552fc26a2b50374b83f702416ad338dbc50ea2869a326fd"
MEMORY_MAX = 256 << 20

# Damage to what no reader needs, or that the format has a second copy of.
READS_RIGHT = {
    "good.lsmt",
    "good.nocrc.zlsmt",
    "good.tar",
    "good.trailer.zlsmt",
    "good.zlsmt",
    "r-header-vsize.lsmt",
    "t-trunc-1k.tar",
    "z-append-512.zlsmt",
    "z-header-nodigestflag.zlsmt",
    "z-trailer-digest.zlsmt",
    "z-trailer-magic.zlsmt",
    "z-trunc-1.zlsmt",
    "z-trunc-512.zlsmt",
}
UNDETECTABLE = {"r-data-flip.lsmt"}  # LSMT has no checksum of data


def _files() -> list[Path]:
    folder = fixtures.locate()
    found = (folder / "08-corrupt").iterdir() if folder else ()
    return sorted(path for path in found if path.suffix in (".lsmt", ".zlsmt", ".tar"))


def test_the_broken_fixtures_are_there() -> None:
    assert fixtures.folder()
    assert {path.name for path in _files()} > READS_RIGHT | UNDETECTABLE


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.name)
def test_a_broken_layer_is_refused_by_name_and_offset_or_reads_right(path: Path) -> None:
    if path.name in READS_RIGHT:
        with opened(path) as image:
            assert sha256(image) == GOOD
    elif path.name in UNDETECTABLE:
        with opened(path) as image:
            assert len(image.read_at(0, image.size)) == 1 << 20
    else:
        with pytest.raises(CorruptImage) as refusal, opened(path) as image:
            sha256(image)
        _says_where(refusal.value, str(path))


def _says_where(error: BlockdevError, name: str) -> None:
    text = str(error)
    assert name in text
    assert "offset " in text
    assert "\n" not in text
    assert error.exit_code == 5


PLAN = stacks.Plan(2048, (stacks.Op(0, 300, 1), stacks.Op(700, 64, 2), stacks.Op(100, 50, None)))
SHAPES = {
    "committed": PLAN,
    "sealed": stacks.Plan(PLAN.size, PLAN.ops, sealed=True),
    "lz4": stacks.Plan(PLAN.size, PLAN.ops, zfile=zfile.Options()),
    "zstd with a trailer": stacks.Plan(
        PLAN.size, PLAN.ops, zfile=zfile.Options(zfile.ZSTD, 65536, overwrite_header=False)
    ),
    "tar": stacks.Plan(PLAN.size, PLAN.ops, zfile=zfile.Options(), tar=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_truncation_is_refused_or_reads_right(shape: str) -> None:
    whole = SHAPES[shape].build()
    borders = [at + step for at in (512, 1024, 1536, 4096, 8192, len(whole)) for step in (-1, 0, 1)]
    lengths = sorted({*range(0, len(whole), 797), *range(max(0, len(whole) - 6000), len(whole), 61), *borders})
    refused = 0
    with Engine(work_threads=1) as engine:
        with opened_bytes(engine, whole) as image:
            content = image.read_at(0, image.size)
        for length in lengths:
            try:
                with opened_bytes(engine, whole[:length]) as image:
                    assert image.read_at(0, image.size) == content
            except CorruptImage as error:
                _says_where(error, "layer 0")
                refused += 1
    assert refused > len(lengths) // 2


def _lsmt(entries: list[lsmt.Segment], *, count: int | None = None, size: int = 1 << 20) -> bytes:
    """A layer of 8 data sectors with this index, which may claim to have `count` entries."""
    data = bytes(range(256)) * 16
    table = lsmt.pack(entries)
    head = lsmt.Head(lsmt.COMMIT_HEADER, size)
    trailer = lsmt.Head(lsmt.SEALED_TRAILER, size, lsmt.HEAD_SIZE + len(data), len(entries) if count is None else count)
    return head.build() + data + table + trailer.build()


INDEXES = {
    "overlapping": [lsmt.Segment(0, 4, 8, False, 0), lsmt.Segment(3, 4, 12, False, 0)],
    "backwards": [lsmt.Segment(8, 4, 8, False, 0), lsmt.Segment(0, 4, 12, False, 0)],
    "the same twice": [lsmt.Segment(0, 4, 8, False, 0)] * 2,
    "empty entry": [lsmt.Segment(0, 0, 8, False, 0)],
    "into the header": [lsmt.Segment(0, 4, 4, False, 0)],
    "into itself": [lsmt.Segment(0, 4, 15, False, 0)],
    "zeroed past the data": [lsmt.Segment(0, 4, 100, True, 0)],
    "largest numbers": [lsmt.Segment((1 << 50) - 2, 16383, (1 << 55) - 1, False, 255)],
}


def _refusal(*blobs: bytes) -> str:
    """What opening the stack fails with."""
    with Engine(work_threads=1) as engine, pytest.raises(CorruptImage) as refusal, opened_bytes(engine, *blobs):
        pass
    _says_where(refusal.value, "layer ")
    return str(refusal.value)


@pytest.mark.parametrize("index", INDEXES)
def test_an_impossible_index_is_refused(index: str) -> None:
    assert "layer 0" in _refusal(_lsmt(INDEXES[index]))


@pytest.mark.parametrize("count", [1, 1_000_000, 1_000_001, 1 << 32, (1 << 60) + 1, (1 << 64) - 1])
def test_an_absurd_number_of_entries_is_refused(count: int) -> None:
    assert "layer 0" in _refusal(_lsmt([], count=count))


def test_the_broken_layer_of_a_stack_is_the_one_that_is_named() -> None:
    good, bad = PLAN.build(), _lsmt(INDEXES["overlapping"])
    assert "layer 1" in _refusal(good, bad, good)


def test_a_damaged_block_of_a_stack_names_its_layer() -> None:
    lower = stacks.Plan(2048, (stacks.Op(0, 300, 1),), zfile=zfile.Options()).build()
    upper = stacks.Plan(2048, (stacks.Op(400, 64, 1),), zfile=zfile.Options()).build()
    damaged = bytearray(lower)
    damaged[len(lower) // 2] ^= 1
    with Engine(work_threads=1) as engine, opened_bytes(engine, bytes(damaged), upper) as image:
        with pytest.raises(CorruptImage, match=r"layer 0: ZFile block \d+ at offset \d+") as refusal:
            image.read_at(0, image.size)
        assert image.read_at(400 * 512, 64 * 512) == stacks.Op(400, 64, 1).content()
    _says_where(refusal.value, "layer 0")


def test_a_disk_that_is_no_layer_is_refused() -> None:
    assert "offset 0: no LSMT or ZFile magic" in _refusal(bytes(1 << 20))


def test_a_flat_layer_cannot_be_stacked() -> None:
    flat = zfile.build(bytes(range(256)) * 512, zfile.Options())
    assert "layer 0" in _refusal(flat, PLAN.build())


def test_an_lsmt_layer_whose_header_is_lost_is_not_taken_for_a_disk() -> None:
    plain = bytearray(PLAN.build())
    plain[0] ^= 1
    assert "trailer" in _refusal(zfile.build(bytes(plain), zfile.Options()))


_MEASURE = """
import sys
from pathlib import Path
from blockdev.errors import CorruptImage
from tests.opened import opened, sha256
for path in map(Path, sys.argv[1:]):
    try:
        with opened(path) as image:
            sha256(image)
    except CorruptImage:
        pass
# Not getrusage: its peak survives exec, and so is that of the test's own process.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


def test_no_broken_layer_takes_much_memory(tmp_path: Path) -> None:
    paths = _files()
    absurd = {
        "entries": _lsmt([], count=1_000_000),
        "compressed entries": zfile.build(_lsmt([lsmt.Segment(0, 0, 8, False, 0)] * 900_000), zfile.Options()),
        "blocks": zfile.Head(zfile.FINAL_HEADER, 512, 1 << 29, 1 << 41, 0, 4096, zfile.LZ4, verify=True).build(),
        "one block for all": zfile.build(bytes(64 << 20), zfile.Options(zfile.ZSTD, 65536)),
    }
    for name, content in absurd.items():
        path = tmp_path / name
        path.write_bytes(content)
        paths.append(path)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)],
        cwd=fixtures.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < MEMORY_MAX
