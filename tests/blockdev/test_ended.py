# SPDX-License-Identifier: Apache-2.0
"""What is still under way when the last image that has a blob open ends."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.engine import EXTENT_SIZE, LayerKind, LayerTable
from formats.digests import Place
from tests.checked import await_written
from tests.claimants import GOOD, SIZE, TABLE, WAIT, Bench

NBD_REQUEST, NBD_READ = 0x25609513, 0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.mark.parametrize("table", [None, TABLE])
def test_what_comes_after_its_image_has_ended_is_not_anothers(bench: Bench, table: Place | None) -> None:
    with ExitStack() as mounted:
        blob = bench.open(mounted, bench.evil).blob
        blob.read_at(0, EXTENT_SIZE)
        await_written(blob, EXTENT_SIZE)
        bench.evil.gate.clear()
        file = mounted.enter_context(blob.open_raw(0, SIZE))
        image = mounted.enter_context(bench.engine.open_image([LayerTable(LayerKind.FLAT, file, file)], SIZE))
        client, server = (mounted.enter_context(end) for end in socket.socketpair())
        connection = image.serve_nbd(server.fileno(), id=1, structured=False, allocation=False)
        client.sendall(struct.pack(">IHHQQI", NBD_REQUEST, 0, NBD_READ, 1, 0, SIZE))
        while len(bench.evil.reads) < 2:
            os.sched_yield()
        connection.close(timeout=0.0)
    assert [one.in_use for one in bench.cache.stat()] == [False]
    with ExitStack() as mounted:
        good = bench.open(mounted, bench.good, table).blob
        assert good.read_at(SIZE - 10, 10) == GOOD[-10:]
        bench.evil.gate.set()  # its answer comes now, and has come when all threads have gone
        bench.engine.stop()
        assert bench.supply.join(WAIT)
    bench.engine.close()
    bench.start()
    assert bench.read(bench.good, table) == GOOD
