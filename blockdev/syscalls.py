# SPDX-License-Identifier: Apache-2.0
"""What the kernel offers and Python's os module does not: mount(2), loop devices, FUSE connections, the mount table.

Besides, one thing each that the C library and the process do. Promises: every failure is an OSError with its errno
and the path concerned; nothing here decides anything, and nothing calls into the server of a
mount (no stat, no open of what is mounted), except attach_loop(), which opens its file, and
device_of(), which is for files that are served. The only user of ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_CLONE_NEWNS = 0x20000  # linux/sched.h

# umount2(2)
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# Linux 5.2, the same numbers on every architecture; the C library need not have names for them
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC = 1  # of fsopen and fsmount
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6

_SYS = Path("/sys")

LOOP_MAJOR = 7
NOWHERE = "/"  # what loop_file() is for a file that is mounted nowhere and is all of its file system

# linux/loop.h
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_LOOP_INFO64 = struct.Struct("=5Q4I64s64s32s2Q")
_LOOP_CONFIG = struct.Struct(f"=2I{_LOOP_INFO64.size}s64x")
_LOOP_FLAGS, _LOOP_NAME = 8, 9  # their places among these
LOOP_NAME_MAX = 63
_LOOP_BLOCK_SIZE = 512  # any file system's block is a multiple, whatever made the image
_LOOP_TRIES = 64  # a free device can be taken by somebody else between asking and attaching

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 256 << 10  # bytes; what hashing, hauling and decoding take at a time is larger


_PR_SET_IO_FLUSHER = 57  # linux/prctl.h


def set_io_flusher() -> None:
    """From now on memory for this thread, and for those it starts, is never waited for by writing to disks.

    Whoever serves a disk must have it, or he could wait for himself. Needs CAP_SYS_RESOURCE and Linux 5.6.
    """
    if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def return_large_blocks() -> None:
    """Have the C library give large blocks back when they are freed, whatever thread had them.

    Left alone it learns to keep them, for each arena anew: tens of MiB in a process of many threads.
    """
    _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _failure(path: Path) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error), str(path))


def mount(source: str | Path, target: Path, kind: str, *, flags: int, options: str) -> None:
    """mount(2). kind is the file system type, options what it gets as its data."""
    arguments = [os.fsencode(value) for value in (source, target, kind)]
    if _libc.mount(*arguments, flags, os.fsencode(options)) != 0:
        raise _failure(target)


def mount_nowhere(kind: str, *, flags: int, options: Mapping[str, str | None]) -> int:
    """A mount that is in no mount table and has no mount point, as a descriptor; it ends with the last that has a file
    of it open, this descriptor being one. flags: of MS_RDONLY, MS_NOSUID, MS_NODEV and MS_NOEXEC. An option of None
    is one without a value."""
    context = _call(_SYS_FSOPEN, os.fsencode(kind), _CLOEXEC, what=kind)
    try:
        for name, value in options.items():
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            text = None if value is None else os.fsencode(value)
            _call(_SYS_FSCONFIG, context, command, os.fsencode(name), text, 0, what=kind)
        _call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0, what=kind)
        return _call(_SYS_FSMOUNT, context, _CLOEXEC, flags, what=kind)
    finally:
        os.close(context)


def _call(number: int, *arguments: int | bytes | None, what: str) -> int:
    words = [ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        raise _failure(Path(what))
    return result


def keep_mounts_private() -> None:
    """From now on what this thread mounts is seen by it alone, and by threads and processes that it starts, and ends
    with the last of them."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise _failure(Path("/proc/self/ns/mnt"))
    mount("none", Path("/"), "", flags=_MS_REC | _MS_PRIVATE, options="")


def umount(target: Path, flags: int) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags) != 0:
        raise _failure(target)


def sync_file_system(fd: int) -> None:
    """syncfs(2): all of the file system that the descriptor is on, and the errors of writing it."""
    if _libc.syncfs(fd) != 0:
        raise _failure(Path(f"/proc/self/fd/{fd}"))


# ---- what the kernel says in files ----


def kernel_text(file: Path) -> str:
    """A file of /proc or /sys, unchanged: a name in it may have bytes that Python takes for the end of a line."""
    return os.fsdecode(file.read_bytes())


@contextlib.contextmanager
def sysfs() -> Iterator[Path]:
    """/sys; where it is not mounted (in a chroot), one of our own, for who may mount."""
    if (_SYS / "dev/block").is_dir():
        yield _SYS
        return
    folder = mount_nowhere("sysfs", flags=MS_RDONLY, options={})
    try:
        yield Path(f"/proc/self/fd/{folder}")
    finally:
        os.close(folder)


# ---- the mount table ----


class MountEntry(NamedTuple):
    """One line of /proc/self/mountinfo."""

    id: int
    major: int
    minor: int
    point: str
    kind: str
    source: str
    read_only: bool  # the file system, wherever it is mounted


def unescape(field: str) -> str:
    """The kernel writes space, tab, newline and backslash as octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mounts() -> list[MountEntry]:
    """What is mounted in this process's namespace, in the order it was mounted."""
    entries = []
    for line in kernel_text(Path("/proc/self/mountinfo")).split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        fields, (kind, source, options, *_) = before.split(" "), after.split(" ")
        major, _, minor = fields[2].partition(":")
        entries.append(
            MountEntry(
                int(fields[0]),
                int(major),
                int(minor),
                unescape(fields[4]),
                kind,
                unescape(source),
                "ro" in options.split(","),
            )
        )
    return entries


def mounted_at(path: Path) -> MountEntry | None:
    """The topmost mount on exactly this resolved path."""
    return next((entry for entry in reversed(mounts()) if entry.point == str(path)), None)


# ---- FUSE ----


def open_fuse() -> int:
    """A new /dev/fuse descriptor, to be mounted."""
    return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)


def device_of(file: Path) -> int:
    """The minor number of the device a served FUSE file is on, which is the number of its connection."""
    return os.minor(file.stat().st_dev)


def abort_fuse(connection: int) -> None:
    """End a FUSE connection: every request in flight fails, and so will all later ones.

    FileNotFoundError if there is none of that number; and for users other than root, who can end their own,
    if no fusectl is mounted.
    """
    if os.geteuid() == 0:
        folder = mount_nowhere("fusectl", flags=0, options={})  # in containers nobody has mounted it
    else:
        folder = os.open(_SYS / "fs/fuse/connections", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        switch = os.open(f"{connection}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.write(switch, b"1")
        finally:
            os.close(switch)
    finally:
        os.close(folder)


# ---- loop devices ----


@dataclass
class LoopDevice:
    """An attached loop device. It detaches itself when nobody has it open any more:
    keep this open until it is mounted, then close it."""

    number: int
    fd: int

    @property
    def path(self) -> str:
        return f"/dev/loop{self.number}"

    @property
    def direct(self) -> bool:
        """Whether it reads its file past the page cache."""
        return _loop_status(self.fd, self.path).direct

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def attach_loop(file: Path, *, writable: bool = False, name: str = "") -> LoopDevice:
    """A self-detaching loop device over the file, with direct I/O. name: kept by the kernel (default: the path)."""
    label = (os.fsencode(name) or os.fsencode(file))[:LOOP_NAME_MAX]
    flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO | (0 if writable else _LO_FLAGS_READ_ONLY)
    mode = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    details = _LOOP_INFO64.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, label, b"", b"", 0, 0)
    control = backing = -1
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        backing = os.open(file, mode)
        for _ in range(_LOOP_TRIES):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            loop = os.open(f"/dev/loop{number}", mode)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, _LOOP_BLOCK_SIZE, details))
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, error.strerror, f"/dev/loop{number}") from None
            else:
                return LoopDevice(number, loop)
        raise OSError(errno.EBUSY, f"no loop device was free in {_LOOP_TRIES} tries", str(file))
    finally:
        for fd in (control, backing):
            if fd >= 0:
                os.close(fd)


def loop_number(minor: int) -> int | None:
    """Of the loop device with this minor number, which is another one where loop devices can have partitions."""
    with sysfs() as tree:
        try:
            device = (tree / f"dev/block/{LOOP_MAJOR}:{minor}").readlink().name
        except FileNotFoundError:
            return None
    match = re.fullmatch(r"loop(\d+)", device)
    return int(match[1]) if match else None


def loop_file(number: int) -> str | None:
    """The path of what a loop device is attached to; None if it is not attached."""
    with sysfs() as tree:
        return file_behind(tree / f"block/loop{number}")


def file_behind(device: Path) -> str | None:
    """The same of a block device's folder in sysfs; None also if it is no loop device."""
    try:
        return kernel_text(device / "loop/backing_file")[:-1]
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # none, or not any more
            raise
        return None


class LoopStatus(NamedTuple):
    """What the kernel knows of a loop device."""

    file_device: int  # the minor number of the device that its file is on
    name: str  # that attach_loop() gave it
    read_only: bool
    direct: bool  # whether it reads its file past the page cache


def loop_status(number: int) -> LoopStatus:
    """Waits for the server of a FUSE file, unless that has said that its attributes never change, as ours do."""
    path = f"/dev/loop{number}"
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _loop_status(fd, path)
    finally:
        os.close(fd)


def _loop_status(fd: int, path: str) -> LoopStatus:
    status = bytearray(_LOOP_INFO64.size)
    try:
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    fields = _LOOP_INFO64.unpack(status)
    name, flags = os.fsdecode(fields[_LOOP_NAME].rstrip(b"\0")), fields[_LOOP_FLAGS]
    return LoopStatus(
        os.minor(fields[0]), name, bool(flags & _LO_FLAGS_READ_ONLY), bool(flags & _LO_FLAGS_DIRECT_IO)
    )
