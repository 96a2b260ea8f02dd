# SPDX-License-Identifier: Apache-2.0
"""NBD clients that misbehave hold up nobody, and whatever ends gives everything back."""

from __future__ import annotations

import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from blockdev.device import NbdTransport
from blockdev.engine import Engine, LayerKind, LayerTable
from blockdev.errors import EngineError, UsageError
from blockdev.transport import nbd
from blockdev.transport.nbd import NbdServer, tcp_uri, unix_uri
from tests import stacks
from tests.opened import opened_bytes
from tests.served import served, unix_listener

DISK = random.Random(4).randbytes(1 << 20)
LAYER = stacks.Plan(2048, ()).build()
WAIT = 60.0  # seconds for anything that must happen, on a busy machine


def eventually(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


@contextmanager
def serving(path: Path, seconds: float = 10.0, name: str = "") -> Iterator[NbdServer]:
    """A server of its own for a test that holds its clients up."""
    fd = os.memfd_create("disk")
    os.write(fd, DISK)
    with ExitStack() as stack:
        engine = stack.enter_context(Engine())
        blob = stack.enter_context(engine.open_local(fd, len(DISK)))
        os.close(fd)
        file = stack.enter_context(blob.open_raw(0, len(DISK)))
        image = stack.enter_context(engine.open_image([LayerTable(LayerKind.FLAT, file, file)], len(DISK)))
        yield stack.enter_context(served(engine, image, unix_listener(path), name=name, negotiation_seconds=seconds))


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(WAIT)
    client.connect(str(path))
    return client


def receive(client: socket.socket, length: int) -> bytes:
    """So many bytes, or fewer if the server hangs up before."""
    received = b""
    while len(received) < length and (piece := client.recv(length - len(received))):
        received += piece
    return received


def negotiate(path: Path) -> socket.socket:
    """A client in the transmission phase, by the shortest way."""
    client = connect(path)
    assert receive(client, 18).startswith(b"NBDMAGICIHAVEOPT")
    client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0")
    assert len(receive(client, 10)) == 10
    return client


def hung_up(client: socket.socket) -> bool:
    """Whether the server ends the conversation, whatever it says before."""
    with suppress(ConnectionResetError):
        while client.recv(65536):
            pass
    return True


def test_silent_clients_hold_up_nobody_and_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(path, seconds=3.0), connect(path) as silent, connect(path) as half:
        started = time.monotonic()
        half.sendall(b"\0\0\0\3IHAVEOPT\0\0")
        with negotiate(path):
            assert time.monotonic() - started < 3.0
        assert hung_up(silent)
        assert hung_up(half)
        assert time.monotonic() - started >= 2.9


def test_the_deadline_is_for_the_whole_negotiation(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(path, seconds=1.0), connect(path) as chatty:
        receive(chatty, 18)
        chatty.sendall(b"\0\0\0\3")
        deadline = time.monotonic() + WAIT
        dripping = iter(b"IHAVEOPT\0\0\0\7\0\0\x20\0" + bytes(8192))
        while not select.select([chatty], [], [], 0.05)[0]:
            assert time.monotonic() < deadline
            with suppress(BrokenPipeError):  # hung up between the two calls
                chatty.send(bytes([next(dripping)]))
        assert hung_up(chatty)


def test_more_silent_clients_than_places_only_delay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "NEGOTIATIONS_MAX", 4)
    path = tmp_path / "s"
    with serving(path, seconds=0.5), ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(connect(path))
        negotiate(path).close()


def test_connections_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "CONNECTIONS_MAX", 2)
    path = tmp_path / "s"
    with serving(path) as server:
        first, second = negotiate(path), negotiate(path)
        eventually(lambda: server.connections == 2)
        with connect(path) as third:
            assert hung_up(third)
        first.close()
        eventually(lambda: server.connections == 1)
        negotiate(path).close()
        second.close()


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\3" + bytes(16), b"", b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0"]
)
def test_strangers_are_hung_up_on(tmp_path: Path, sent: bytes) -> None:
    path = tmp_path / "s"
    with serving(path):
        with connect(path) as stranger:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            assert hung_up(stranger)
        negotiate(path).close()


def test_a_request_sent_with_the_last_option_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(path), connect(path) as client:
        request = bytes.fromhex("25609513 0000 0000 0123456789abcdef 0000000000001000 00000200")
        client.sendall(b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\0" + request)
        answered = receive(client, 18 + 10 + 16 + 512)
        assert answered[28:44] == bytes.fromhex("67446698 00000000 0123456789abcdef")
        assert answered[44:] == DISK[4096:4608]


def entries(folder: str) -> int:
    """How many descriptors ("fd") or threads ("task") this process has."""
    return len(list(Path("/proc/self", folder).iterdir()))


def test_ended_connections_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(path) as server:
        files, threads = entries("fd"), entries("task")
        for _ in range(20):
            clients = [negotiate(path) for _ in range(8)]
            for client in clients:
                client.close()
        eventually(lambda: server.connections == 0)
        assert entries("fd") == files
        eventually(lambda: entries("task") == threads)


def test_stop_hangs_up_on_everybody_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    files, threads = entries("fd"), entries("task")
    with serving(path) as server:
        clients = [negotiate(path), connect(path), negotiate(path)]
        started = time.monotonic()
        server.stop(time.monotonic() + WAIT)
        assert time.monotonic() - started < WAIT / 2
        for client in clients:
            assert hung_up(client)
            client.close()
        with pytest.raises(ConnectionRefusedError):
            connect(path)
        assert server.connections == 0
    assert entries("fd") == files
    eventually(lambda: entries("task") == threads)  # a joined thread may be seen for a moment yet


def test_names_no_client_could_ask_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="export"), serving(tmp_path / "s", name="x" * 5000):
        pass


def test_uris_are_percent_encoded() -> None:
    assert unix_uri("/run/a b/s?#%.sock") == "nbd+unix:///?socket=/run/a%20b/s%3F%23%25.sock"
    assert unix_uri("/s", "a/b ü") == "nbd+unix:///a%2Fb%20%C3%BC?socket=/s"
    assert tcp_uri("localhost", 10809, "x y") == "nbd://localhost:10809/x%20y"
    assert tcp_uri("fe80::1%eth0", 1) == "nbd://[fe80::1%25eth0]:1/"


def test_nobody_is_heard_before_its_connections_end_can_be_told(tmp_path: Path) -> None:
    with Engine() as engine, opened_bytes(engine, LAYER) as image:
        server = NbdServer(unix_listener(tmp_path / "s"), image.image)
        assert "nbd-accept" not in [thread.name for thread in threading.enumerate()]
        server.start()
        with connect(tmp_path / "s") as client:
            assert receive(client, 8) == b"NBDMAGIC"
        server.stop(time.monotonic() + WAIT)


def test_a_server_for_which_there_is_no_thread_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Engine() as engine, opened_bytes(engine, LAYER) as image:
        transport = NbdTransport(unix_listener(tmp_path / "s"), "")
        before = open_descriptors()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(EngineError, match="no thread"):
            transport.attach(image)
        assert open_descriptors() == before
        transport.detach(timeout=0)
