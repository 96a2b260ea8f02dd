# SPDX-License-Identifier: Apache-2.0
"""A device's states: attached once, drained once, closed with all it owns."""

from __future__ import annotations

import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.device import Device, NbdTransport, State
from blockdev.engine import Engine
from blockdev.errors import DeviceError, EngineError, SourceError
from blockdev.image import OpenImage
from blockdev.origin import locate
from blockdev.stack import Stack, open_local
from blockdev.transport.fuse import FuseTransport

LAYER = Path(__file__).parent.parent / "data" / "d-l0.lsmt"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(work_threads=1) as engine:
        yield engine


@pytest.fixture
def stack(engine: Engine) -> Iterator[Stack]:
    with locate(str(LAYER)) as origin, open_local(engine, origin) as stack:
        yield stack


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


class Refusing:
    """A transport whose kernel says no."""

    name = "refusing"

    def __init__(self) -> None:
        self.detached = 0

    def attach(self, image: OpenImage) -> None:
        raise SourceError("attaching failed: kernel: no")

    def detach(self, *, timeout: float) -> None:
        self.detached += 1


def test_a_device_goes_from_attaching_to_live_to_gone(stack: Stack) -> None:
    gone: list[Device] = []
    device = Device(7, stack, gone.append)
    assert device.state is State.ATTACHING
    listener = listening()
    address = listener.getsockname()
    device.attach(NbdTransport(listener, "name"))
    assert device.state is State.LIVE
    with socket.create_connection(address, timeout=5) as client:
        assert client.recv(8) == b"NBDMAGIC"
    device.drain(1)
    assert device.state is State.GONE
    assert gone == [device]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    assert stack.stats() == []


def test_draining_again_does_nothing(stack: Stack) -> None:
    gone: list[Device] = []
    device = Device(1, stack, gone.append)
    device.attach(NbdTransport(listening(), ""))
    drains = [threading.Thread(target=device.drain, args=(1,)) for _ in range(4)]
    for drain in drains:
        drain.start()
    for drain in drains:
        drain.join()
    assert gone == [device]


def test_a_drain_that_meets_another_waits_for_it(stack: Stack) -> None:
    events: list[str] = []
    first_drains, go_on = threading.Event(), threading.Event()

    class Slow(Refusing):
        def attach(self, image: OpenImage) -> None:
            pass

        def detach(self, *, timeout: float) -> None:
            first_drains.set()
            go_on.wait()

    device = Device(1, stack, lambda _: events.append("gone"))
    device.attach(Slow())

    def second() -> None:
        device.drain(0)
        events.append("drained")

    drains = [threading.Thread(target=device.drain, args=(0,)), threading.Thread(target=second)]
    drains[0].start()
    first_drains.wait()
    drains[1].start()
    drains[1].join(0.2)
    go_on.set()
    for drain in drains:
        drain.join()
    assert events == ["gone", "drained"]


def test_a_device_that_never_attached_is_just_closed(stack: Stack) -> None:
    gone: list[Device] = []
    device = Device(1, stack, gone.append)
    device.drain(1)
    assert (device.state, gone) == (State.GONE, [device])


def test_a_transport_that_cannot_attach_leaves_nothing(stack: Stack) -> None:
    gone: list[Device] = []
    device = Device(1, stack, gone.append)
    transport = Refusing()
    with pytest.raises(SourceError, match="kernel"):
        device.attach(transport)
    assert (device.state, gone, transport.detached) == (State.GONE, [device], 1)
    assert stack.stats() == []


def test_a_fuse_file_that_cannot_be_served_is_closed(stack: Stack) -> None:
    read, write = os.pipe()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    transport = FuseTransport(write, id=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            Device(1, stack, lambda _: None).attach(transport)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.read(read, 1) == b""
    os.close(read)


def test_a_second_attach_is_refused(stack: Stack) -> None:
    device = Device(1, stack, lambda _: None)
    device.attach(NbdTransport(listening(), ""))
    other = listening()
    with pytest.raises(EngineError, match="live"):
        device.attach(NbdTransport(other, ""))
    assert other.fileno() == -1
    device.drain(1)
    transport = Refusing()
    with pytest.raises(EngineError, match="gone"):
        device.attach(transport)
    assert transport.detached == 1


def test_a_device_drained_while_it_attaches_does_not_become_live(stack: Stack) -> None:
    device = Device(1, stack, lambda _: None)

    class Slow(Refusing):
        def attach(self, image: OpenImage) -> None:
            device.drain(0)  # as the main thread does on SIGTERM

    transport = Slow()
    with pytest.raises(DeviceError, match="meanwhile"):
        device.attach(transport)
    assert device.state is State.GONE
    assert transport.detached


def test_a_device_describes_itself_in_every_state(stack: Stack) -> None:
    device = Device(3, stack, lambda _: None)
    assert device.describe()["state"] == "attaching"
    device.attach(NbdTransport(listening(), ""))
    found = device.describe()
    assert (found["front_end"], found["mode"], found["size"]) == ("nbd", "local", stack.image.size)
    assert found["local_bytes"] == found["blob_bytes"] == LAYER.stat().st_size
    device.drain(1)
    assert device.describe()["state"] == "gone"
