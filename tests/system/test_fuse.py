# SPDX-License-Identifier: Apache-2.0
"""The FUSE file under the real kernel: the image's bytes, whatever way they are read."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockdev import mountpoint
from tests.commands import until
from tests.requires import requires_mount
from tests.system.served import served

requires_mount()

MIB = 1 << 20
MISSES = 200  # a loop device has 128 requests in flight
WAIT = 20.0
SIZES = [0, 1, 511, 4096, 200001, 3 * MIB, 5 * MIB + 17]


@pytest.fixture
def raw(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file of random bytes; of request.param bytes, or some MiB."""
    path = tmp_path / "raw"
    path.write_bytes(random.Random(7).randbytes(getattr(request, "param", 5 * MIB + 17)))
    return path


def read_direct(path: Path, *, block: int = MIB) -> bytes:
    """The file read with O_DIRECT by dd."""
    command = ["dd", f"if={path}", "iflag=direct", f"bs={block}", "status=none"]
    return subprocess.run(command, check=True, capture_output=True).stdout


@pytest.mark.parametrize("raw", SIZES, indirect=True)
def test_every_way_of_reading_gives_the_raw_bytes(raw: Path, tmp_path: Path) -> None:
    expected = raw.read_bytes()
    with served(raw, tmp_path) as disk:
        assert disk.file.stat().st_size == len(expected)
        assert read_direct(disk.file) == expected
        assert disk.file.read_bytes() == expected
        assert read_direct(disk.file, block=4096) == expected
        if expected:
            with disk.file.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == expected
        mountpoint.umount(disk.file)
        assert disk.wait().startswith("answered")


def test_parallel_readers_all_read_right(raw: Path, tmp_path: Path) -> None:
    expected = raw.read_bytes()

    def read_about(seed: int) -> None:
        order = random.Random(seed)
        fd = os.open(disk.file, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        for _ in range(100):
            offset = order.randrange(0, len(expected), 4096)
            length = order.randrange(4096, MIB + 1, 4096)
            got = os.preadv(fd, [memoryview(buffer)[:length]], offset)
            assert buffer[:got] == expected[offset : offset + length]
        os.close(fd)

    with served(raw, tmp_path) as disk, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read_about, seed) for seed in range(4)]:
            done.result()
        digests = pool.map(lambda _: hashlib.sha256(disk.file.read_bytes()).digest(), range(4))
        assert set(digests) == {hashlib.sha256(expected).digest()}


def test_what_was_read_once_is_not_asked_for_again(raw: Path, tmp_path: Path) -> None:
    with served(raw, tmp_path) as disk:
        expected = disk.file.read_bytes()
        disk.stop()
        assert disk.file.stat().st_size == len(expected)  # from the kernel's own memory


def test_the_file_is_regular_and_only_for_reading(raw: Path, tmp_path: Path) -> None:
    with served(raw, tmp_path) as disk:
        status = disk.file.stat()
        assert stat.filemode(status.st_mode) == "-r--r--r--"
        assert (status.st_nlink, status.st_uid, status.st_gid) == (1, os.geteuid(), os.getegid())
        with pytest.raises(OSError, match="Read-only"):
            disk.file.open("r+b")
        with pytest.raises(OSError, match="Read-only"):
            disk.file.chmod(0o777)
        with pytest.raises(OSError, match="Read-only"):
            os.truncate(disk.file, 1)
        assert disk.file.stat().st_size == raw.stat().st_size


def test_seeking_holes_reaches_the_server(raw: Path, tmp_path: Path) -> None:
    with served(raw, tmp_path) as disk, disk.file.open("rb") as file:
        assert os.lseek(file.fileno(), 5, os.SEEK_DATA) == 5
        assert os.lseek(file.fileno(), 5, os.SEEK_HOLE) == raw.stat().st_size
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(file.fileno(), raw.stat().st_size, os.SEEK_DATA)


def test_a_killed_server_means_errors_not_hangs(raw: Path, tmp_path: Path) -> None:
    with served(raw, tmp_path) as disk:
        fd = os.open(disk.file, os.O_RDONLY | os.O_DIRECT)
        disk.kill()
        with pytest.raises(OSError) as caught:
            os.pread(fd, 4096, 0)
        assert caught.value.errno in (errno.ENOTCONN, errno.EIO, errno.ECONNABORTED)
        os.close(fd)
        mountpoint.umount(disk.file)
        assert disk.file.stat().st_size == 0  # the placeholder


def test_a_session_ends_when_its_file_is_unmounted(raw: Path, tmp_path: Path) -> None:
    with served(raw, tmp_path) as disk:
        subprocess.run(["umount", disk.file], check=True)
        assert disk.wait().startswith("answered")
        assert disk.server.returncode == 0


def test_what_is_cached_is_read_behind_more_misses_than_a_loop_device_has_requests(raw: Path, tmp_path: Path) -> None:
    content = raw.read_bytes()

    def read(number: int) -> bytes:
        buffer = mmap.mmap(-1, 4096)
        os.preadv(fd, [buffer], number * 4096)
        return buffer[:]

    with ThreadPoolExecutor(MISSES + 1) as pool, served(raw, tmp_path, how="begun") as disk:
        fd = os.open(disk.file, os.O_RDONLY | os.O_DIRECT)
        misses = [pool.submit(read, 100 + number) for number in range(MISSES)]
        try:
            assert until(lambda: waiting_for_fuse() == MISSES)
            assert pool.submit(read, 3).result(WAIT) == content[3 * 4096 : 4 * 4096]
        finally:
            disk.kill()
            os.close(fd)
        assert all(miss.exception(WAIT) for miss in misses)


def waiting_for_fuse() -> int:
    """Threads of this process that wait for the answer to a read."""
    return sum("fuse" in path.read_text() for path in Path("/proc/self/task").glob("*/wchan"))
