# SPDX-License-Identifier: Apache-2.0
"""A raw disk served as a FUSE file by a process of its own, to be stopped or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockdev import mountpoint, syscalls
from blockdev.fusefile import FuseFile
from tests import leaks

SERVER = Path(__file__).with_name("fuse_server.py")
SERVER_END = 20.0  # seconds; a server under a busy test run ends in a fraction of one


@dataclass
class Served:
    """The mounted file and its server."""

    file: Path
    server: subprocess.Popen[str]

    def stop(self) -> None:
        """The server answers nothing any more, and does not die either."""
        self.server.send_signal(signal.SIGSTOP)
        os.waitpid(self.server.pid, os.WUNTRACED)

    def kill(self) -> None:
        self.server.kill()
        self.server.wait(SERVER_END)

    def wait(self) -> str:
        """The server's last words, which it says when the file is no longer mounted."""
        assert self.server.stdout
        words = self.server.stdout.read()
        self.server.wait(SERVER_END)
        return words


@contextmanager
def served_nowhere(raw: Path, folder: Path) -> Iterator[tuple[Served, FuseFile]]:
    """Serve raw as a FUSE file that is mounted nowhere. The caller closes it."""
    file = FuseFile()
    with serving(file.fuse_fd, raw, folder, file.path, "warm") as disk:
        file.passed()
        yield disk, file


@contextmanager
def served(raw: Path, folder: Path, *, how: str = "warm") -> Iterator[Served]:
    """Mount raw as folder/disk. Whatever a failing test leaves is taken away."""
    file = folder / "disk"
    file.touch()
    with mountpoint.mount_file(file) as fd:
        pass
    with serving(fd, raw, folder, file, how) as disk:
        os.close(fd)
        yield disk


@contextmanager
def serving(fd: int, raw: Path, folder: Path, file: Path, how: str) -> Iterator[Served]:
    command = [sys.executable, str(SERVER), str(fd), str(raw), how]
    server = subprocess.Popen(command, pass_fds=[fd], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        assert server.stdout.readline() == "ready\n"
        yield Served(file, server)
    finally:
        server.kill()
        server.wait(SERVER_END)
        assert server.stdout
        server.stdout.close()
        for point in leaks.mounts(folder):
            syscalls.umount(Path(point), syscalls.MNT_DETACH)
