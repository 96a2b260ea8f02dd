# SPDX-License-Identifier: Apache-2.0
"""After a power cut every byte is right, whatever part of what was written had reached the disk.

The model: since the last fsync, each 4 KiB block of the data file and of the map has, for itself,
any of the contents it had since; so have the files' sizes. A history is made by the real
engine, a cut chooses from it at random, and the real engine reads what is left, with
a source for what is missing. Every choice hangs on the number of the case.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.cache import Cache, Entry
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.errors import CorruptImage
from blockdev.fetch.pool import Pool
from blockdev.image import open_image
from blockdev.layer import NamedBlob
from formats import presence, zfile
from formats.oci import digest_of
from formats.presence import EXTENT_SIZE
from tests.fakes.memory_source import MemorySource
from tests.requires import scaled
from tests.stacks import Op, Plan, Stack

CASES = scaled(20, 1000)  # of each kind
BLOCK = 4096
POLICY = Policy("eio", 30.0)
RIGHT, WRONG = (digest_of(name) for name in (b"registry.example/app", b"elsewhere.example/app"))
_OPS = (Op(0, 700, 1), Op(900, 500, 3), Op(1500, 40, None))
PLANS = {
    "raw": Plan(1600, _OPS),
    "no-crc": Plan(1600, _OPS, zfile=zfile.Options(verify=False)),
    "crc": Plan(1600, _OPS, zfile=zfile.Options(verify=True)),
}


class Disk:
    """What the two files of an entry may be after a cut: all that they were since the last fsync."""

    def __init__(self) -> None:
        self.data = [b""]
        self.map = [b""]

    def synced(self) -> None:
        """What was last noted is on the disk."""
        del self.data[:-1], self.map[:-1]

    def seal_broken(self) -> None:
        """The map with a broken seal, and nothing else changed, is on the disk."""
        last = self.map[-1]
        seal = slice(presence.SEAL_OFFSET, presence.SEAL_OFFSET + presence.SEAL_SIZE)
        self.map = [last[: seal.start] + bytes(presence.SEAL_SIZE) + last[seal.stop :]]

    def cut(self, rng: random.Random) -> tuple[bytes, bytes]:
        """Data file and map after the power has gone."""
        return _any_of(self.data, rng), _any_of(self.map, rng)


def _any_of(versions: list[bytes], rng: random.Random) -> bytes:
    size = len(rng.choice(versions))
    recent = versions[-rng.randint(1, len(versions)) :]  # else an old block somewhere spoils nearly every extent
    blocks = (rng.choice(recent)[start : start + BLOCK].ljust(BLOCK, b"\0") for start in range(0, size, BLOCK))
    return b"".join(blocks)[:size]


class Machine:
    """An engine that fills entries from a blob in memory."""

    def __init__(self, plan: Plan) -> None:
        self.engine = Engine(work_threads=1, readahead_extents=0)
        self.pool = Pool(self.engine, threads=2)
        self.pool.start()
        self.blob = plan.build()
        self.disk = Stack((plan,)).model().read_at(0, plan.size * 512)
        self.digest = digest_of(self.blob)
        self.source = MemorySource(self.blob)

    def close(self) -> None:
        self.engine.stop()
        assert self.pool.join(20)
        self.engine.close()

    def history(self, folder: Path, rng: random.Random) -> Disk:
        """A life of an entry in `folder`, up to the cut."""
        cache, disk = Cache(folder, self.engine), Disk()
        path = entryfiles.path_of(folder, self.digest)

        def note() -> None:
            disk.data.append(path.read_bytes())
            disk.map.append(entryfiles.map_of(path).read_bytes())

        entry = cache.open(self.digest, len(self.blob), POLICY)
        note()
        for _ in range(rng.randint(1, 10)):
            act = rng.choices((self._store, self._drop, self._verify), (6, 2, 1))[0]
            act(entry, disk, rng)
            note()
            if act == self._verify:
                disk.synced()
            if rng.random() < 0.2:
                entry.close()
                entry = cache.open(self.digest, len(self.blob), POLICY)
        entry.close()
        return disk

    def _run(self, rng: random.Random) -> tuple[int, int]:
        """A few extents, as offset and length."""
        start = rng.randrange(0, len(self.blob), EXTENT_SIZE)
        return start, min(rng.randint(1, 8) * EXTENT_SIZE, len(self.blob) - start)

    def _store(self, entry: Entry, disk: Disk, rng: random.Random) -> None:
        start, length = self._run(rng)
        entry.blob.store(start, self.blob[start : start + length])

    def _drop(self, entry: Entry, disk: Disk, rng: random.Random) -> None:
        if entry.verified:
            disk.seal_broken()
        assert entry.blob.drop(*self._run(rng)) >= 0

    def _verify(self, entry: Entry, disk: Disk, rng: random.Random) -> None:
        entry.blob.store(0, self.blob)
        entry.verify()

    def history_of_two(self, folder: Path, rng: random.Random, patch: pytest.MonkeyPatch) -> Disk:
        """A life of an entry that images of two repositories use in turns, of which one has other bytes."""
        cache, disk = Cache(folder, self.engine), Disk()
        path = entryfiles.path_of(folder, self.digest)
        contents = {RIGHT: self.blob, WRONG: rng.randbytes(len(self.blob))}

        def note() -> None:
            disk.data.append(path.read_bytes())
            disk.map.append(entryfiles.map_of(path).read_bytes())

        def fsync(fd: int) -> None:
            for versions, file in ((disk.data, path), (disk.map, entryfiles.map_of(path))):
                if os.fstat(fd).st_ino == file.stat().st_ino:
                    versions[:] = [file.read_bytes()]

        patch.setattr(os, "fsync", fsync)
        for _ in range(rng.randint(2, 5)):
            repository = rng.choice((RIGHT, WRONG))
            entry = cache.open(self.digest, len(self.blob), POLICY, repository=repository)
            note()
            for _ in range(rng.randint(1, 4)):
                act = rng.choice((self._drop, self._verify) if repository == RIGHT else (self._drop,))
                if rng.random() < 0.3:
                    act(entry, disk, rng)
                    note()
                start, length = self._run(rng)
                entry.claim([entry.word])  # as Several does
                entry.blob.store(start, contents[repository][start : start + length])
                note()
            entry.close()
        patch.undo()
        return disk

    def check(self, folder: Path, left: tuple[bytes, bytes], repository: str = "") -> None:
        """Every byte that is read of what a cut has left is right, and so is what is said of it."""
        path = entryfiles.path_of(folder, self.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(left[0])
        entryfiles.map_of(path).write_bytes(left[1])
        self.source.reads.clear()
        entry = Cache(folder, self.engine).open(self.digest, len(self.blob), POLICY, repository=repository)
        try:
            self.pool.attach(entry.id, entry.blob, self.source)
            verified = entry.verified
            with open_image(self.engine, [NamedBlob(self.digest, entry.blob)]) as image:
                _same(image.read_at(0, image.size), self.disk)
            _same(entry.blob.read_at(0, len(self.blob)), self.blob)
            assert not (verified and self.source.reads), "verified, but not all of it was there"
        finally:
            entry.close()


def _same(found: bytes, right: bytes) -> None:
    """An assert of the bytes themselves would have pytest draw their difference, which takes minutes."""
    equal = found == right
    assert equal, "wrong bytes"


@pytest.fixture(scope="module", params=PLANS)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(PLANS[request.param])
    yield machine
    machine.close()


def _cuts(machine: Machine, folder: Path) -> Iterator[tuple[int, Path, tuple[bytes, bytes]]]:
    for case in range(CASES):
        rng = random.Random(case)
        disk = machine.history(folder / f"before-{case}", rng)
        yield case, folder / f"after-{case}", disk.cut(rng)
        for path in folder.glob(f"*-{case}/*/*"):
            path.unlink()


def _trusting(machine: Machine, left: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """The map of a program that takes an entry's presence for its content's: each CRC is what it has to be."""
    data, table = left[0], bytearray(left[1])
    for extent in range(presence.extent_count(len(machine.blob))):
        place = presence.TABLE_OFFSET + 4 * extent
        if any(table[place : place + 4]):
            content = data[extent * EXTENT_SIZE : (extent + 1) * EXTENT_SIZE]
            table[place : place + 4] = presence.extent_entry(content).to_bytes(4, "little")
    return data, bytes(table)


@pytest.mark.timeout(1800)  # seconds: the full count, on a busy machine
def test_every_byte_is_right_after_a_cut(
    machine: Machine, tmp_path: Path, record_measured: Callable[[str, dict[str, object]], None],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    kept = fetched = verified = 0
    for case, folder, left in _cuts(machine, tmp_path):
        try:
            machine.check(folder, left)
        except (AssertionError, CorruptImage) as error:
            raise AssertionError(f"case {case}") from error
        fetched += sum(length for _, length in machine.source.reads)
        kept += len(machine.blob) - sum(length for _, length in machine.source.reads)
        verified += entryfiles.look(folder, machine.digest).verified
    assert kept > 0  # a cache that forgets everything would be right, too
    assert fetched > 0
    assert verified > 0
    figures = {"cases": CASES, "bytes_kept": kept, "bytes_fetched_again": fetched, "verified": verified}
    record_measured(f"power-cut-{request.node.callspec.id}", figures)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", ["raw"], indirect=True)
def test_no_cut_makes_another_repositorys_bytes_ones_own(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = 0
    for case in range(2 * CASES):
        rng = random.Random(case)
        disk = machine.history_of_two(tmp_path / f"before-{case}", rng, monkeypatch)
        try:
            machine.check(tmp_path / f"after-{case}", disk.cut(rng), RIGHT)
        except (AssertionError, CorruptImage) as error:
            raise AssertionError(f"case {case}") from error
        kept += len(machine.blob) - sum(length for _, length in machine.source.reads)
    assert kept > 0


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", ["raw", "no-crc"], indirect=True)  # whose blocks have no checksums of their own
def test_the_same_cuts_show_who_trusts_the_map(machine: Machine, tmp_path: Path) -> None:
    wrong = 0
    for _, folder, left in _cuts(machine, tmp_path):
        try:
            machine.check(folder, _trusting(machine, left))
        except (AssertionError, CorruptImage):
            wrong += 1
    assert wrong > 0
