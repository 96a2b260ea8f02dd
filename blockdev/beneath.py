# SPDX-License-Identifier: Apache-2.0
"""What a path finally lies on: its file system, that one's loop device, the file behind that, and so on.

Told from the mount table and sysfs alone: no call waits for whoever serves a file system. Device
mappers and partitions are followed; what is behind an NBD device or in another machine is not seen.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blockdev import syscalls
from blockdev.syscalls import MountEntry

_DEVICES = Path("/sys/dev/block")
_SWAPS = Path("/proc/swaps")


def mounts_beneath(path: Path) -> list[MountEntry]:
    """Every mount that reading `path` may need, its own first. The path must be absolute and resolved."""
    table = syscalls.mounts()
    found: list[MountEntry] = []
    wanted = [str(path)]
    while wanted:
        entry = _covering(table, wanted.pop())
        if entry and entry not in found:
            found.append(entry)
            wanted += _files_of(_device_of(entry))
    return found


def swap_beneath() -> list[list[MountEntry]]:
    """The same for each file that this machine swaps to, through whatever device."""
    found: list[list[MountEntry]] = []
    for line in _SWAPS.read_text(errors="surrogateescape").splitlines()[1:]:
        path = Path(syscalls.unescape(line.split()[0]))
        kind = path.stat()
        files = _files_of(kind.st_rdev) if stat.S_ISBLK(kind.st_mode) else [str(path)]
        found += [mounts_beneath(Path(file)) for file in files]
    return found


def _covering(table: list[MountEntry], path: str) -> MountEntry | None:
    """The mount that a path is on: the longest mount point, and of mounts on one point the last."""
    over = [entry for entry in table if path == entry.point or path.startswith(entry.point.rstrip("/") + "/")]
    return max(enumerate(over), key=lambda place: (len(place[1].point), place[0]))[1] if over else None


def _device_of(entry: MountEntry) -> int:
    """The block device a file system is on; 0 if it is on none, or none that can be told."""
    if entry.major:
        return os.makedev(entry.major, entry.minor)
    if not entry.source.startswith("/dev/"):
        return 0
    try:
        return Path(entry.source).stat().st_rdev  # btrfs, whose own number is no device's
    except OSError:
        return 0


def _files_of(device: int) -> Iterator[str]:
    """The files that loop devices below a block device are attached to."""
    folder = _DEVICES / f"{os.major(device)}:{os.minor(device)}"
    if not device or not folder.exists():
        return
    if (folder / "partition").exists():
        folder = folder.resolve().parent
    for slave in folder.glob("slaves/*/dev"):
        major, minor = map(int, slave.read_text().split(":"))
        yield from _files_of(os.makedev(major, minor))
    try:
        file = (folder / "loop/backing_file").read_text(errors="surrogateescape").rstrip("\n")
    except FileNotFoundError:
        return
    if file != syscalls.NOWHERE:
        yield file
