# SPDX-License-Identifier: Apache-2.0
"""Writable images, by foreign writers: NBD clients, the kernel's ext4, and kills at any moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from blockdev import syscalls
from blockdev.engine import Engine
from blockdev.errors import EngineError
from blockdev.origin import NOTHING, locate
from blockdev.root import Root
from blockdev.stack import open_local
from blockdev.upper import create_pair
from formats.lsmt import SECTOR
from tests.commands import Run, Start, ended, owner_pid, uri_of
from tests.requires import requires_command, requires_mount

requires_command("qemu-io", "nbdinfo", "mkfs.ext4", "fsck.ext4")

WAIT = 60.0


@pytest.fixture
def pair(tmp_path: Path, run: Run) -> tuple[Path, Path]:
    """An empty writable layer of 256 MiB."""
    files = tmp_path / "data", tmp_path / "index"
    assert run("create", *files, "--size", "256M").returncode == 0
    return files


def client(*command: str | Path) -> str:
    """A client that must succeed; its output."""
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(uri: str, *commands: str, mode: str = "-n") -> None:
    """Commands of qemu-io on an export; patterns that are not there fail. mode: -r to read only."""
    words = [word for command in commands for word in ("-c", command)]
    out = client("qemu-io", mode, "-f", "raw", *words, uri)
    assert "verification failed" not in out, out


def test_an_nbd_client_writes_trims_and_zeroes(
    tmp_path: Path, pair: tuple[Path, Path], start: Start, run: Run
) -> None:
    serving = start("serve", "scratch", "--upper", *pair, "--rw", "--socket", tmp_path / "socket")
    uri = uri_of(serving)
    told = client("nbdinfo", uri)
    for line in ("is_read_only: false", "can_flush: true", "can_fua: true", "can_trim: true", "can_zero: true",
                 "can_multi_conn: true", "block_size_minimum: 512"):  # fmt: skip
        assert line in told
    qemu_io(
        uri,
        "write -P 7 0 3M", "discard 512 1M", "write -z 2M 64k", "write -f -P 9 1k 512", "flush",
        "read -P 7 0 512", "read -P 0 512 512", "read -P 9 1k 512", "read -P 0 1536 65536",
        "read -P 0 2M 64k", "read -P 7 2112k 64k", "read -P 0 3M 8M",
    )  # fmt: skip
    serving.terminate()
    assert ended(serving)[0] == 0
    layer = tmp_path / "layer"
    assert run("commit", *pair, "-o", layer, "--codec", "zstd").returncode == 0
    for image in (["scratch", "--upper", *pair], [layer]):
        reading = start("serve", *image, "--socket", tmp_path / "socket")
        qemu_io(
            uri_of(reading), "read -P 7 0 512", "read -P 9 1k 512", "read -P 0 2M 64k", "read -P 7 2112k 64k", mode="-r"
        )
        reading.terminate()
        assert ended(reading)[0] == 0


def test_without_rw_nothing_is_written(tmp_path: Path, pair: tuple[Path, Path], start: Start, run: Run) -> None:
    before = [path.read_bytes() for path in pair]
    serving = start("serve", "scratch", "--upper", *pair, "--socket", tmp_path / "socket")
    assert "is_read_only: true" in client("nbdinfo", uri_of(serving))
    serving.terminate()
    assert ended(serving)[0] == 0
    assert [path.read_bytes() for path in pair] == before
    refused = run("serve", "scratch", "--rw", "--socket", tmp_path / "socket")
    assert refused.returncode == 2


def make_file_system(run: Run, upper: Sequence[str | Path], disk: Path) -> None:
    """By way of the raw disk, at `disk` meanwhile."""
    assert run("mount", "--raw", "--rw", *upper, disk).returncode == 0
    client("mkfs.ext4", "-q", disk)
    assert run("umount", disk).returncode == 0


def test_a_file_system_is_made_mounted_and_filled(tmp_path: Path, pair: tuple[Path, Path], run: Run) -> None:
    requires_mount()
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    folder.mkdir()
    upper = ["scratch", "--upper", *pair]
    make_file_system(run, upper, disk)
    for name in ("one", "two"):
        mounted = run("mount", "--rw", *upper, folder)
        assert mounted.returncode == 0, mounted.stderr
        (folder / name).write_bytes(name.encode() * 100_000)
        assert run("umount", folder).returncode == 0
    assert run("mount", *upper, folder).returncode == 0
    assert (folder / "one").read_bytes() == b"one" * 100_000
    assert (folder / "two").read_bytes() == b"two" * 100_000
    with pytest.raises(OSError, match="Read-only"):
        (folder / "three").touch()
    assert run("umount", folder).returncode == 0
    raw = tmp_path / "raw"
    assert run("commit", *pair, "-o", tmp_path / "layer").returncode == 0
    assert run("export", tmp_path / "layer", "-o", raw).returncode == 0
    client("fsck.ext4", "-fn", raw)


def test_the_file_of_a_mount_takes_bytes_anywhere(tmp_path: Path, pair: tuple[Path, Path], run: Run) -> None:
    requires_mount()
    disk = tmp_path / "disk"
    assert run("mount", "--raw", "--rw", "scratch", "--upper", *pair, disk).returncode == 0
    with disk.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 2000, 100)
        os.pwrite(file.fileno(), b"yz", 511)
        os.fsync(file.fileno())
        with pytest.raises(PermissionError):
            os.ftruncate(file.fileno(), 0)
    client("fallocate", "--punch-hole", "--offset", "600", "--length", "700", disk)
    with disk.open("rb", buffering=0) as file:
        expected = bytes(100) + b"x" * 411 + b"yz" + b"x" * 87 + bytes(700) + b"x" * 800 + bytes(96)
        assert file.read(2196) == expected
    assert run("umount", disk).returncode == 0


PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE = 0x00080000, 0x00100000  # linux/sched.h
CAP_SYS_RESOURCE = 24


def is_capable(capability: int) -> bool:
    """Whether this process has it: containers often lack some."""
    [effective] = re.findall(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(int(effective, 16) >> capability & 1)


def test_every_thread_of_an_owner_is_kept_from_waiting_for_writes(
    tmp_path: Path, pair: tuple[Path, Path], start: Start, root: Root
) -> None:
    requires_mount()
    serving = start("serve", "scratch", "--upper", *pair, "--rw", "--socket", tmp_path / "socket")
    assert uri_of(serving)
    if not is_capable(CAP_SYS_RESOURCE):  # then nobody can have it, and the log says so
        assert "memory may be waited for by writing" in root.log.read_text()
        return
    for task in Path(f"/proc/{owner_pid(root)}/task").iterdir():
        flags = int((task / "stat").read_text().rpartition(")")[2].split()[6])
        assert flags & PF_MEMALLOC_NOIO, task
        assert flags & PF_LOCAL_THROTTLE, task


def test_an_owner_does_not_serve_what_it_needs(
    tmp_path: Path, pair: tuple[Path, Path], run: Run, root: Root
) -> None:
    requires_mount()
    upper = ["scratch", "--upper", *pair]
    refused = run("mount", "--rw", *upper, root.path)
    assert (refused.returncode, "its root would lie on" in refused.stderr) == (7, True), refused.stderr
    refused = run("mount", "--rw", *upper, "/usr")
    assert (refused.returncode, "the program would lie on" in refused.stderr) == (7, True), refused.stderr


def test_a_pair_that_is_served_is_nobody_elses(
    tmp_path: Path, pair: tuple[Path, Path], start: Start, run: Run
) -> None:
    serving = start("serve", "scratch", "--upper", *pair, "--rw", "--socket", tmp_path / "socket")
    assert uri_of(serving)
    writer = start("serve", "scratch", "--upper", *pair, "--rw", "--socket", tmp_path / "other")
    reader = start("commit", *pair, "-o", tmp_path / "layer")
    for refused in (writer, reader):  # both at once: each gives whoever has it some seconds
        code, errors = ended(refused)
        assert (code, "in use" in errors) == (7, True), errors
    serving.terminate()
    assert ended(serving)[0] == 0
    assert run("commit", *pair, "-o", tmp_path / "layer").returncode == 0


def test_a_killed_owner_loses_nothing_that_was_synced(
    tmp_path: Path, pair: tuple[Path, Path], run: Run, root: Root
) -> None:
    requires_mount()
    folder, disk = tmp_path / "folder", tmp_path / "disk"
    folder.mkdir()
    upper = ["scratch", "--upper", *pair]
    make_file_system(run, upper, disk)
    assert run("mount", "--rw", *upper, folder).returncode == 0
    for name in range(20):
        with (folder / str(name)).open("wb") as file:
            file.write(f"{name}\n".encode() * 5000)
            file.flush()
            os.fsync(file.fileno())
    os.kill(owner_pid(root), signal.SIGKILL)
    assert run("umount", "--force", folder).returncode == 0
    mounted = run("mount", "--rw", *upper, folder)  # the kernel replays the journal
    assert mounted.returncode == 0, mounted.stderr
    for name in range(20):
        assert (folder / str(name)).read_bytes() == f"{name}\n".encode() * 5000
    assert run("umount", folder).returncode == 0
    assert run("mount", "--raw", *upper, disk).returncode == 0
    client("fsck.ext4", "-fn", disk)
    assert run("umount", disk).returncode == 0


def test_an_owner_told_to_stop_writes_back_first(tmp_path: Path, pair: tuple[Path, Path], run: Run) -> None:
    requires_mount()
    folder, disk = tmp_path / "folder", tmp_path / "disk"
    folder.mkdir()
    upper = ["scratch", "--upper", *pair]
    make_file_system(run, upper, disk)
    assert run("mount", "--rw", *upper, folder).returncode == 0
    (folder / "late").write_bytes(b"late" * 100_000)
    assert run("daemon", "--stop", "--force").returncode == 0
    assert not (folder / "late").exists()
    assert run("mount", *upper, folder).returncode == 0
    assert (folder / "late").read_bytes() == b"late" * 100_000
    assert run("umount", folder).returncode == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    requires_mount()
    folder = tmp_path / "small"
    folder.mkdir()
    syscalls.mount("none", folder, "tmpfs", flags=0, options="size=8m")
    yield folder
    syscalls.umount(folder, 0)


def test_a_full_disk_is_told_and_costs_nothing_that_was_written(tmp_path: Path, small: Path) -> None:
    pair = small / "data", small / "index"
    create_pair(*pair, 64 << 20)
    upper = [str(path) for path in pair]
    with (
        Engine(work_threads=1) as engine,
        locate(NOTHING, upper, write=True) as origin,
        open_local(engine, origin) as stack,
    ):
        image = stack.image.image
        image.write(0, b"a" * (4 << 20))
        image.flush()
        with pytest.raises(EngineError, match="errno 28"):
            image.write(4 << 20, b"b" * (8 << 20))
        image.write(8 << 20, b"c" * SECTOR)
        image.flush()
    with Engine(work_threads=1) as engine, locate(NOTHING, upper) as origin, open_local(engine, origin) as stack:
        assert stack.image.read_at(0, 4 << 20).count(b"a") == 4 << 20
        assert stack.image.read_at(8 << 20, SECTOR + 1) == b"c" * SECTOR + b"\0"
