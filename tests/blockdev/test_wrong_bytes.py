# SPDX-License-Identifier: Apache-2.0
"""A server that sends bytes which are not the blob's: what a reader sees, with checksums and without."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import EXTENT_SIZE, Engine
from blockdev.errors import CorruptImage
from blockdev.image import open_image
from blockdev.layer import NamedBlob
from blockdev.registry.client import Client
from blockdev.source.blob import RegistryBlob
from blockdev.supply import Supply
from formats import oci, zfile
from formats.lsmt import SECTOR
from tests import requires, stacks
from tests.fakes.http_server import Answer, HttpServer, Seen, ranged
from tests.served import served, unix_listener
from tests.small_image import NOBODY

WAIT = 20.0
OPS = (stacks.Op(0, 4000, 1), stacks.Op(5000, 64, 2), stacks.Op(100, 50, None))
STACK = stacks.Stack((stacks.Plan(8192, OPS, zfile=zfile.Options(), tar=True),))
CHECKED = STACK.lowers[0].build()
DISK = STACK.model().read_at(0, STACK.size)
PART = 2560 * SECTOR  # of the disk; what holds the rest is never asked for, so the digest is never known
UNCHECKED = random.Random(3).randbytes(300_000)


class Liar:
    """Serves a blob by ranges; the byte at `place` is wrong the next `lies` times that it is asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = self.lies = self.asked = 0
        self.server = HttpServer(self._answer)

    def _answer(self, seen: Seen) -> Answer:
        answer = ranged(seen, self.content)
        assert seen.range
        at = self.place - seen.range[0]
        if 0 <= at < len(answer.body):
            self.asked += 1
            if self.lies:
                self.lies -= 1
                wrong = bytearray(answer.body)
                wrong[at] ^= 0x40
                answer.body = bytes(wrong)
        return answer


class Bench:
    """An owner's engine, cache and supply, and one blob of a liar's."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.liar = Liar(content)
        self.engine = Engine(work_threads=1, readahead_extents=0)
        self.cache = Cache(folder, self.engine)
        self.supply = Supply(self.engine, self.cache)
        self.client = Client(self.liar.server.host, NOBODY)

    def open(self, undo: ExitStack) -> NamedBlob:
        digest, size = oci.digest_of(self.liar.content), len(self.liar.content)
        return self.supply.open(
            digest,
            size,
            Policy("eio", WAIT),
            lambda offer, undo: RegistryBlob(self.client, "app", digest, size, offer),
            undo,
        )

    def close(self) -> None:
        self.engine.stop()
        assert self.supply.join(WAIT)
        self.engine.close()
        self.client.close()
        self.liar.server.close()


@pytest.fixture
def checked(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, CHECKED)
    yield bench
    bench.close()


@pytest.fixture
def unchecked(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, UNCHECKED)
    yield bench
    bench.close()


def test_a_block_with_a_checksum_is_fetched_once_more(checked: Bench) -> None:
    checked.liar.place, checked.liar.lies = len(CHECKED) // 2, 1
    with ExitStack() as undo:
        image = undo.enter_context(open_image(checked.engine, [checked.open(undo)]))
        assert image.read_at(0, PART) == DISK[:PART]
    assert checked.liar.asked == 2


def test_a_small_read_that_meets_it_is_answered_too(checked: Bench, tmp_path: Path) -> None:
    """A fetch thread answers small reads itself, before it has written what it brought."""
    requires.requires_command("nbdsh")
    checked.liar.place, checked.liar.lies = 16 * EXTENT_SIZE + 1, 1  # in the block whose read misses the extent
    script = f"for at in range(0, {PART}, 4096): open('read', 'ab').write(h.pread(4096, at))"
    with ExitStack() as undo:
        image = undo.enter_context(open_image(checked.engine, [checked.open(undo)]))
        socket = tmp_path / "socket"
        undo.enter_context(served(checked.engine, image.image, unix_listener(socket)))
        command = ["/usr/bin/nbdsh", "--uri", f"nbd+unix:///?socket={socket}", "-c", script]
        # It runs the first python3 on PATH, and only Debian's own has libnbd.
        subprocess.run(command, check=True, timeout=60, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
    assert (tmp_path / "read").read_bytes() == DISK[:PART]
    assert checked.liar.asked == 2


def test_a_block_that_stays_wrong_is_an_error_and_right_again_when_it_comes_right(checked: Bench) -> None:
    checked.liar.place, checked.liar.lies = len(CHECKED) // 2, 2
    with ExitStack() as undo:
        image = undo.enter_context(open_image(checked.engine, [checked.open(undo)]))
        for _ in range(2):
            with pytest.raises(CorruptImage):
                image.read_at(0, PART)
        assert checked.liar.asked == 2, "it is not asked for at each read"
        assert image.read_at(0, 4096) == DISK[:4096]
    with ExitStack() as undo:
        image = undo.enter_context(open_image(checked.engine, [checked.open(undo)]))
        assert image.read_at(0, PART) == DISK[:PART]
    assert checked.liar.asked == 3


@pytest.mark.parametrize("place", [257, 512 + 1])
def test_heads_that_are_wrong_are_read_once_more(checked: Bench, place: int) -> None:
    """In the tar's magic, and in the ZFile's."""
    checked.liar.place, checked.liar.lies = place, 1
    with ExitStack() as undo:
        image = undo.enter_context(open_image(checked.engine, [checked.open(undo)]))
        assert image.read_at(0, image.size) == DISK
    assert checked.liar.asked == 2


def test_without_checksums_wrong_bytes_are_served_until_the_whole_digest_is_known(unchecked: Bench) -> None:
    unchecked.liar.place, unchecked.liar.lies = 2 * EXTENT_SIZE + 77, 1
    with ExitStack() as undo:
        blob = unchecked.open(undo).blob
        before = blob.read_at(0, len(UNCHECKED))
        wrong = [at for at, (one, other) in enumerate(zip(before, UNCHECKED, strict=True)) if one != other]
        assert wrong == [unchecked.liar.place]
        entry = unchecked.cache.by_id(1)
        assert entry
        undo.callback(entry.close)
        with pytest.raises(CorruptImage, match="digest"):
            entry.verify()
        assert blob.stat().present_bytes == 0
        assert blob.read_at(0, len(UNCHECKED)) == UNCHECKED
        entry.verify()
        assert entry.verified
