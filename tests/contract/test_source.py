# SPDX-License-Identifier: Apache-2.0
"""What every Source promises (blockdev/source/__init__.py), asked of each of them alike."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.errors import SourceError
from blockdev.registry.backoff import Backoff
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from blockdev.registry.exchange import Timeouts
from blockdev.source import PROGRESS_SIZE, Source
from blockdev.source.blob import RegistryBlob
from blockdev.source.file import FileSource
from blockdev.source.retrying import Retrying, patiently
from blockdev.units import Checked
from tests.fakes.blob_server import REPOSITORY, BlobServer
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.memory_source import MemorySource
from tests.registries import Registry
from tests.small_image import SECRET, provider
from tests.tabled import tabled

CONTENT, PLACE = tabled(os.urandom((1 << 20) + 4321))
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@dataclass
class Subject:
    """A source of CONTENT, and how to put it out of order and back."""

    source: Source
    damage: Callable[[], object]
    mend: Callable[[], object]


def no_spill(offset: int, content: memoryview) -> None:
    pytest.fail("this registry knows ranges")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Subject]:
    path = tmp_path / "blob"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    source = FileSource(fd, len(CONTENT), str(path))
    yield Subject(source, lambda: os.truncate(path, 0), lambda: path.write_bytes(CONTENT))
    os.close(fd)


@pytest.fixture
def registry_blob(registry: Registry) -> Iterator[Subject]:
    client = Client(registry.host, Provider())
    client.upload(REPOSITORY, DIGEST, len(CONTENT), io.BytesIO(CONTENT))
    yield Subject(RegistryBlob(client, REPOSITORY, DIGEST, len(CONTENT), no_spill), registry.stop, registry.start)
    client.close()


@pytest.fixture
def redirected_blob() -> Iterator[Subject]:
    with BlobServer(CONTENT) as server:
        server.redirects = True
        client = Client(server.host, Provider(), timeouts=Timeouts(stall=1))

        def well(value: bool) -> Callable[[], None]:
            return lambda: setattr(server, "well", value)

        yield Subject(RegistryBlob(client, REPOSITORY, DIGEST, len(CONTENT), no_spill), well(False), well(True))
        client.close()


@pytest.fixture
def proxied_blob(registry: Registry) -> Iterator[Subject]:
    with FaultProxy(registry.host) as proxy:
        client = Client(proxy.host, Provider(), timeouts=Timeouts(stall=1))
        client.upload(REPOSITORY, DIGEST, len(CONTENT), io.BytesIO(CONTENT))
        source = RegistryBlob(client, REPOSITORY, DIGEST, len(CONTENT), no_spill)
        yield Subject(source, registry.stop, registry.start)
        client.close()


@pytest.fixture
def proxied_login_and_redirect(registry: Registry, tmp_path: Path) -> Iterator[Subject]:
    pusher = Client(registry.host, Provider())
    pusher.upload(REPOSITORY, DIGEST, len(CONTENT), io.BytesIO(CONTENT))
    pusher.close()
    with FaultProxy(registry.host, login=f"ann:{SECRET}", redirects=True) as proxy:
        client = Client(proxy.host, provider(tmp_path, proxy.host), timeouts=Timeouts(stall=1))
        source = RegistryBlob(client, REPOSITORY, DIGEST, len(CONTENT), no_spill)
        yield Subject(source, registry.stop, registry.start)
        client.close()


@pytest.fixture
def memory() -> Subject:
    source = MemorySource(CONTENT)
    return Subject(source, lambda: setattr(source, "well", False), lambda: setattr(source, "well", True))


@pytest.fixture
def retrying(memory: Subject) -> Subject:
    return Subject(Retrying(memory.source, Backoff()), memory.damage, memory.mend)


@pytest.fixture
def checked(registry_blob: Subject, tmp_path: Path) -> Iterator[Subject]:
    with ExitStack() as undo:
        engine = undo.enter_context(Engine(work_threads=1))
        entry = Cache(tmp_path / "blobs", engine).open(DIGEST, len(CONTENT), Policy("eio"), PLACE)
        undo.callback(entry.close)
        assert entry.units
        entry.units.load(registry_blob.source, soon())
        yield Subject(Checked(registry_blob.source, entry.units), registry_blob.damage, registry_blob.mend)


SUBJECTS = (
    "file",
    "registry_blob",
    "redirected_blob",
    "proxied_blob",
    "proxied_login_and_redirect",
    "memory",
    "retrying",
    "checked",
)


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Subject)
    return found


def ignore(filled: int) -> None:
    pass


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def read(source: Source, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer), deadline=soon(), progress=ignore)
    return bytes(buffer)


def test_it_has_a_name_a_host_and_the_blobs_size(subject: Subject) -> None:
    assert subject.source.name
    assert subject.source.host
    assert subject.source.size == len(CONTENT)


@pytest.mark.parametrize("offset", [0, 1, 65536, 65535, len(CONTENT) - 5000])
@pytest.mark.parametrize("length", [1, 512, 5000])
def test_a_range_is_the_range_of_the_blob(subject: Subject, offset: int, length: int) -> None:
    assert read(subject.source, offset, length) == CONTENT[offset : offset + length]


def test_the_whole_blob_is_a_range_too(subject: Subject) -> None:
    assert read(subject.source, 0, len(CONTENT)) == CONTENT


def test_nothing_but_the_buffer_is_written(subject: Subject) -> None:
    around = bytearray(b"\xa5" * 300)
    subject.source.read_into(70000, memoryview(around)[100:200], deadline=soon(), progress=ignore)
    assert around == b"\xa5" * 100 + CONTENT[70000:70100] + b"\xa5" * 100


def test_progress_tells_what_is_right_and_ends_with_all(subject: Subject) -> None:
    buffer = bytearray(700_000)
    told: list[int] = []

    def progress(filled: int) -> None:
        told.append(filled)
        assert buffer[:filled] == CONTENT[1000 : 1000 + filled]

    subject.source.read_into(1000, memoryview(buffer), deadline=soon(), progress=progress)
    assert told[-1] == len(buffer)
    steps = [after - before for before, after in zip([0, *told], told, strict=False)]
    assert all(step >= PROGRESS_SIZE for step in steps[:-1])
    assert len(told) > 1 or isinstance(subject.source, FileSource), "a reader is not kept waiting for the last byte"


def test_what_progress_raises_ends_the_read(subject: Subject) -> None:
    def progress(filled: int) -> None:
        raise KeyError(filled)

    with pytest.raises(KeyError):
        subject.source.read_into(0, memoryview(bytearray(200_000)), deadline=soon(), progress=progress)
    assert read(subject.source, 0, 10) == CONTENT[:10]


def test_many_threads_read_at_once(subject: Subject) -> None:
    wrong: list[object] = []

    def reader(number: int) -> None:
        for round in range(8):
            offset = (number * 131_071 + round * 50_000) % (len(CONTENT) - 70_000)
            if read(subject.source, offset, 70_000) != CONTENT[offset : offset + 70_000]:
                wrong.append((number, round))

    threads = [threading.Thread(target=reader, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong


def test_a_deadline_that_has_passed_is_an_error(subject: Subject) -> None:
    with pytest.raises(SourceError):
        subject.source.read_into(0, memoryview(bytearray(10)), deadline=soon(-1), progress=ignore)


def test_what_fails_is_an_error_that_trying_again_may_help(subject: Subject) -> None:
    subject.source.probe(soon())
    subject.damage()
    with pytest.raises(SourceError):
        subject.source.read_into(0, memoryview(bytearray(10)), deadline=soon(1), progress=ignore)
    with pytest.raises(SourceError):
        subject.source.probe(soon(1))
    subject.mend()
    patiently(lambda: subject.source.probe(soon()), soon())
    assert read(subject.source, 0, 10) == CONTENT[:10]
