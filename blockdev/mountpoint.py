# SPDX-License-Identifier: Apache-2.0
"""An image in the caller's kernel: its FUSE file under a name, or the file system inside it.

    mount_filesystem()  what the file holds, mounted on a directory, through a loop
                        device, or (EROFS) straight from the file
    mount_file()        the image as one file that is mounted on a regular file
    umount()            takes a mount away again; force_umount() even when the server does
                        not answer or files are open

Runs with the caller's rights, in the caller's namespaces. What fails half-way, or is interrupted, is undone.
The FUSE file below a mounted directory is held by its loop device, or by EROFS, alone: whoever
unmounts the directory, in whatever way, ends it, and its server learns that from the kernel.
umount and force_umount find everything in the mount table and by the loop device, need no owner, and
call nothing that waits for the server of a FUSE file (stat, open and close would): they
return within UMOUNT_DEADLINE however dead or stopped that server is. sync() does wait.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockdev import fusefile, syscalls
from blockdev.errors import BlockdevError, DeviceError, NotFound, UsageError, from_os
from blockdev.fusefile import FuseFile
from blockdev.mountoptions import MountOptions
from blockdev.root import Root
from blockdev.syscalls import MountEntry
from formats import superblock

log = logging.getLogger(__name__)

UMOUNT_DEADLINE = 10.0  # seconds; promised to whoever calls umount
TEARDOWN_PATIENCE = 4.0  # seconds reads in flight may hold up a umount before they are failed
# Linux mounts EROFS from a regular file since 6.12, but took a short read of that file, as
# an error in its middle gives, for zeros: wrong bytes, cached. Fixed by upstream commit
# eade54040384 in 7.0, and in these stable series from this version on.
EROFS_FROM_FILE_SINCE = (7, 0)
EROFS_FROM_FILE_STABLE = {(6, 12): 80, (6, 18): 21}
LINK = "ociblk-"  # and the number of the connection: what EROFS of ours was mounted from, in the mount table
NAME = "ociblk"  # of our loop devices and FUSE files; a space and the root follow, where there is room
_NOT_FOR_US = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENXIO}  # a loop device of others; detached by now
LINKS_MAX = 40  # symbolic links followed in a path, as in the kernel


# ---- file systems ----


# What a read-only mount of an image needs, by the kernel's name of the file system; and a writable one.
_OPTIONS = {"ext4": ("noload",), "erofs": (), "xfs": ("norecovery", "nouuid"), "squashfs": ()}
_WRITABLE_OPTIONS = {"ext4": (), "xfs": ("nouuid",)}


def _detect(file: Path, directory: Path) -> str:
    """The kernel's name of the file system in an image."""
    try:
        with file.open("rb", buffering=0) as disk:
            head = disk.read(superblock.HEAD_SIZE)
    except OSError as error:
        raise DeviceError(f"mount failed: {directory}: the image cannot be read: {error.strerror}") from error
    kind = superblock.file_system(head)
    if kind in _OPTIONS:
        return kind
    found = "a partition table" if head[510:512] == b"\x55\xaa" else "none of " + ", ".join(_OPTIONS)
    raise DeviceError(f"mount failed: {directory}: no file system that can be mounted: the image holds {found}")


# ---- mount ----


@dataclass(frozen=True)
class Mounted:
    """A mounted image: the directory or file, and what it reads through."""

    point: Path
    kind: str  # of the file system; fusefile.KIND: the disk as a file
    connection: int  # of the FUSE file: its number in /sys/fs/fuse/connections
    loop: str | None = None  # the loop device between them, if there is one
    root: Path | None = None  # whose owner serves it, where that can be told
    writable: bool = False  # the FUSE file


class NotMounted(NotFound):
    """Nothing is mounted there."""


def _locate(path: Path) -> Path:
    """The path with all links resolved, without touching what is mounted on it."""
    for _ in range(LINKS_MAX):
        if path.name in ("", ".."):
            return Path(os.path.realpath(path))
        path = Path(os.path.realpath(path.absolute().parent)) / path.name
        if syscalls.mounted_at(path) or not _is_link(path):
            return path
        path = path.parent / path.readlink()
    raise UsageError(f"finding a path failed: {path}: {os.strerror(errno.ELOOP)}")


def _is_link(path: Path) -> bool:
    try:
        return stat.S_ISLNK(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise from_os("finding a path failed", error, str(path)) from None


def vacant(path: Path) -> Path:
    """The path with all links resolved; refused if something is mounted there. Asks no server."""
    path = _locate(path)
    if syscalls.mounted_at(path):
        raise DeviceError(f"mount failed: {path}: already a mount point")
    return path


def _place(path: Path) -> tuple[Path, int]:
    """A mount point to be, and its file type."""
    path = vacant(path)
    try:
        return path, stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        raise NotFound(f"mount failed: {path}: no such file or directory") from None
    except OSError as error:
        raise DeviceError(f"mount failed: {path}: {error.strerror}") from error


@contextlib.contextmanager
def mount_file(path: Path, root: Root | None = None, *, writable: bool = False) -> Iterator[int]:
    """A FUSE file mounted on a regular file; the descriptor to serve it by, which the caller closes. root: whose
    owner will serve it.

    If the block fails, or the mounting is interrupted, it is as if it had never been.
    """
    path, kind = _place(path)
    if kind != stat.S_IFREG:
        raise DeviceError(f"mount failed: {path}: not a regular file")
    with _undone(path):
        yield fusefile.mount(path, f"{NAME} {root.path}" if root else NAME, writable=writable)


@contextlib.contextmanager
def mount_filesystem(file: FuseFile, directory: Path, options: MountOptions, root: Root) -> Iterator[Mounted]:
    """What a served FUSE file of the root's owner holds, mounted on a directory.

    EROFS goes straight from the file where this kernel does that right; everything else, and
    EROFS where the kernel was built without it, through a loop device. If the block fails, or
    the mounting is interrupted, it is as if it had never been.
    """
    directory, place = _place(directory)
    if place != stat.S_IFDIR:
        raise DeviceError(f"mount failed: {directory}: not a directory")
    kind = _detect(file.path, directory)
    if file.writable and kind not in _WRITABLE_OPTIONS:
        raise DeviceError(f"mount failed: {directory}: the image holds {kind}, which cannot be written to")
    needed = (_WRITABLE_OPTIONS if file.writable else _OPTIONS)[kind]
    options = MountOptions(options.flags, (*needed, *options.rest))
    with _undone(directory, file.connection):
        mounted = None
        if kind == "erofs" and erofs_from_file(os.uname().release):
            mounted = _mount_from_file(file, directory, options, root)
        yield mounted or _mount_through_loop(file, kind, directory, options, root)


def _mount_from_file(file: FuseFile, directory: Path, options: MountOptions, root: Root) -> Mounted | None:
    """None: the kernel was built without it. The mount table keeps the name that a file system was mounted
    from: it is to tell the connection."""
    link = root.mounts / f"{LINK}{file.connection}"
    try:
        link.parent.mkdir(mode=0o700, exist_ok=True)
        link.unlink(missing_ok=True)  # of a command that was killed just here
        link.symlink_to(file.path)
        try:
            syscalls.mount(link, directory, "erofs", flags=options.flags, options=options.data)
        finally:
            link.unlink()
    except OSError as error:
        if error.errno != errno.ENOTBLK:
            raise DeviceError(f"mount failed: {directory}: erofs: {error.strerror}") from error
        log.info("mounting through a loop device reason=this kernel mounts EROFS from no file")
        return None
    return Mounted(directory, "erofs", file.connection)


def _mount_through_loop(file: FuseFile, kind: str, directory: Path, options: MountOptions, root: Root) -> Mounted:
    name = f"{NAME} {root.path}"
    if len(os.fsencode(name)) > syscalls.LOOP_NAME_MAX:
        name = NAME
    try:
        with syscalls.attach_loop(file.path, writable=file.writable, name=name) as loop:
            syscalls.mount(loop.path, directory, kind, flags=options.flags, options=options.data)
            if not loop.direct:
                log.warning("loop device without direct I/O, pages are cached twice device=%s", loop.path)
            return Mounted(directory, kind, file.connection, loop.path, root.path, file.writable)
    except OSError as error:
        raise DeviceError(f"mount failed: {directory}: {kind}: {error.filename}: {error.strerror}") from error


@contextlib.contextmanager
def _undone(point: Path, connection: int | None = None) -> Iterator[None]:
    """If the block fails, what of ours is mounted there is taken away (and reads through the connection, if that is
    known). A signal that arrives during mount(2) is raised after it: there is a mount that nobody has told us of."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(BlockdevError):  # the error that brought us here is the one to tell
            if connection in (None, find(point).connection):
                force_umount(point)
        raise


def erofs_from_file(release: str) -> bool:
    """Whether the kernel of this release mounts EROFS from a file, and rightly."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if not match:
        return False
    series, patch = (int(match[1]), int(match[2])), int(match[3] or 0)
    return series >= EROFS_FROM_FILE_SINCE or patch >= EROFS_FROM_FILE_STABLE.get(series, patch + 1)


# ---- umount ----


def umount(path: Path) -> Mounted:
    """Unmount a directory, or a FUSE file mounted alone, that nobody uses.

    DeviceError at once, and nothing changed, if somebody does. Reads still in flight that
    nobody waits for are failed after TEARDOWN_PATIENCE, if nothing can be written to it.
    """
    found = find(path)
    if found.kind == fusefile.KIND:
        _umount_file(found.point, lazy=False)
    else:
        _umount_directory(found, patience=UMOUNT_DEADLINE if found.writable else TEARDOWN_PATIENCE)
    return found


def force_umount(path: Path) -> Mounted:
    """Unmount whatever the state of the server and however busy, and with it what is mounted
    below. Reads in flight, and all that processes with open files do from now on, fail with
    EIO or ENOTCONN."""
    found = find(path)
    for below in ours():
        if found.point in (below.point, *below.point.parents):
            _abort(below.connection)
    if syscalls.mounted_at(found.point):  # the abort may have unmounted it
        if found.kind == fusefile.KIND:
            _umount_file(found.point, lazy=True)
        else:
            _umount_or_fail(found.point, syscalls.MNT_DETACH)
    return found


def find(path: Path) -> Mounted:
    """What of ours is mounted on the path. NotFound if nothing is. Asks no server."""
    path = _locate(path)
    entry = syscalls.mounted_at(path)
    if not entry:
        raise NotMounted(f"umount failed: {path}: not mounted")
    found = _ours(entry)
    if not found:
        raise NotFound(f"umount failed: {path}: not a mount of ours: {entry.kind} from {entry.source}")
    return found


def sync(mounted: Mounted) -> None:
    """What was written to it has reached its disk when this returns. Waits for its server, as long as that takes."""
    fd = os.open(mounted.point, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mounted.kind != fusefile.KIND:
            syscalls.sync_file_system(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def ours() -> list[Mounted]:
    """Every mount of ours that is in the mount table, the last one first. Asks no server."""
    return list(filter(None, map(_ours, reversed(syscalls.mounts()))))


def connection_of(entry: MountEntry) -> int | None:
    """The FUSE connection that a mount of ours reads through; None: it is not ours. Asks no server."""
    found = _ours(entry)
    return found.connection if found else None


def _ours(entry: MountEntry) -> Mounted | None:
    point = Path(entry.point)
    if entry.kind == fusefile.KIND:
        return Mounted(point, entry.kind, entry.minor, root=_root_of(entry.source), writable=not entry.read_only)
    if entry.major == syscalls.LOOP_MAJOR:
        return _through_loop(point, entry)
    link = re.fullmatch(rf".*/{LINK}(\d+)", entry.source, re.DOTALL)
    return Mounted(point, entry.kind, int(link[1])) if link and entry.kind == "erofs" else None


def _through_loop(point: Path, entry: MountEntry) -> Mounted | None:
    try:
        number = syscalls.loop_number(entry.minor)
        if number is None or syscalls.loop_file(number) != syscalls.NOWHERE:
            return None  # a foreign one is not asked: its file need not answer
        status = syscalls.loop_status(number)
    except OSError as error:
        if error.errno in _NOT_FOR_US:
            return None
        raise DeviceError(f"looking at a mount failed: {error.filename}: {error.strerror}") from error
    if status.name.partition(" ")[0] != NAME:
        return None
    whose = _root_of(status.name)
    return Mounted(point, entry.kind, status.file_device, f"/dev/loop{number}", whose, not status.read_only)


def _root_of(name: str) -> Path | None:
    root = name.partition(" ")[2]
    return Path(root) if root else None


def _umount_or_fail(point: Path, flags: int) -> None:
    try:
        syscalls.umount(point, flags | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        why = "in use" if error.errno == errno.EBUSY else error.strerror
        raise DeviceError(f"umount failed: {point}: {why}") from error


def _umount_file(file: Path, *, lazy: bool) -> None:
    if os.geteuid() != 0:
        fusefile.umount_for_user(file, lazy=lazy)
    else:
        _umount_or_fail(file, syscalls.MNT_DETACH if lazy else 0)


def _umount_directory(found: Mounted, *, patience: float) -> None:
    """umount(2) in a thread: when the mount is already gone from the table it may still
    wait for read-ahead that a dead registry or a stopped server owes, which nobody needs.

    It is failed after `patience` seconds; of what can be written to, where it may be writes, never.
    """
    directory = found.point
    failure: list[DeviceError] = []

    def call() -> None:
        try:
            _umount_or_fail(directory, 0)
        except DeviceError as error:
            failure.append(error)

    before = syscalls.mounted_at(directory)
    deadline = time.monotonic() + UMOUNT_DEADLINE
    thread = threading.Thread(target=call, name="umount", daemon=True)
    thread.start()
    thread.join(patience)
    if thread.is_alive() and patience < UMOUNT_DEADLINE and syscalls.mounted_at(directory) != before:
        log.warning("failing reads in flight directory=%s", directory)
        _abort(found.connection)
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise DeviceError(f"umount failed: {directory}: the kernel did not finish in {UMOUNT_DEADLINE:g} s")
    if failure:
        raise failure[0]


def _abort(connection: int) -> None:
    """End a FUSE connection: every request in flight fails, and so will all later ones."""
    try:
        syscalls.abort_fuse(connection)
    except FileNotFoundError:
        # It has ended; or nobody has mounted fusectl for users, who then can take the file away all the same.
        log.info("no connection to abort number=%d", connection)
    except OSError as error:
        raise DeviceError(f"umount failed: aborting connection {connection}: {error.strerror}") from error
