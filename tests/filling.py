# SPDX-License-Identifier: Apache-2.0
"""A cache in this process whose entries fill from memory, and a bit that flips in one of its files."""

from __future__ import annotations

import os
import random
from pathlib import Path

from blockdev import entryfiles
from blockdev.cache import Cache, Entry
from blockdev.caller import Caller
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.fetch.pool import Pool
from formats import presence
from formats.oci import digest_of
from tests.fakes.memory_source import MemorySource

EXTENT = presence.EXTENT_SIZE
CONTENT = random.Random(3).randbytes(6 * EXTENT + 77)
DIGEST = digest_of(CONTENT)
POLICY = Policy("eio", 30.0)
WAITING = Caller(print, lambda: False)


class Filling:
    """A cache whose entries are filled from memory."""

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.engine = Engine(work_threads=1, readahead_extents=0)
        self.cache = Cache(self.blobs, self.engine)
        self.pool = Pool(self.engine, threads=2)
        self.pool.start()
        self.source = MemorySource(CONTENT)

    def open(self, content: bytes = CONTENT) -> Entry:
        """An entry, as after a restart when nobody else has it open."""
        entry = self.cache.open(digest_of(content), len(content), POLICY)
        self.source.content = content
        self.pool.attach(entry.id, entry.blob, self.source)
        return entry

    def map(self, content: bytes = CONTENT) -> Path:
        return entryfiles.map_of(entryfiles.path_of(self.blobs, digest_of(content)))

    def sealed(self) -> bool:
        """What the disk says."""
        return presence.Head.parse(self.map().read_bytes()[: presence.HEAD_SIZE]).verified

    def close(self) -> None:
        self.engine.stop()
        assert self.pool.join(20)
        self.engine.close()


def flip(path: Path, offset: int, bit: int = 4) -> None:
    """One bit, in place."""
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ bit]), offset)
