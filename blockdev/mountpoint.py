# SPDX-License-Identifier: Apache-2.0
"""An image in the caller's kernel: its FUSE file, and the file system inside it.

    mount_file()        /dev/fuse mounted on a regular file: the image as one file
    mount_filesystem()  what that file holds, mounted on a directory, through a loop
                        device, or (EROFS) straight from the file
    umount()            takes both away again; force_umount() even when the server does
                        not answer or files are open

Runs with the caller's rights, in the caller's namespaces. What failed half-way is undone.
umount and force_umount find everything in the mount table and sysfs, need no owner, and
call nothing that waits for the server of a FUSE file (stat, open and close would): they
return within UMOUNT_DEADLINE however dead or stopped that server is. sync() does wait.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from blockdev import syscalls
from blockdev.errors import DeviceError, NotFound, UsageError
from blockdev.syscalls import MountEntry
from formats import superblock

log = logging.getLogger(__name__)

FUSE_KIND = "fuse.ociblk"  # the type our files have in the mount table
UMOUNT_DEADLINE = 10.0  # seconds; promised to whoever calls umount
TEARDOWN_PATIENCE = 4.0  # seconds reads in flight may hold up a umount before they are failed
# Linux mounts EROFS from a regular file since 6.12, but took a short read of that file, as
# an error in its middle gives, for zeros: wrong bytes, cached. Fixed by upstream commit
# eade54040384 in 7.0, and in these stable series from this version on.
EROFS_FROM_FILE_SINCE = (7, 0)
EROFS_FROM_FILE_STABLE = {(6, 12): 80, (6, 18): 21}
FUSERMOUNT = "fusermount3"  # mounts FUSE for those who may not mount(2)
LINKS_MAX = 40  # symbolic links followed in a path, as in the kernel


# ---- options ----


@dataclass(frozen=True)
class MountOptions:
    """What -o said: mount(2) flags, and options for the file system itself."""

    flags: int
    rest: tuple[str, ...] = ()


_SETS = {
    "ro": syscalls.MS_RDONLY,
    "nosuid": syscalls.MS_NOSUID,
    "nodev": syscalls.MS_NODEV,
    "noexec": syscalls.MS_NOEXEC,
    "nosymfollow": syscalls.MS_NOSYMFOLLOW,
    "noatime": syscalls.MS_NOATIME,
    "nodiratime": syscalls.MS_NODIRATIME,
    "relatime": syscalls.MS_RELATIME,
    "strictatime": syscalls.MS_STRICTATIME,
}
_CLEARS = {
    "suid": syscalls.MS_NOSUID,
    "dev": syscalls.MS_NODEV,
    "exec": syscalls.MS_NOEXEC,
    "symfollow": syscalls.MS_NOSYMFOLLOW,
    "atime": syscalls.MS_NOATIME,
    "diratime": syscalls.MS_NODIRATIME,
    "norelatime": syscalls.MS_RELATIME,
    "nostrictatime": syscalls.MS_STRICTATIME,
}
_REFUSED = {
    "rw": "an image is read-only without --rw",
    "remount": "umount and mount again",
    "bind": "not a mount of an image",
}
_FOR_OTHERS = {"defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "group", "owner"}


def parse_options(text: str, *, writable: bool = False) -> MountOptions:
    """The argument of -o, over the defaults ro (unless writable), nodev and nosuid. UsageError if it cannot be had.

    What only fstab's readers care about (defaults, nofail, x-...) is dropped; what is not
    ours goes to the file system.
    """
    flags = (0 if writable else syscalls.MS_RDONLY) | syscalls.MS_NODEV | syscalls.MS_NOSUID
    rest = []
    for option in filter(None, text.split(",")):
        if writable and option == "rw":
            continue
        if option in _REFUSED:
            raise UsageError(f"reading mount options failed: {option}: {_REFUSED[option]}")
        if option in _SETS:
            flags |= _SETS[option]
        elif option in _CLEARS:
            flags &= ~_CLEARS[option]
        elif option not in _FOR_OTHERS and not option.startswith(("x-", "X-", "comment=")):
            rest.append(option)
    return MountOptions(flags, tuple(rest))


# ---- file systems ----


# What a read-only mount of an image needs, by the kernel's name of the file system; and a writable one.
_OPTIONS = {"ext4": ("noload",), "erofs": (), "xfs": ("norecovery", "nouuid"), "squashfs": ()}
_WRITABLE_OPTIONS = {"ext4": (), "xfs": ("nouuid",)}


def _detect(file: Path) -> str:
    """The kernel's name of the file system in an image."""
    try:
        with file.open("rb", buffering=0) as disk:
            head = disk.read(superblock.HEAD_SIZE)
    except OSError as error:
        raise DeviceError(f"mount failed: {file}: cannot be read: {error.strerror}") from error
    kind = superblock.file_system(head)
    if kind in _OPTIONS:
        return kind
    found = "a partition table" if head[510:512] == b"\x55\xaa" else "none of " + ", ".join(_OPTIONS)
    raise DeviceError(f"mount failed: {file}: no file system that can be mounted: the image holds {found}")


# ---- mount ----


@dataclass(frozen=True)
class Mounted:
    """A mounted image: the directory (None: the file alone), the FUSE file, and what is between."""

    file: Path
    directory: Path | None = None
    kind: str = ""  # of the file system
    loop: str | None = None  # the loop device; None: straight from the file
    writable: bool = False  # the FUSE file, as the mount table has it


def _locate(path: Path) -> Path:
    """The path with all links resolved, without touching what is mounted on it."""
    for _ in range(LINKS_MAX):
        if path.name in ("", ".."):
            return path.resolve()
        path = path.absolute().parent.resolve() / path.name
        if syscalls.mounted_at(path) or not path.is_symlink():
            return path
        path = path.parent / path.readlink()
    raise DeviceError(f"finding a path failed: {path}: {os.strerror(errno.ELOOP)}")


def _place(path: Path) -> tuple[Path, int]:
    """A mount point to be and its file type; refused if something is mounted there."""
    path = _locate(path)
    if syscalls.mounted_at(path):
        raise DeviceError(f"mount failed: {path}: already a mount point")
    try:
        return path, stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        raise NotFound(f"mount failed: {path}: no such file or directory") from None
    except OSError as error:
        raise DeviceError(f"mount failed: {path}: {error.strerror}") from error


def mount_file(path: Path, *, writable: bool = False) -> int:
    """Mount a FUSE file on a regular file; returns the /dev/fuse descriptor to serve it by.

    The kernel's first request waits in the descriptor, so until somebody serves it every
    use of the path waits too. Only the mounting user may open the file (FUSE's rule, as we
    do not ask for allow_other). Users other than root go through fusermount3.
    """
    path, kind = _place(path)
    if kind != stat.S_IFREG:
        raise DeviceError(f"mount failed: {path}: not a regular file")
    if os.geteuid() != 0:
        return _fusermount(path, "rw" if writable else "ro")
    try:
        fd = syscalls.open_fuse()
    except OSError as error:
        raise DeviceError(f"mount failed: /dev/fuse: {error.strerror}") from error
    owner = f"user_id={os.geteuid()},group_id={os.getegid()}"
    options = f"fd={fd},rootmode={'100644' if writable else '100444'},{owner},default_permissions"
    flags = (0 if writable else syscalls.MS_RDONLY) | syscalls.MS_NODEV | syscalls.MS_NOSUID | syscalls.MS_NOEXEC
    try:
        syscalls.mount("ociblk", path, FUSE_KIND, flags=flags, options=options)
    except OSError as error:
        os.close(fd)
        raise DeviceError(f"mount failed: {path}: FUSE: {error.strerror}") from error
    return fd


def _fusermount(path: Path, access: str) -> int:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = f"{access},nosuid,nodev,noexec,default_permissions,fsname=ociblk,subtype=ociblk"
        _run_fusermount(["-o", options, "--", str(path)], path, commfd=theirs.fileno())
        theirs.close()
        fds = socket.recv_fds(ours, 1, 1)[1]
    if not fds:
        raise DeviceError(f"mount failed: {path}: {FUSERMOUNT} sent no descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _run_fusermount(arguments: list[str], path: Path, *, commfd: int = -1) -> None:
    passed = (commfd,) if commfd >= 0 else ()
    environment = {**os.environ, "_FUSE_COMMFD": str(commfd)} if passed else None
    try:
        result = subprocess.run(
            [FUSERMOUNT, *arguments], pass_fds=passed, env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise DeviceError(f"{FUSERMOUNT} failed: {path}: {error.strerror}") from error
    if result.returncode != 0:
        why = result.stderr.strip().removeprefix(f"{FUSERMOUNT}: ") or f"exit status {result.returncode}"
        raise DeviceError(f"{FUSERMOUNT} failed: {path}: {why}")


def mount_filesystem(file: Path, directory: Path, options: MountOptions, *, writable: bool = False) -> Mounted:
    """Mount what a served FUSE file holds on a directory.

    EROFS goes straight from the file where this kernel does that right; everything else, and
    EROFS where the kernel was built without it (ENOTBLK), through a loop device.
    """
    file = _locate(file)
    directory, place = _place(directory)
    if place != stat.S_IFDIR:
        raise DeviceError(f"mount failed: {directory}: not a directory")
    kind = _detect(file)
    if writable and kind not in _WRITABLE_OPTIONS:
        raise DeviceError(f"mount failed: {directory}: the image holds {kind}, which cannot be written to")
    data = ",".join((*(_WRITABLE_OPTIONS if writable else _OPTIONS)[kind], *options.rest))
    if kind == "erofs" and erofs_from_file(os.uname().release):
        try:
            syscalls.mount(file, directory, kind, flags=options.flags, options=data)
            return Mounted(file, directory, kind)
        except OSError as error:
            if error.errno != errno.ENOTBLK:
                raise DeviceError(f"mount failed: {directory}: {kind}: {error.strerror}") from error
            log.info("mounting through a loop device file=%s reason=this kernel mounts EROFS from no file", file)
    try:
        with syscalls.attach_loop(file, writable=writable) as loop:
            syscalls.mount(loop.path, directory, kind, flags=options.flags, options=data)
            if not loop.direct:
                log.warning("loop device without direct I/O, pages are cached twice device=%s", loop.path)
            return Mounted(file, directory, kind, loop.path)
    except OSError as error:
        raise DeviceError(f"mount failed: {directory}: {kind}: {error.filename}: {error.strerror}") from error


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
    found, entry = _find(path)
    if found.directory is None:
        _umount_file(found.file, lazy=False)
        return found
    _umount_directory(found.directory, found.file, patience=UMOUNT_DEADLINE if found.writable else TEARDOWN_PATIENCE)
    if not _elsewhere(entry):
        # Lazily: another namespace may still have the file system, and need its file.
        _umount_file(found.file, lazy=True)
    return found


def force_umount(path: Path) -> Mounted:
    """Unmount whatever the state of the server and however busy. Reads in flight, and all
    that processes with open files do from now on, fail with EIO or ENOTCONN."""
    found, entry = _find(path)
    _abort(found.file)
    if found.directory is not None:
        _umount_or_fail(found.directory, syscalls.MNT_DETACH)
    if not _elsewhere(entry) and syscalls.mounted_at(found.file):  # the abort may have unmounted it
        _umount_file(found.file, lazy=True)
    return found


def find(path: Path) -> Mounted:
    """What of ours is mounted on the path. NotFound if nothing is. Asks no server."""
    return _find(path)[0]


def sync(mounted: Mounted) -> None:
    """What was written to it has reached its disk when this returns. Waits for its server, as long as that takes."""
    fd = os.open(mounted.directory or mounted.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if mounted.directory:
            syscalls.sync_filesystem(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def _find(path: Path) -> tuple[Mounted, MountEntry]:
    path = _locate(path)
    entry = syscalls.mounted_at(path)
    if not entry:
        raise NotFound(f"umount failed: {path}: not mounted")
    if entry.kind == FUSE_KIND:
        return Mounted(path, writable=not entry.read_only), entry
    loop = entry.major == syscalls.LOOP_MAJOR
    source = syscalls.loop_file(entry.minor) if loop else entry.source
    below = syscalls.mounted_at(Path(source)) if source else None
    if not source or not below or below.kind != FUSE_KIND:
        raise NotFound(f"umount failed: {path}: not a mount of ours: {entry.kind} from {entry.source}")
    device = f"/dev/loop{entry.minor}" if loop else None
    return Mounted(Path(source), path, entry.kind, device, not below.read_only), entry


def _elsewhere(entry: MountEntry) -> bool:
    """Whether a file system just unmounted is mounted in another place too (bind mounts)."""
    here = (entry.major, entry.minor)
    return entry.kind != FUSE_KIND and any((other.major, other.minor) == here for other in syscalls.mounts())


def _umount_or_fail(point: Path, flags: int) -> None:
    try:
        syscalls.umount(point, flags | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        why = "in use" if error.errno == errno.EBUSY else error.strerror
        raise DeviceError(f"umount failed: {point}: {why}") from error


def _umount_file(file: Path, *, lazy: bool) -> None:
    if os.geteuid() != 0:
        _run_fusermount(["-u", *(["-z"] if lazy else []), "--", str(file)], file)
    else:
        _umount_or_fail(file, syscalls.MNT_DETACH if lazy else 0)


def _umount_directory(directory: Path, file: Path, *, patience: float) -> None:
    """umount(2) in a thread: when the mount is already gone from the table it may still
    wait for read-ahead that a dead registry or a stopped server owes, which nobody needs.

    It is failed after `patience` seconds; of what can be written to, where it may be writes, never.
    """
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
        _abort(file)
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise DeviceError(f"umount failed: {directory}: the kernel did not finish in {UMOUNT_DEADLINE:g} s")
    if failure:
        raise failure[0]


def _abort(file: Path) -> None:
    """End the FUSE connection: every request in flight fails, and so will all later ones."""
    entry = syscalls.mounted_at(file)
    if entry is None:
        return
    if os.geteuid() != 0:
        _abort_own(entry)
        return
    try:
        syscalls.umount(file, syscalls.MNT_FORCE | syscalls.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.EBUSY:  # busy: it was aborted, but stays mounted
            raise DeviceError(f"umount failed: {file}: {error.strerror}") from error


def _abort_own(entry: MountEntry) -> None:
    """MNT_FORCE is root's; the connection's own switch belongs to whoever mounted it."""
    try:
        Path(f"/sys/fs/fuse/connections/{entry.minor}/abort").write_text("1")
    except OSError as error:
        raise DeviceError(f"umount failed: {entry.point}: aborting it: {error.strerror}") from error
