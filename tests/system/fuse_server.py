# SPDX-License-Identifier: Apache-2.0
"""A server for one FUSE file, small enough to kill: fuse_server.py FD FILE warm|cold|begun.

Serves FILE as a flat image on the mounted /dev/fuse descriptor FD, says "ready", ends
when it is unmounted. cold: nothing is in the cache and no fetch is ever answered; begun: but the first 64 KiB are.
"""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

from blockdev.config import Policy
from blockdev.engine import Blob, Engine, EventKind, LayerKind, LayerTable
from blockdev.image import OpenImage
from blockdev.transport.fuse import FuseTransport

TABLE_OFFSET = 4096


def open_blob(engine: Engine, file: Path, how: str) -> Blob:
    size = file.stat().st_size
    if how == "warm":
        return engine.open_local(os.open(file, os.O_RDONLY), size)
    data, table = os.memfd_create("data"), os.memfd_create("table")
    os.ftruncate(data, size)
    os.ftruncate(table, TABLE_OFFSET + 4 * -(-size // 65536))
    blob = engine.open_cached(data, table, id=1, size=size, table_offset=TABLE_OFFSET, policy=Policy("hang"))
    if how == "begun":
        blob.store(0, memoryview(file.read_bytes()[:65536]))
    return blob


def main(fuse_fd: int, file: Path, how: str) -> None:
    with Engine() as engine, open_blob(engine, file, how) as blob, blob.open_raw(0, blob.size) as content:
        table = LayerTable(LayerKind.FLAT, content, content)
        with OpenImage(engine.open_image([table], blob.size), []) as image:
            transport = FuseTransport(fuse_fd, id=1)
            transport.attach(image)
            print("ready", flush=True)
            while not ((event := engine.next_event()) and event.kind is EventKind.FUSE_CLOSED):
                select.select([engine.event_fd], [], [])
            print(f"answered {transport.requests()}", flush=True)
            transport.detach(timeout=0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
