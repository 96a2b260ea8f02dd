# SPDX-License-Identifier: Apache-2.0
"""Cache entries: made, shared, verified, adopted, rebuilt when damaged, counted and pruned."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine, Priority
from blockdev.entryfiles import SIZE_MAX
from blockdev.errors import CorruptImage, DeviceError, EngineError, UsageError
from blockdev.scan import scan
from formats import presence

CONTENT = random.Random(2).randbytes(500_001)
SIZE = len(CONTENT)
HEX = hashlib.sha256(CONTENT).hexdigest()
DIGEST = f"sha256:{HEX}"
POLICY = Policy("eio", 0.05)
EXTENT = 65536


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(work_threads=1) as made:
        yield made


@pytest.fixture
def cache(tmp_path: Path, engine: Engine) -> Cache:
    return Cache(tmp_path, engine)


def _file(folder: Path, content: bytes = CONTENT) -> int:
    path = folder / "local"
    path.write_bytes(content)
    return os.open(path, os.O_RDONLY)


def test_an_entry_is_sparse_files_under_the_digest(cache: Cache, tmp_path: Path) -> None:
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(EXTENT, CONTENT[EXTENT : 3 * EXTENT])
    assert not entry.complete
    assert not entry.verified
    entry.close()
    written = (tmp_path / "sha256" / f"{HEX}.map").read_bytes()
    assert presence.Head.parse(written[: presence.HEAD_SIZE]) == presence.Head(DIGEST, SIZE, verified=False)
    assert len(written) == presence.map_size(SIZE)
    data = tmp_path / "sha256" / HEX
    assert data.stat().st_size == SIZE
    assert data.read_bytes()[EXTENT : 3 * EXTENT] == CONTENT[EXTENT : 3 * EXTENT]


def test_what_was_stored_is_there_after_reopening(cache: Cache) -> None:
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(0, CONTENT)
    entry.close()
    again = cache.open(DIGEST, SIZE, POLICY)
    assert again.complete
    assert again.blob.read_at(0, SIZE) == CONTENT
    again.close()


def test_users_of_one_blob_share_it_until_the_last_leaves(cache: Cache) -> None:
    first = cache.open(DIGEST, SIZE, POLICY)
    second = cache.open(DIGEST, SIZE, POLICY)
    assert first.id == second.id
    assert not first.close()
    assert not first.close()
    second.blob.store(0, CONTENT)
    found = cache.by_id(second.id)
    assert found
    assert not found.close()
    assert second.close()
    assert cache.by_id(second.id) is None


def test_a_verified_blob_stays_verified(cache: Cache) -> None:
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(0, CONTENT)
    entry.verify()
    assert entry.verified
    entry.close()
    again = cache.open(DIGEST, SIZE, POLICY)
    assert again.verified
    again.close()


def test_a_blob_of_other_content_is_dropped_whole(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(0, CONTENT[:-1] + b"\0")
    with pytest.raises(CorruptImage, match=DIGEST):
        entry.verify()
    assert entry.blob.stat().present_bytes == 0
    assert not entry.verified
    assert DIGEST in caplog.text
    entry.close()
    again = cache.open(DIGEST, SIZE, POLICY)
    assert again.blob.stat().present_bytes == 0
    again.close()


def test_what_is_not_all_here_is_not_fetched_to_be_looked_at(cache: Cache) -> None:
    """A blob just dropped for its content would be fetched again, and dropped again."""
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(0, CONTENT[: SIZE // 2])
    assert not entry.verify_here()
    assert not entry.verified
    entry.blob.store(0, CONTENT)
    assert entry.verify_here()
    assert entry.verified
    entry.close()


def test_an_adopted_file_is_a_verified_blob(cache: Cache, tmp_path: Path) -> None:
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    entry = cache.open(DIGEST, SIZE, POLICY)
    assert entry.verified
    assert entry.complete
    assert entry.blob.read_at(0, SIZE) == CONTENT
    entry.close()


def test_a_blob_in_use_can_be_adopted_too(cache: Cache, tmp_path: Path) -> None:
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(0, CONTENT[:EXTENT])
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    assert entry.verified
    assert entry.blob.read_at(0, SIZE) == CONTENT
    entry.close()


def test_what_a_fetch_is_writing_when_a_file_is_adopted_is_waited_for(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(8).randbytes(2 << 20)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    fd = _file(tmp_path, content)
    read = os.pread
    for number in range(10):
        cache = Cache(tmp_path / str(number), engine)
        entry = cache.open(digest, len(content), POLICY)
        entry.blob.prefetch(0, len(content), Priority.BULK)
        fetch = engine.next_fetch(Priority.BULK, timeout=20)
        assert fetch
        fetch.buffer[:] = content
        bringing = threading.Thread(target=fetch.advance, args=(len(content),))

        def read_beside(file: int, *place: int, bringing: threading.Thread = bringing) -> bytes:
            if file == fd:
                bringing.start()
            return read(file, *place)

        with monkeypatch.context() as patched:
            patched.setattr(os, "pread", read_beside)
            assert cache.adopt(fd, digest) == digest
        bringing.join()
        fetch.finish()
        entry.close()
    os.close(fd)


def test_a_file_with_another_digest_is_not_adopted(cache: Cache, tmp_path: Path) -> None:
    fd = _file(tmp_path, CONTENT[:-1])
    with pytest.raises(CorruptImage, match=DIGEST):
        cache.adopt(fd, DIGEST)
    os.close(fd)
    assert cache.stat() == []


def test_an_empty_blob_can_be_adopted(cache: Cache, tmp_path: Path) -> None:
    digest = f"sha256:{hashlib.sha256().hexdigest()}"
    fd = _file(tmp_path, b"")
    cache.adopt(fd, digest)
    os.close(fd)
    entry = cache.open(digest, 0, POLICY)
    assert entry.verified
    entry.close()


def _damage(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, map: _damage(map, 100, b"x"),
        lambda data, map: map.write_bytes(b""),
        lambda data, map: map.write_bytes(map.read_bytes()[:300]),
        lambda data, map: map.unlink(),
        lambda data, map: data.unlink(),
        lambda data, map: os.truncate(data, 1000),
    ],
    ids=["rotted head", "empty map", "torn head", "no map", "no data", "short data"],
)
def test_a_damaged_entry_starts_empty(cache: Cache, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    damage(tmp_path / "sha256" / HEX, tmp_path / "sha256" / f"{HEX}.map")
    entry = cache.open(DIGEST, SIZE, POLICY)
    assert not entry.verified
    assert entry.blob.stat().present_bytes == 0
    entry.blob.store(0, CONTENT)
    entry.verify()
    entry.close()


def test_a_lost_table_means_absent_extents(cache: Cache, tmp_path: Path) -> None:
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    os.truncate(tmp_path / "sha256" / f"{HEX}.map", presence.TABLE_OFFSET + 8)
    entry = cache.open(DIGEST, SIZE, POLICY)
    assert entry.blob.stat().present_bytes == 2 * EXTENT
    assert cache.stat()[0].present == 2 * EXTENT
    entry.close()
    assert cache.stat()[0].present == 2 * EXTENT


def test_a_later_versions_entry_is_refused_and_left_alone(cache: Cache, tmp_path: Path) -> None:
    entry = cache.open(DIGEST, SIZE, POLICY)
    entry.blob.store(0, CONTENT)
    entry.close()
    path = tmp_path / "sha256" / f"{HEX}.map"
    head = bytearray(path.read_bytes()[: presence.HEAD_SIZE])
    head[8] = presence.VERSION + 1
    head[504:508] = presence.standard(bytes(head[:504])).to_bytes(4, "little")
    _damage(path, 0, bytes(head))
    before = path.read_bytes()
    with pytest.raises(DeviceError, match="version"):
        cache.open(DIGEST, SIZE, POLICY)
    assert path.read_bytes() == before


def test_a_descriptor_with_a_wrong_size_does_not_cost_a_verified_blob(cache: Cache, tmp_path: Path) -> None:
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    with pytest.raises(CorruptImage, match=str(SIZE)):
        cache.open(DIGEST, SIZE + 1, POLICY)
    entry = cache.open(DIGEST, SIZE, POLICY)
    assert entry.verified
    with pytest.raises(CorruptImage):
        cache.open(DIGEST, SIZE - 1, POLICY)
    entry.close()


@pytest.mark.parametrize("digest", ["sha256:../../etc/passwd", "md5:" + "0" * 32, "", "sha256:" + "G" * 64])
def test_what_is_no_digest_names_no_file(cache: Cache, tmp_path: Path, digest: str) -> None:
    with pytest.raises(UsageError):
        cache.open(digest, SIZE, POLICY)
    assert list(tmp_path.iterdir()) == []


def test_stat_counts_and_prune_removes_what_is_not_in_use(cache: Cache, tmp_path: Path) -> None:
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    other = f"sha256:{hashlib.sha256(b'other').hexdigest()}"
    used = cache.open(other, 10 * EXTENT, POLICY)
    used.blob.store(EXTENT, bytes(EXTENT))
    by_digest = {found.digest: found for found in cache.stat()}
    assert (by_digest[DIGEST].present, by_digest[DIGEST].size) == (SIZE, SIZE)
    assert by_digest[DIGEST].verified
    assert not by_digest[DIGEST].in_use
    assert by_digest[DIGEST].allocated >= SIZE
    assert by_digest[other].present == EXTENT
    assert by_digest[other].in_use
    assert by_digest[other].allocated < 10 * EXTENT
    pruned = cache.prune()
    assert pruned.removed == (DIGEST,)
    assert pruned.kept == (other,)
    assert pruned.freed == by_digest[DIGEST].allocated
    assert used.blob.read_at(EXTENT, 10) == bytes(10)
    used.close()
    assert [found.digest for found in cache.stat()] == [other]


def test_what_a_manifest_claims_costs_nothing(cache: Cache, engine: Engine, tmp_path: Path) -> None:
    """No memory for a table of holes, and nothing left of it."""
    tracemalloc.start()
    entry = cache.open(DIGEST, SIZE_MAX, POLICY)
    assert cache.stat()[0].present == 0
    entry.blob.store(SIZE_MAX - EXTENT, CONTENT[:EXTENT])
    entry.blob.store(0, CONTENT[:EXTENT])
    entry.close()
    (found,) = cache.stat()
    assert (found.size, found.present) == (SIZE_MAX, 2 * EXTENT)
    assert found.allocated < 1 << 20
    assert scan(tmp_path, cache.look(DIGEST), lambda count: None, hashed=False) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert cache.prune().removed == (DIGEST,)


def test_a_blob_larger_than_any_layer_is_refused(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(CorruptImage, match=f"{SIZE_MAX + 1} bytes: more than"):
        cache.open(DIGEST, SIZE_MAX + 1, POLICY)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_in_which_nothing_arrived_is_none(cache: Cache, tmp_path: Path) -> None:
    cache.open(DIGEST, SIZE, POLICY).close()
    assert cache.stat() == []
    assert list((tmp_path / "sha256").iterdir()) == []


def test_an_entry_that_there_is_no_room_for_is_not_left_behind(engine: Engine, tmp_path: Path) -> None:
    """A limit on files' sizes stands for a full disk."""
    program = f"""
import resource, signal
from pathlib import Path
from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.entryfiles import SIZE_MAX
from blockdev.errors import EngineError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Cache(Path({str(tmp_path)!r}), Engine(work_threads=1)).open({DIGEST!r}, {SIZE}, Policy("eio", 1.0))
except EngineError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "refused\n"
    assert list((tmp_path / "sha256").iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_map_is_a_flaw_of_its_entry(cache: Cache, tmp_path: Path, make: Callable[[Path], None]) -> None:
    fd = _file(tmp_path)
    cache.adopt(fd, DIGEST)
    os.close(fd)
    map = tmp_path / "sha256" / f"{HEX}.map"
    map.unlink()
    make(map)
    assert "no regular file" in cache.look(DIGEST).flaw
    assert [found.present for found in cache.stat()] == [0]
    with pytest.raises(EngineError, match="no regular file"):
        cache.open(DIGEST, SIZE, POLICY)
    assert cache.prune().removed == (DIGEST,)
    assert not map.exists()


def test_a_place_that_cannot_be_written_is_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "sha256").write_text("in the way")
    with pytest.raises(EngineError, match=str(tmp_path / "sha256")):
        Cache(tmp_path, engine).open(DIGEST, SIZE, POLICY)
