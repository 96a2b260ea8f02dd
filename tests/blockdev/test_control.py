# SPDX-License-Identifier: Apache-2.0
"""The control socket's codec: objects and descriptors arrive together, junk is refused."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import control
from blockdev.control import Channel
from blockdev.errors import AccessDenied, CorruptImage, DeviceError, EngineError, NotFound, UsageError


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(sock) for sock in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A bare socket to say anything on, and the channel that hears it."""
    left, right = socket.socketpair()
    channel = Channel(right)
    yield left, channel
    left.close()
    channel.close()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_object_arrives_with_its_descriptors_in_order(pair: tuple[Channel, Channel], tmp_path: Path) -> None:
    left, right = pair
    files = []
    for number in range(3):
        path = tmp_path / str(number)
        path.write_text(str(number))
        files.append(os.open(path, os.O_RDONLY))
    left.send({"op": "first"})
    left.send({"op": "second"}, files[:1])
    left.send({"op": "third"}, files[1:])
    left.send({"op": "fourth"})
    seen = []
    for _ in range(4):
        message = right.receive(timeout=5)
        assert message is not None
        seen.append((message.body["op"], [os.pread(fd, 9, 0) for fd in message.descriptors]))
        assert not any(os.get_inheritable(fd) for fd in message.descriptors)
        message.close()
    for fd in files:
        os.close(fd)
    assert seen == [("first", []), ("second", [b"0"]), ("third", [b"1", b"2"]), ("fourth", [])]


def test_more_descriptors_than_one_message_carries_arrive(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    read, write = os.pipe()
    before = open_descriptors()
    sender = threading.Thread(target=left.send, args=({"op": "many", "pad": "x" * 300_000}, [read] * 600))
    sender.start()
    message = right.receive(timeout=5)
    sender.join()
    assert message is not None
    assert len(message.descriptors) == 600
    message.close()
    assert open_descriptors() == before
    os.close(read)
    os.close(write)


def test_a_peer_that_hangs_up_is_none(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    left.close()
    assert right.receive(timeout=5) is None


def test_half_an_object_is_none(raw: tuple[socket.socket, Channel]) -> None:
    sock, channel = raw
    sock.sendall(b'{"v":1,')
    sock.close()
    assert channel.receive(timeout=5) is None


def test_silence_times_out(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        pair[0].receive(timeout=0.01)


def test_hang_up_ends_a_waiting_receive(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    got: list[object] = []
    waiter = threading.Thread(target=lambda: got.append(left.receive()))
    waiter.start()
    left.hang_up()
    waiter.join(5)
    assert got == [None]
    left.send({"still": "works"})
    message = right.receive(timeout=5)
    assert message is not None
    assert message.body == {"v": 1, "still": "works"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"hello\n", "hello"),
        (b"[1]\n", "not an object"),
        (b"{}\n", "version None"),
        (b'{"v":2,"op":"x"}\n', "version 2"),
        (b'{"v":1,"fds":1}\n', "0 came"),
        (b'{"v":1,"fds":-1}\n', "-1"),
        (b'{"v":1,"fds":"x"}\n', "x"),
        (b"\xff\xfe\n", "reading"),
        (b"[" * 100_000 + b"\n", "reading"),
    ],
)
def test_what_is_no_object_of_ours_is_refused(raw: tuple[socket.socket, Channel], line: bytes, why: str) -> None:
    sock, channel = raw
    sock.sendall(line)
    with pytest.raises(DeviceError, match=why):
        channel.receive(timeout=5)


def test_a_line_without_end_is_refused(raw: tuple[socket.socket, Channel]) -> None:
    sock, channel = raw

    def flood() -> None:
        with pytest.raises(OSError, match=r"."):
            sock.sendall(b"x" * (control.LINE_MAX * 2))

    flooder = threading.Thread(target=flood)
    flooder.start()
    with pytest.raises(DeviceError, match="no end of line"):
        channel.receive(timeout=30)
    channel.close()
    flooder.join()


def test_descriptors_nobody_claims_are_closed_with_the_channel(raw: tuple[socket.socket, Channel]) -> None:
    sock, channel = raw
    before = open_descriptors()
    sock.sendmsg([b'{"v":1}\n'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
    message = channel.receive(timeout=5)
    assert message is not None
    assert message.descriptors == []
    assert open_descriptors() == before + 3
    channel.close()
    assert open_descriptors() == before - 1


@pytest.mark.parametrize("kind", [NotFound, CorruptImage, DeviceError])
def test_an_error_is_the_same_class_on_the_other_side(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^a: b: c$"):
        control.raise_error(control.error_body(kind("a: b: c")))  # type: ignore[arg-type]


def test_an_error_class_of_tomorrow_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="later"):
        control.raise_error({"error": {"class": "NotInvented", "message": "later"}})


@pytest.mark.parametrize("length", [20, 106, 107, 108, 180, 250])
def test_a_socket_path_of_any_length_works(tmp_path: Path, length: int) -> None:
    directory = tmp_path
    while len(str(directory)) < length - 60:
        directory /= "d" * 40
    directory.mkdir(parents=True, exist_ok=True)
    name = "s" * max(1, length - len(str(directory)) - 1)
    path = directory / name
    with control.listen(path) as listener:
        client = control.connect(path, timeout=5)
        sock, _ = listener.accept()
        control.check_peer(sock)
        server = Channel(sock)
        server.send({"hello": True})
        assert client.receive(timeout=5) is not None
        server.close()
        client.close()


def test_nobody_listening_is_told_from_nobody_there(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(FileNotFoundError):
        control.connect(path, timeout=1)
    control.listen(path).close()
    with pytest.raises(ConnectionRefusedError):
        control.connect(path, timeout=1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_peer_of_another_uid_is_refused() -> None:
    os.seteuid(65534)
    try:
        left, right = socket.socketpair()
    finally:
        os.seteuid(0)
    with left, right, pytest.raises(AccessDenied, match="65534"):
        control.check_peer(left)


@pytest.mark.parametrize("body", [{}, {"a": 1}, {"a": None}, {"a": True}, [], "a", None])
def test_a_member_that_is_missing_or_of_another_kind_is_refused(body: object) -> None:
    with pytest.raises(UsageError, match="a: str wanted"):
        control.member(body, "a", str)


def test_a_true_is_no_number() -> None:
    assert control.member({"a": 1}, "a", int) == 1
    with pytest.raises(UsageError):
        control.member({"a": True}, "a", int)
