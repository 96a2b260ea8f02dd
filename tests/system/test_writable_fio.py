# SPDX-License-Identifier: Apache-2.0
"""fio writes and verifies: over NBD, and in ext4 on a loop device on our FUSE file, with little memory too."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev.root import Root
from tests.cgroup import MemoryCgroup, memory_cgroup
from tests.commands import Run, Start, ended, uri_of
from tests.requires import requires_command, requires_mount, scaled

requires_command("fio", "mkfs.ext4", "fsck.ext4")

MIB = 1 << 20
DISK = scaled(768, 2048) * MIB
WRITTEN = scaled(24, 1024) * MIB
WRITTEN_IN_CGROUP = scaled(288, 1024) * MIB  # more than the cgroup has
CGROUP = 256 * MIB
MIXED = "--bssplit=4k/60:32k/20:256k/20"
WAIT = scaled(120, 600)  # seconds: what takes longer hangs


@pytest.fixture
def pair(tmp_path: Path, run: Run) -> tuple[Path, Path]:
    """An empty writable layer."""
    files = tmp_path / "data", tmp_path / "index"
    assert run("create", *files, "--size", str(DISK)).returncode == 0
    return files


def must(*command: str | Path, inside: MemoryCgroup | None = None, **environment: str) -> str:
    """Run a command that has to succeed; its output."""
    words = [*(inside.prefix if inside else []), *map(str, command)]
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    env = {**os.environ, "PATH": path, **environment}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=WAIT, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def fio(report: Path, *options: str, size: int, inside: MemoryCgroup | None = None) -> float:
    """Write and verify so many bytes in random order; bytes per second written."""
    must(
        "fio", "--name=w", "--rw=randwrite", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
        "--verify_state_save=0", "--fsync=64", "--end_fsync=1", f"--size={size}",
        "--output-format=json", f"--output={report}", *options, inside=inside,
    )  # fmt: skip
    [job] = json.loads(report.read_text())["jobs"]
    assert job["error"] == 0
    assert job["write"]["io_bytes"] >= size // 2
    assert job["read"]["io_bytes"] > 0  # the verification
    return float(job["write"]["bw_bytes"])


def test_fio_verifies_over_nbd(tmp_path: Path, pair: tuple[Path, Path], start: Start) -> None:
    serving = start("serve", "scratch", "--upper", *pair, "--rw", "--socket", tmp_path / "s")
    uri = uri_of(serving)
    fio(tmp_path / "report", "--ioengine=nbd", f"--uri={uri}", "--iodepth=16", MIXED, size=WRITTEN)
    serving.terminate()
    assert ended(serving)[0] == 0


def make_ext4(tmp_path: Path, ociblk: str, root: Root, pair: tuple[Path, Path], inside: MemoryCgroup | None) -> None:
    disk = tmp_path / "disk"
    command = [ociblk, "mount", "--root", root.path, "scratch", "--upper", *pair, "--rw"]
    must(*command, "--raw", disk, inside=inside)
    must("mkfs.ext4", "-q", disk, inside=inside)
    must(ociblk, "umount", disk)
    (tmp_path / "folder").mkdir()
    must(*command, tmp_path / "folder", inside=inside)


def check_ext4(tmp_path: Path, ociblk: str, root: Root, pair: tuple[Path, Path]) -> None:
    """Unmount, and have fsck look at what a new owner shows."""
    must(ociblk, "umount", tmp_path / "folder")
    must(ociblk, "daemon", "--stop", "--root", root.path)
    must(ociblk, "mount", "--root", root.path, "scratch", "--upper", *pair, "--raw", tmp_path / "disk")
    must("fsck.ext4", "-fn", tmp_path / "disk")
    must(ociblk, "umount", tmp_path / "disk")


def test_fio_verifies_in_ext4_on_loop_on_fuse(
    tmp_path: Path, pair: tuple[Path, Path], ociblk: str, root: Root
) -> None:
    requires_mount()
    make_ext4(tmp_path, ociblk, root, pair, None)
    where = f"--directory={tmp_path}/folder"
    fio(tmp_path / "report", where, "--ioengine=libaio", "--iodepth=8", "--direct=1", MIXED, size=WRITTEN)
    must("fstrim", tmp_path / "folder")
    check_ext4(tmp_path, ociblk, root, pair)


def test_an_owner_with_little_memory_does_not_wait_for_itself(
    tmp_path: Path,
    pair: tuple[Path, Path],
    ociblk: str,
    root: Root,
    record_measured: Callable[[str, dict[str, object]], None],
) -> None:
    requires_mount()
    with memory_cgroup(CGROUP) as cgroup:
        make_ext4(tmp_path, ociblk, root, pair, cgroup)
        where = f"--directory={tmp_path}/folder"
        rate = fio(
            tmp_path / "report", where, "--ioengine=psync", "--bs=128k", size=WRITTEN_IN_CGROUP, inside=cgroup
        )
        peak = cgroup.peak
        check_ext4(tmp_path, ociblk, root, pair)
        must(ociblk, "daemon", "--stop", "--root", root.path)
    record_measured(
        "upper-cgroup",
        {"limit": CGROUP, "written": WRITTEN_IN_CGROUP, "bytes_per_second": round(rate), "peak": peak},
    )
