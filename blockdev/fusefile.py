# SPDX-License-Identifier: Apache-2.0
"""An image as one file, which a server answers for over /dev/fuse: mounted nowhere, or on a regular file.

Runs with the caller's rights, in the caller's namespaces. The kernel's first request waits in the
descriptor, so until somebody serves it every use of the file waits too. Only the mounting user may
open the file (FUSE's rule, as we do not ask for allow_other).
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from pathlib import Path
from typing import Self

from blockdev import syscalls
from blockdev.errors import DeviceError

KIND = "fuse.ociblk"  # the type a mounted one has in the mount table
_FUSERMOUNT = "fusermount3"  # mounts FUSE for those who may not mount(2)


class FuseFile:
    """An image as a file in no mount table, for root. It lives as long as somebody has it open."""

    def __init__(self, *, writable: bool = False) -> None:
        self.writable = writable
        self.fuse_fd = _open()  # to serve it by
        try:
            self._mount = self._mount_nowhere()
        except OSError as error:
            os.close(self.fuse_fd)
            hint = " (only root can; --raw shows the disk as a file)" if error.errno == errno.EPERM else ""
            raise DeviceError(f"mount failed: FUSE: {error.strerror}{hint}") from error
        self.path = Path(f"/proc/self/fd/{self._mount}")

    def _mount_nowhere(self) -> int:
        options = _fuse_options(self.fuse_fd, self.writable)
        if not self.writable:
            options["ro"] = None  # or each read would change its access time
        return syscalls.mount_nowhere("fuse", flags=_fuse_flags(self.writable), options=options)

    @property
    def connection(self) -> int:
        """Its number in /sys/fs/fuse/connections. Waits for the server."""
        return syscalls.device_of(self.path)

    def passed(self) -> None:
        """Somebody else has fuse_fd: his end has to end the file."""
        os.close(self.fuse_fd)
        self.fuse_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.fuse_fd >= 0:
            self.passed()
        os.close(self._mount)


def _open() -> int:
    try:
        return syscalls.open_fuse()
    except OSError as error:
        raise DeviceError(f"mount failed: /dev/fuse: {error.strerror}") from error


def _fuse_flags(writable: bool) -> int:
    return (0 if writable else syscalls.MS_RDONLY) | syscalls.MS_NODEV | syscalls.MS_NOSUID | syscalls.MS_NOEXEC


def _fuse_options(fd: int, writable: bool) -> dict[str, str | None]:
    mode = "100644" if writable else "100444"
    ids = {"user_id": str(os.geteuid()), "group_id": str(os.getegid())}
    return {"fd": str(fd), "rootmode": mode, **ids, "default_permissions": None}


def mount(path: Path, name: str, *, writable: bool) -> int:
    """Mount a FUSE file on a regular file; returns the /dev/fuse descriptor to serve it by. name: what the mount
    table calls what is mounted.

    Users other than root go through fusermount3.
    """
    if os.geteuid() != 0:
        return _mount_for_user(path, name, "rw" if writable else "ro")
    fd = _open()
    options = (name if value is None else f"{name}={value}" for name, value in _fuse_options(fd, writable).items())
    try:
        syscalls.mount(name, path, KIND, flags=_fuse_flags(writable), options=",".join(options))
    except OSError as error:
        os.close(fd)
        raise DeviceError(f"mount failed: {path}: FUSE: {error.strerror}") from error
    return fd


def _mount_for_user(path: Path, name: str, access: str) -> int:
    name = name.replace("\\", "\\\\").replace(",", "\\,")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = f"{access},nosuid,nodev,noexec,default_permissions,subtype=ociblk,fsname={name}"
        _run_fusermount(["-o", options, "--", str(path)], path, commfd=theirs.fileno())
        theirs.close()
        fds = socket.recv_fds(ours, 1, 1)[1]
    if not fds:
        raise DeviceError(f"mount failed: {path}: {_FUSERMOUNT} sent no descriptor")
    os.set_inheritable(fds[0], False)
    return fds[0]


def umount_for_user(file: Path, *, lazy: bool) -> None:
    """Take such a file away again, for a user other than root."""
    _run_fusermount(["-u", *(["-z"] if lazy else []), "--", str(file)], file)


def _run_fusermount(arguments: list[str], path: Path, *, commfd: int = -1) -> None:
    passed = (commfd,) if commfd >= 0 else ()
    environment = {**os.environ, "_FUSE_COMMFD": str(commfd)} if passed else None
    try:
        result = subprocess.run(
            [_FUSERMOUNT, *arguments], pass_fds=passed, env=environment, capture_output=True, check=False
        )
    except OSError as error:
        raise DeviceError(f"{_FUSERMOUNT} failed: {path}: {error.strerror}") from error
    if result.returncode != 0:
        why = os.fsdecode(result.stderr).strip().removeprefix(f"{_FUSERMOUNT}: ") or f"exit status {result.returncode}"
        raise DeviceError(f"{_FUSERMOUNT} failed: {path}: {why}")
