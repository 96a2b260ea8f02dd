# SPDX-License-Identifier: Apache-2.0
"""The servers of a bench, as context managers: ours, nbdkit, qemu-nbd, and what lies under them.

Each gives something with a place to read from and the pids that serve it, so that a row
can say what a byte cost in processor time and not only how fast it came.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_WAIT = 30.0  # seconds until a server must accept connections
STOP_WAIT = 15.0  # seconds it may take to leave
CPUCLOCK_SCHED = 2  # of the kernel's clock numbers: time on a processor, user and system


@dataclass(frozen=True)
class Served:
    """Where to read, and who does the work."""

    address: str  # an NBD URI, a path, or a host:port
    pids: tuple[int, ...]

    def cpu_seconds(self) -> float:
        """Processor time all serving processes have used so far."""
        return sum(cpu_seconds(pid) for pid in self.pids)


def cpu_seconds(pid: int) -> float:
    """Processor time a process has used so far."""
    # The process's own clock (clock_getcpuclockid(3)): all threads, ended ones too, in nanoseconds.
    return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)


def wait_until(ready: object, what: str, timeout: float = START_WAIT) -> None:
    """Poll a callable until it says yes."""
    deadline = time.monotonic() + timeout
    while not ready():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not ready within {timeout:.0f} s")
        time.sleep(0.01)


def _connects(family: socket.AddressFamily, address: object) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(address) == 0  # type: ignore[arg-type]


@contextmanager
def running(command: list[str | Path], log: Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    with log.open("a") as errors:
        process = subprocess.Popen(command, stderr=errors, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@contextmanager
def nbdkit(folder: Path, *plugin: str) -> Iterator[Served]:
    """nbdkit with a plugin and its parameters, read-only, as it comes."""
    sock = folder / "nbdkit.sock"
    sock.unlink(missing_ok=True)
    with running(["nbdkit", "-f", "-r", "-U", str(sock), *plugin], folder / "log") as process:
        wait_until(lambda: sock.exists() and _connects(socket.AF_UNIX, str(sock)), "nbdkit")
        yield Served(f"nbd+unix:///?socket={sock}", (process.pid,))


@contextmanager
def qemu_nbd(folder: Path, qcow2: Path) -> Iterator[Served]:
    """qemu-nbd on a qcow2 file, read-only, for eight connections."""
    sock = folder / "qemu.sock"
    command = ["qemu-nbd", "-r", "-t", "-f", "qcow2", "--shared=8", "-k", str(sock), str(qcow2)]
    with running(command, folder / "log") as process:
        wait_until(lambda: sock.exists() and _connects(socket.AF_UNIX, str(sock)), "qemu-nbd")
        yield Served(f"nbd+unix:///?socket={sock}", (process.pid,))


@contextmanager
def nbdfuse(folder: Path, uri: str, server: Served) -> Iterator[Served]:
    """libnbd's FUSE file over an NBD server."""
    file = folder / "nbdfuse"
    file.touch()
    with running(["nbdfuse", "-r", "-C", "4", str(file), uri], folder / "log") as process:
        wait_until(lambda: file.stat().st_dev != folder.stat().st_dev, "nbdfuse")
        try:
            yield Served(str(file), (*server.pids, process.pid))
        finally:
            subprocess.run(["umount", file], check=True)


class Ociblk:
    """Our command under one root."""

    def __init__(self, command: str, root: Path) -> None:
        self.command = command
        self.root = root
        self.environment = os.environ | {"OCIBLK_ROOT": str(root)}

    def run(self, *arguments: str | Path) -> str:
        command = [self.command, *map(str, arguments)]
        return subprocess.run(command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def owner(self) -> int:
        """The owner's pid, as its lock file gives it."""
        return int((self.root / "lock").read_text().split()[1])

    def wipe(self) -> None:
        """Stop the owner and forget everything it had cached."""
        self.run("daemon", "--stop", "--force")
        shutil.rmtree(self.root, ignore_errors=True)

    @contextmanager
    def serve(self, image: str | Path, sock: Path) -> Iterator[Served]:
        command = [self.command, "serve", str(image), "--socket", str(sock)]
        log = sock.with_suffix(".log")
        with running(command, log, env=self.environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            if not uri:
                raise RuntimeError(f"ociblk serve {image}: {log.read_text().strip()}")
            yield Served(uri, (self.owner(),))

    @contextmanager
    def mount_raw(self, image: str | Path, file: Path) -> Iterator[Served]:
        file.touch()
        self.run("mount", "--raw", image, file)
        try:
            yield Served(str(file), (self.owner(),))
        finally:
            self.run("umount", file)

    @contextmanager
    def mount(self, image: str, point: Path) -> Iterator[Served]:
        point.mkdir(exist_ok=True)
        self.run("mount", image, point)
        try:
            yield Served(str(point), (self.owner(),))
        finally:
            self.run("umount", point)


@contextmanager
def loop_mount(file: Served, point: Path) -> Iterator[Served]:
    """A file system in a served file, by a loop device with direct I/O. The loop device's own
    kernel threads are nobody's processor time."""
    point.mkdir(exist_ok=True)
    command = ["losetup", "--find", "--show", "--read-only", "--direct-io=on", file.address]
    device = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        subprocess.run(["mount", "-o", "ro", device, point], check=True)
        try:
            yield Served(str(point), file.pids)
        finally:
            subprocess.run(["umount", point], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
