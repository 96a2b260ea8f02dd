# SPDX-License-Identifier: Apache-2.0
"""Hostile clients at the sockets of a real owner: NBD and control. Afterwards it serves
the right bytes, has nothing left over of theirs, and took no more memory than it may.

Usually some hundred clients; under --full ten CPU-minutes of the owner's for each socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import selectors
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from blockdev import control
from blockdev.fetch.pool import THREADS
from blockdev.root import Root
from tests.commands import Run, Start, owner_pid, until, uri_of
from tests.fuzz import streams
from tests.requires import FULL, requires_command, scaled

CLIENTS = 300
CLIENTS_AT_ONCE = 6
CPU_SECONDS = 600.0
MEMORY_KIB_MAX = 256 << 10
DISK = 3 << 20
PATIENCE = 30.0  # seconds that a client waits for anything
RECEIVED_MAX = 8 << 20  # bytes after which a client has seen enough

Made = tuple[int, socket.socket, bytes, list[int]]


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    random = Random(7)
    content = bytearray(DISK)
    for offset in range(0, DISK, 256 << 10):
        content[offset : offset + 70_000] = random.randbytes(70_000)
    return bytes(content)


@pytest.fixture
def layer(tmp_path: Path, disk: bytes, ociblk: str) -> Path:
    raw, layer = tmp_path / "disk", tmp_path / "disk.layer"
    raw.write_bytes(disk)
    subprocess.run([ociblk, "import", raw, "-o", layer], check=True)
    return layer


class Owner:
    """What the owner's process holds, as /proc tells."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")

    def cpu_seconds(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def held(self) -> tuple[int, int]:
        """Descriptors and threads."""
        return len(list((self._proc / "fd").iterdir())), len(list((self._proc / "task").iterdir()))

    def gave_back(self, before: tuple[int, int]) -> bool:
        """Whether nothing is held that was not before.

        But for what the first blob of a registry starts: the fetch threads, their probe, the verifier.
        """
        descriptors, threads = self.held()
        return descriptors <= before[0] and threads <= before[1] + THREADS + 2

    def describe(self) -> str:
        links = [str(entry.readlink()) for entry in (self._proc / "fd").iterdir()]
        threads = [(task / "comm").read_text().strip() for task in (self._proc / "task").iterdir()]
        return f"{self.held()} descriptors and threads: {' '.join(sorted(links + threads))}"

    def peak_kib(self) -> int:
        status = (self._proc / "status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])


class Client:
    """One hostile client: sends its stream in pieces, reads now and then or never, and hangs up somehow."""

    def __init__(self, random: Random, sock: socket.socket, stream: bytes, descriptors: list[int]) -> None:
        self.socket = sock
        self._random = random
        self._left = stream
        self._descriptors = descriptors
        self._piece = random.choice((1, 7, 28, 4096))
        self._reads = random.randrange(3) > 0
        self._received = 0
        self._abrupt = random.randrange(4) == 0
        self._said_all = False
        sock.setblocking(False)

    def advance(self) -> bool:
        """Do something that does not wait; False when this client is done."""
        try:
            if self._left:
                self._send()
            if not self._left and not self._said_all:  # at once, where its stream is empty
                if self._abrupt:
                    return False
                self.socket.shutdown(socket.SHUT_WR)
                self._said_all = True
            if self._reads or not self._left:
                taken = self.socket.recv(65536)
                self._received += len(taken)
                return bool(taken) and self._received < RECEIVED_MAX
        except BlockingIOError:
            return not (self._left and self._random.randrange(200) == 0)  # tired of waiting
        except OSError:
            return False  # hung up on
        return True

    def _send(self) -> None:
        piece = self._left[: self._piece]
        if self._descriptors:
            sent = socket.send_fds(self.socket, [piece], self._descriptors)
            self._descriptors = []
        else:
            sent = self.socket.send(piece)
        self._left = self._left[sent:]


def crowd(made: Iterator[Client]) -> int:
    """Let the clients run, CLIENTS_AT_ONCE of them side by side; how many there were."""
    count = 0
    with selectors.DefaultSelector() as selector:
        for client in made:
            count += 1
            selector.register(client.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, client)
            while len(selector.get_map()) >= CLIENTS_AT_ONCE:
                _turn(selector)
        while selector.get_map():
            _turn(selector)
    return count


def _turn(selector: selectors.BaseSelector) -> None:
    ready = selector.select(PATIENCE)
    assert ready, "a client waits for ever"
    for key, _ in ready:
        if not key.data.advance():
            selector.unregister(key.fileobj)
            key.data.socket.close()


def clients(owner: Owner, make: Callable[[Random], Client]) -> Iterator[Client]:
    """By number, usually; under --full until the owner has worked for CPU_SECONDS."""
    seed = 0
    until_cpu = owner.cpu_seconds() + CPU_SECONDS
    while owner.cpu_seconds() < until_cpu if FULL else seed < scaled(CLIENTS, 0):
        seed += 1
        yield make(Random(seed))


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    with control.address_of(path) as address:
        sock.connect(address)
    return sock


def complaints(root: Root) -> list[str]:
    """What the owner's log has that no client may cause."""
    return [line for line in root.log.read_text().splitlines() if "defect" in line or "Traceback" in line]


def reads_right(uri: str, disk: bytes) -> bool:
    done = subprocess.run(["nbdcopy", uri, "-"], capture_output=True, check=True, timeout=PATIENCE)
    return hashlib.sha256(done.stdout).digest() == hashlib.sha256(disk).digest()


@pytest.mark.timeout(7200 if FULL else 300)
def test_nbd_clients_of_any_kind_leave_a_server_that_serves(
    tmp_path: Path, disk: bytes, layer: Path, root: Root, run: Run, start: Start, record_measured: Callable[..., None]
) -> None:
    requires_command("nbdcopy")
    place = tmp_path / "s"
    uri = uri_of(start("serve", layer, "--socket", place))
    owner = Owner(owner_pid(root))
    assert reads_right(uri, disk)
    before = owner.held()

    count = crowd(clients(owner, lambda random: Client(random, connected(place), streams.nbd(random, DISK), [])))

    assert reads_right(uri, disk)
    assert until(lambda: owner.gave_back(before)), f"{owner.describe()}, {before} before"
    assert owner.peak_kib() <= MEMORY_KIB_MAX
    assert complaints(root) == []
    _record(record_measured, "live-nbd", owner, count)


@pytest.mark.timeout(7200 if FULL else 300)
def test_callers_of_any_kind_leave_an_owner_that_works(
    tmp_path: Path, disk: bytes, layer: Path, root: Root, run: Run, start: Start, record_measured: Callable[..., None]
) -> None:
    requires_command("nbdcopy")
    uri = uri_of(start("serve", layer, "--socket", tmp_path / "s"))
    owner = Owner(owner_pid(root))
    assert reads_right(uri, disk)
    before = owner.held()
    size = layer.stat().st_size

    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
        passed = [opened.enter_context(layer.open("rb")).fileno(), listener.fileno()]

        def make(random: Random) -> Client:
            given = [random.choice(passed) for _ in range(random.choice((0, 1, 2, 3, 200)))]
            return Client(random, connected(root.socket), streams.control(random, size, len(given)), given)

        count = crowd(clients(owner, make))

    assert run("ps").returncode == 0
    assert reads_right(uri, disk)
    assert until(lambda: owner.gave_back(before)), f"{owner.describe()}, {before} before"
    assert owner.peak_kib() <= MEMORY_KIB_MAX
    assert complaints(root) == []
    _record(record_measured, "live-control", owner, count)


def _record(record_measured: Callable[..., None], name: str, owner: Owner, count: int) -> None:
    if FULL:
        figures = {"cpu_seconds": round(owner.cpu_seconds()), "inputs": count, "peak_mib": owner.peak_kib() >> 10}
        record_measured(f"fuzz-{name}", {**figures, "findings": 0})
