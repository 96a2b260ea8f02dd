# SPDX-License-Identifier: Apache-2.0
"""The ext4 disk of an image, made layer by layer by the kernel's own ext4.

Each layer is a writable one over those below it, served as a file (`attach`), mounted through a
loop device, changed as its archive says (apply.py), unmounted, and committed. What in ext4
depends on the moment is set to one value then (formats/ext4.py), and blocks are allocated while
the files are written, by one thread: equal archives give equal disks where ext4 allows.
Needs root (check_rights).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from blockdev import syscalls
from blockdev.build.apply import Applied, Staged
from blockdev.build.depot import Read
from blockdev.build.layerfile import LayerFile, Wrapping
from blockdev.build.tree import Tree
from blockdev.build.workshop import Written
from blockdev.errors import AccessDenied, DeviceError, from_os
from blockdev.ranges import write_at
from blockdev.upper import PairFiles, create_pair, open_pair_files
from formats import ext4, lsmt
from formats.archive import Archive
from formats.lsmt import Head
from formats.pair import replaying
from formats.tree import BLOCK_SIZE

FILE_SYSTEM = "ext4"
DISK_SIZE = 64 << 30  # bytes, as overlaybd's own disks have; what is not written takes no room
_OPTIONS = "nodelalloc,noinit_itable,nodiscard,user_xattr,acl,errors=remount-ro"
_FLAGS = syscalls.MS_NODEV | syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NOATIME
_MKFS_SECONDS = 600.0  # it writes 5 MiB
_RELEASE_SECONDS = 60.0  # for the kernel to let go of the loop device's file, and for the owner of the pair
_RELEASE_POLL = 0.01  # seconds

# attach(layers, pair, file): the disk of layer files, bottom first, with a writable pair on top, at a path.
Attach = Callable[[Sequence[int], tuple[Path, Path], Path], AbstractContextManager[None]]

_OVER = " over "  # in Written.state: between a layer's digest and that of the one below


@dataclass(frozen=True)
class Workplace:
    """Where layers are worked on. scratch: a directory for pairs and mount points; undo: the end of the conversion."""

    attach: Attach
    scratch: Path
    undo: ExitStack


def check_rights() -> None:
    """AccessDenied for whoever cannot make such a disk."""
    if os.geteuid() != 0:
        raise AccessDenied("converting failed: --fs ext4: only root can mount what is to be written")


class Ext4Disk:
    """Grows by a layer with each write() or follow(), bottom first. FormatError for an archive that is none."""

    def __init__(self, wrapping: Wrapping, jobs: int, workplace: Workplace) -> None:
        self._wrapping = wrapping
        self._jobs = jobs
        self._workplace = workplace
        self._tree = Tree()
        self._applied = Applied()
        self._files: list[int] = []  # the layers
        self._state = ""  # of the topmost: a digest of its content and of that of all below

    def write(self, read: Read, head: Head, file: BinaryIO, name: str) -> Written:
        """The layer that an archive stands for, into an empty file. head: the UUIDs; name: for messages."""
        with tempfile.TemporaryDirectory(prefix="ext4-", dir=self._workplace.scratch) as folder:
            disk, mount = Path(folder) / "disk", Path(folder) / "mount"
            disk.touch()
            mount.mkdir()
            with ExitStack() as undo:
                pair = _nameless_pair(Path(folder), head.parent_uuid, undo)
                self._work(read, pair, (disk, mount), name)
                written = self._commit(pair, head, file)
        self._keep(file, written)
        return written

    def _work(self, read: Read, pair: tuple[Path, Path], places: tuple[Path, Path], name: str) -> None:
        """Do what an archive says to the disk of the layers so far, which then has its changes in the pair."""
        disk, mount = places
        with self._workplace.attach(self._files, pair, disk):
            if not self._files:
                _make_file_system(disk)
            with _mounted(disk, mount), _on_one_cpu():
                staged = Staged(mount, self._tree.root)
                if not self._files:
                    staged.discard(os.fsencode(mount / "lost+found"))  # e2fsck makes it when it is needed
                self._tree.apply(Archive(read), staged.store, name)
                self._applied.apply(self._tree.root, staged)
            _settle(disk)

    def fits(self, below: Written | None, written: Written) -> bool:
        """As Disk.fits(): blocks of another ext4, however equal its files, are of no use."""
        return written.state.partition(_OVER)[2] == (below.state.partition(_OVER)[0] if below else "")

    def follow(self, read: Read, written: Written, file: BinaryIO, name: str) -> None:
        """Go on from a layer that was written before, from the same archive."""
        self._tree.apply(Archive(read), lambda size, content: 0, name)
        self._applied.follow(self._tree.root)
        self._keep(file, written)

    def _keep(self, file: BinaryIO, written: Written) -> None:
        """The layer for those to come: whoever gave the file closes it when it was sent."""
        self._files.append(os.dup(file.fileno()))
        self._workplace.undo.callback(os.close, self._files[-1])
        self._state = written.state.partition(_OVER)[0]

    def _commit(self, pair: tuple[Path, Path], head: Head, file: BinaryIO) -> Written:
        digest = hashlib.sha256(self._state.encode())
        with ExitStack() as undo:
            source = _released(pair, undo)
            out = undo.enter_context(LayerFile(file.fileno(), self._wrapping, self._jobs))
            live = replaying(lsmt.read_log(source.index, source.log))

            def write(content: bytes) -> None:
                digest.update(content)
                out.write(content)

            lsmt.commit(live, [source.data], write, replace(head, virtual_size=DISK_SIZE))
            size = out.finish()
        annotations = out.table.place.annotations() if out.table else {}
        state = f"{digest.hexdigest()}{_OVER}{self._state}"
        return Written(size, 1, DISK_SIZE // BLOCK_SIZE, state, annotations)


def _nameless_pair(folder: Path, parent_uuid: str, undo: ExitStack) -> tuple[Path, Path]:
    """An empty writable layer whose files go with this process, however it ends."""
    data, index = folder / "data", folder / "index"
    create_pair(data, index, DISK_SIZE, parent_uuid)
    paths = []
    for path in (data, index):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        path.unlink()
        paths.append(Path(f"/proc/self/fd/{fd}"))
    return paths[0], paths[1]


def _released(pair: tuple[Path, Path], undo: ExitStack) -> PairFiles:
    """The pair, once the owner has let go of it."""
    deadline = time.monotonic() + _RELEASE_SECONDS
    while True:
        try:
            return undo.enter_context(open_pair_files(*pair, change=False))
        except DeviceError:
            if time.monotonic() > deadline:
                raise


def _make_file_system(disk: Path) -> None:
    command = ["mkfs.ext4", *ext4.MKFS_OPTIONS, str(disk)]
    environment = {**os.environ, "E2FSPROGS_FAKE_TIME": str(ext4.MOMENT), "MKE2FS_CONFIG": "/dev/null"}
    environment["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        made = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=_MKFS_SECONDS
        )
    except OSError as error:
        raise from_os("making an ext4 failed", error, command[0]) from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"making an ext4 failed: {disk}: mkfs.ext4 has not ended in {_MKFS_SECONDS:g} s") from None
    if made.returncode:
        raise DeviceError(f"making an ext4 failed: {disk}: {made.stderr.strip() or made.returncode}")


@contextmanager
def _mounted(disk: Path, mount: Path) -> Iterator[None]:
    """The file system of a file on a directory; all that was written is in the file when the block has ended."""
    try:
        with syscalls.attach_loop(disk, writable=True) as loop:
            syscalls.mount(loop.path, mount, "ext4", flags=_FLAGS, options=_OPTIONS)
    except OSError as error:
        raise from_os("mounting an ext4 failed", error, str(disk)) from error
    try:
        yield
        fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            syscalls.sync_file_system(fd)
        finally:
            os.close(fd)
    except BaseException:
        syscalls.umount(mount, syscalls.MNT_DETACH)
        raise
    try:
        syscalls.umount(mount, 0)
    except OSError as error:
        raise from_os("unmounting an ext4 failed", error, str(mount)) from error
    _await_release(loop.number)


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    """Keep this thread where it is: ext4 allocates blocks for small files from a reserve of each processor."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _await_release(number: int) -> None:
    deadline = time.monotonic() + _RELEASE_SECONDS
    while syscalls.loop_file(number) is not None:
        if time.monotonic() > deadline:
            raise DeviceError(f"unmounting an ext4 failed: /dev/loop{number}: somebody keeps it")
        time.sleep(_RELEASE_POLL)


def _settle(disk: Path) -> None:
    """Take away what depends on the moment; blocks that have nothing of it are not written."""
    with disk.open("r+b", buffering=0) as file:
        fd = file.fileno()
        before = os.pread(fd, ext4.SUPERBLOCK_SIZE, ext4.SUPERBLOCK_OFFSET)
        found = ext4.Ext4.parse(before)
        _write_changed(fd, ext4.SUPERBLOCK_OFFSET, before, ext4.settled_superblock(before))
        offset, length = found.descriptors
        for at, size in found.tables(os.pread(fd, length, offset)):
            table = os.pread(fd, size, at)
            _write_changed(fd, at, table, ext4.settled_inodes(table))
        os.fsync(fd)


def _write_changed(fd: int, offset: int, before: bytes, after: bytes) -> None:
    for at in range(0, len(before), BLOCK_SIZE):
        piece = after[at : at + BLOCK_SIZE]
        if piece != before[at : at + BLOCK_SIZE]:
            write_at(fd, piece, offset + at)
