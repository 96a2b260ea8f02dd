# SPDX-License-Identifier: Apache-2.0
"""What was written and not yet flushed: whatever ends a writable disk flushes it first, or says that it could not."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import mountpoint, syscalls
from blockdev.root import Root
from tests.commands import Run, Start, devices, ended, owner_pid, until, uri_of
from tests.requires import requires_command, requires_mount

requires_command("mkfs.ext4", "fsfreeze", "nbdsh")

CONTENT = os.urandom(1 << 20)


def make_pair(run: Run, folder: Path) -> list[str]:
    """The options of an empty writable layer in the folder."""
    pair = [str(folder / "data"), str(folder / "index")]
    assert run("create", *pair, "--size", "1M").returncode == 0
    return ["--upper", *pair]


def write(file: Path) -> None:
    """Without a sync."""
    with file.open("r+b", buffering=0) as disk:
        assert disk.write(CONTENT) == len(CONTENT)


def written(run: Run, folder: Path, pair: list[str]) -> bytes:
    """What the layer holds."""
    layer, out = folder / "layer", folder / "out"
    for command in (["commit", *pair[1:], "-o", layer], ["export", layer, "-o", out]):
        made = run(*command)
        assert made.returncode == 0, made.stderr
    return out.read_bytes()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    requires_mount()
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    syscalls.mount("none", folder, "tmpfs", flags=0, options="size=4m")
    yield folder
    syscalls.umount(folder, 0)


@pytest.fixture
def freezable(tmp_path: Path, run: Run) -> Iterator[Path]:
    """A file system whose writers wait while it is frozen."""
    requires_mount()
    folder, disk = tmp_path / "freezable", tmp_path / "freezable.raw"
    folder.mkdir()
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    with syscalls.attach_loop(disk, writable=True) as loop:
        syscalls.mount(loop.path, folder, "ext4", flags=0, options="")
    yield folder
    thaw(folder)
    run("daemon", "--stop", "--force")
    syscalls.umount(folder, 0)


def freeze(folder: Path) -> None:
    subprocess.run(["/usr/sbin/fsfreeze", "--freeze", folder], check=True)


def thaw(folder: Path) -> None:
    subprocess.run(["/usr/sbin/fsfreeze", "--unfreeze", folder], check=False, stderr=subprocess.DEVNULL)


def fill(folder: Path) -> Path:
    """Leave no room at all; the file that takes it."""
    filler = folder / "filler"
    left = os.statvfs(folder)
    filler.write_bytes(bytes(left.f_bavail * left.f_frsize))
    return filler


@pytest.mark.parametrize("order", ["stop", "stop in use", "umount, SIGTERM", "SIGTERM"])
def test_whatever_ends_a_raw_disk_flushes_it(tmp_path: Path, run: Run, root: Root, order: str) -> None:
    requires_mount()
    disk = tmp_path / "disk"
    pair = make_pair(run, tmp_path)
    assert run("mount", "--raw", "--rw", "scratch", *pair, disk).returncode == 0
    write(disk)
    if order == "stop":
        assert run("daemon", "--stop", "--force").returncode == 0
    elif order == "stop in use":
        with disk.open("rb"):
            assert run("daemon", "--stop", "--force").returncode == 0
    else:
        if order == "umount, SIGTERM":
            assert run("umount", disk).returncode == 0
        os.kill(owner_pid(root), signal.SIGTERM)
        assert until(lambda: not root.owned())
        if order == "SIGTERM":  # the mount is left, and answers nothing
            assert run("umount", "--force", disk).returncode == 0
    assert written(run, tmp_path, pair) == CONTENT


def test_umount_returns_once_a_slow_disk_has_it(tmp_path: Path, freezable: Path, run: Run, start: Start) -> None:
    disk = tmp_path / "disk"
    pair = make_pair(run, freezable)
    assert run("mount", "--raw", "--rw", "scratch", *pair, disk).returncode == 0
    write(disk)
    freeze(freezable)
    unmounting = start("umount", disk)
    assert not until(lambda: unmounting.poll() is not None, limit=2.0)
    thaw(freezable)
    assert ended(unmounting) == (0, "")
    assert written(run, tmp_path, pair) == CONTENT


def test_umount_knows_whose_disk_it_is(tmp_path: Path, run: Run, root: Root, ociblk: str) -> None:
    """So that it can wait for that owner."""
    requires_mount()
    disk = tmp_path / "disk"
    assert run("mount", "--raw", "--rw", "scratch", *make_pair(run, tmp_path), disk).returncode == 0
    assert mountpoint.find(disk).root == root.path
    other = {**os.environ, "OCIBLK_ROOT": str(tmp_path / "other")}
    subprocess.run([ociblk, "umount", disk], check=True, env=other)
    assert until(lambda: devices(run) == [])


def test_an_owner_leaves_once_a_slow_disk_has_what_was_written(
    tmp_path: Path, freezable: Path, run: Run, root: Root
) -> None:
    disk = tmp_path / "disk"
    pair = make_pair(run, freezable)
    assert run("mount", "--raw", "--rw", "scratch", *pair, disk).returncode == 0
    write(disk)
    freeze(freezable)
    os.kill(owner_pid(root), signal.SIGTERM)
    assert not until(lambda: not root.owned(), limit=8.0)  # all else has six seconds
    thaw(freezable)
    assert until(lambda: not root.owned())
    assert run("umount", "--force", disk).returncode == 0
    assert written(run, tmp_path, pair) == CONTENT


def test_a_disk_that_cannot_be_flushed_stays_mounted(tmp_path: Path, tmpfs: Path, run: Run) -> None:
    disk = tmp_path / "disk"
    pair = make_pair(run, tmpfs)
    assert run("mount", "--raw", "--rw", "scratch", *pair, disk).returncode == 0
    write(disk)
    filler = fill(tmpfs)
    refused = run("umount", disk)
    assert (refused.returncode, refused.stderr.count("\n")) == (8, 1)
    assert "No space left" in refused.stderr
    assert [device["where"] for device in devices(run)] == [str(disk)]
    filler.unlink()
    assert run("umount", disk).returncode == 0
    assert written(run, tmp_path, pair) == CONTENT


def test_a_forced_stop_says_what_it_lost(tmp_path: Path, tmpfs: Path, run: Run, root: Root) -> None:
    disk = tmp_path / "disk"
    pair = make_pair(run, tmpfs)
    assert run("mount", "--raw", "--rw", "scratch", *pair, disk).returncode == 0
    write(disk)
    fill(tmpfs)
    stopped = run("daemon", "--stop", "--force")
    assert (stopped.returncode, stopped.stderr.count("\n")) == (8, 1), stopped.stderr
    assert not root.owned()


def test_an_export_whose_last_flush_fails_ends_with_an_error(
    tmp_path: Path, tmpfs: Path, run: Run, start: Start
) -> None:
    serving = start("serve", "scratch", *make_pair(run, tmpfs), "--rw", "--socket", tmp_path / "socket")
    command = ["/usr/bin/python3", "-m", "nbd", "--uri", uri_of(serving), "-c", "h.pwrite(bytes([7]) * 65536, 0)"]
    subprocess.run(command, check=True, timeout=60)
    fill(tmpfs)
    serving.terminate()
    code, errors = ended(serving)
    assert (code, errors.count("\n")) == (8, 1), errors
    assert "what was not flushed is lost" in errors


def test_a_foreground_owner_whose_last_flush_fails_ends_with_an_error(
    tmp_path: Path, tmpfs: Path, run: Run, start: Start, root: Root
) -> None:
    disk = tmp_path / "disk"
    pair = make_pair(run, tmpfs)
    owner = start("daemon")
    assert until(root.socket.exists)
    assert run("mount", "--raw", "--rw", "scratch", *pair, disk).returncode == 0
    write(disk)
    fill(tmpfs)
    owner.terminate()
    code, errors = ended(owner)
    assert (code, "what was not flushed is lost" in errors) == (8, True), errors
    assert run("umount", "--force", disk).returncode == 0
