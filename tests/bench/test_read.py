# SPDX-License-Identifier: Apache-2.0
"""Warm reads in process: engine, cache, index and codec, without any transport.

`extra_info["bytes"]` turns a time into a rate.
Everything is in the cache before a figure is taken, and what is read is compared with
the disk once, so that a fast wrong answer is a failure.
"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.config import Policy
from blockdev.engine import Codec, Engine, zfile_compress
from blockdev.image import OpenImage, open_image
from blockdev.layer import NamedBlob
from formats import lsmt, zfile
from formats.presence import TABLE_OFFSET
from tests.bench.disk import disk_pieces
from tests.opened import opened_bytes

SIZE = 32 << 20
PIECE = 1 << 20
SMALL = 4096
SMALL_READS = 1000
MAPPINGS = 200_000


@pytest.fixture(scope="module")
def disk() -> bytes:
    return b"".join(disk_pieces(SIZE))


def committed(disk: bytes) -> bytes:
    """The disk as an uncompressed layer."""
    out = bytearray()
    writer = lsmt.CommitWriter(out.extend, lsmt.Head(0, len(disk)))
    writer.data(0, disk)
    writer.finish()
    return bytes(out)


def compressed(plain: bytes, codec: Codec) -> bytes:
    """A layer as a ZFile of 4 KiB blocks with checksums."""
    options = zfile.Options(codec=codec)
    body, lengths = zfile_compress(codec, options.block_size, plain, crc=True)
    table = struct.pack(f"<{len(lengths)}I", *lengths)
    header, trailer = zfile.final_heads(options, len(plain), zfile.HEAD_SIZE + len(body), table)
    return header.build() + bytes(body) + table + trailer.build()


@pytest.fixture(scope="module", params=["none", "lz4", "zstd"])
def image(request: pytest.FixtureRequest, disk: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenImage]:
    """The disk behind a cache entry that has been filled."""
    blob = committed(disk)
    if request.param != "none":
        blob = compressed(blob, Codec[request.param.upper()])
    folder: Path = tmp_path_factory.mktemp("cache")
    with ExitStack() as stack:
        engine = stack.enter_context(Engine())
        files = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in ("data", "map")]
        for fd in files:
            stack.callback(os.close, fd)
        entry = engine.open_cached(*files, id=1, size=len(blob), table_offset=TABLE_OFFSET, policy=Policy("eio", 30.0))
        stack.enter_context(entry)
        entry.store(0, blob)
        opened = stack.enter_context(open_image(engine, [NamedBlob("bench", entry)]))
        assert b"".join(opened.read_at(at, PIECE) for at in range(0, SIZE, PIECE)) == disk
        yield opened


def test_sequential_1m(benchmark, image: OpenImage):
    buffer = bytearray(PIECE)
    benchmark.extra_info["bytes"] = SIZE

    def read_all() -> None:
        for offset in range(0, SIZE, PIECE):
            image.read_into(offset, buffer)

    benchmark(read_all)


def test_random_4k(benchmark, image: OpenImage):
    buffer = bytearray(SMALL)
    rng = random.Random(1)
    offsets = [rng.randrange(SIZE // SMALL) * SMALL for _ in range(SMALL_READS)]
    benchmark.extra_info["bytes"] = SMALL * SMALL_READS

    def read_some() -> None:
        for offset in offsets:
            image.read_into(offset, buffer)

    benchmark(read_some)


def test_random_4k_over_a_large_index(benchmark):
    """Every read meets eight mappings, all zeroed: the index lookup alone."""
    out = bytearray()
    writer = lsmt.CommitWriter(out.extend, lsmt.Head(0, MAPPINGS * 2 * lsmt.SECTOR))
    for place in range(MAPPINGS):
        writer.zeroed(place * 2, 1)
    writer.finish()
    buffer = bytearray(SMALL)
    rng = random.Random(2)
    offsets = [rng.randrange(MAPPINGS * 2 - 8) * lsmt.SECTOR for _ in range(SMALL_READS)]
    benchmark.extra_info["bytes"] = SMALL * SMALL_READS
    with Engine() as engine, opened_bytes(engine, bytes(out)) as image:
        assert len(image.runs(0, SMALL)) == 8

        def read_some() -> None:
            for offset in offsets:
                image.read_into(offset, buffer)

        benchmark(read_some)
        assert not any(buffer)
