# SPDX-License-Identifier: Apache-2.0
"""Registries that do not deliver: whom it concerns, and what he is told."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import requires
from tests.commands import Run, Start, devices, ended, until
from tests.fakes.http_server import Answer, HttpServer, Seen
from tests.fakes.object_store import ObjectStore
from tests.registries import Registry

Registries = Callable[..., Registry]
Push = Callable[[Registry], tuple[str, Path]]

MIB = 1 << 20


@pytest.fixture
def push(tmp_path: Path, ociblk: str) -> Iterator[Push]:
    """push(registry) puts a disk of its own there, 12 MiB that no codec makes smaller: its reference, and the disk."""
    root = tmp_path / "pusher"

    def push(registry: Registry) -> tuple[str, Path]:
        disk, layer = tmp_path / f"disk-{registry.host}", tmp_path / "layer"
        disk.write_bytes(os.urandom(12 * MIB))
        reference = f"{registry.host}/app:1"
        subprocess.run([ociblk, "import", disk, "-o", layer, "--tar"], check=True)
        subprocess.run([ociblk, "push", layer, reference, "--root", root], check=True, stdout=subprocess.DEVNULL)
        layer.unlink()
        return reference, disk

    yield push
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", root], check=True)


def read(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def test_a_registry_that_stalls_delays_no_read_from_another(
    tmp_path: Path, run: Run, registries: Registries, push: Push
) -> None:
    requires.requires_mount()
    store = ObjectStore()
    give, stalled, released = store.server.answer, threading.Semaphore(0), threading.Event()
    hold = threading.Event()

    def answer(seen: Seen) -> Answer:
        if hold.is_set():
            stalled.release()
            released.wait()
        return give(seen)

    store.server.answer = answer
    stuck = registries(redirect_to=store.server.url)
    store.folder = stuck.storage
    (stuck_reference, _), (reference, disk) = push(stuck), push(registries())
    files = [tmp_path / "stuck", tmp_path / "well"]
    assert run("mount", "--raw", stuck_reference, files[0]).returncode == 0
    assert run("mount", "--raw", reference, files[1]).returncode == 0
    hold.set()
    readers = [threading.Thread(target=read, args=(files[0], 2 * MIB + place * MIB // 7, 4096)) for place in range(64)]
    try:
        for reader in readers:
            reader.start()
        for _ in range(12):  # its share is 16, and readers of neighbouring parts wait for one request together
            assert stalled.acquire(timeout=30)
        assert read(files[1], 5 * MIB, 8192) == read(disk, 5 * MIB, 8192)
        assert all(reader.is_alive() for reader in readers)
        assert [device["error"] for device in devices(run)] == ["", ""]  # no request has been given up yet
    finally:
        released.set()
        for reader in readers:
            reader.join(60)
        store.server.close()
    for file in files:
        assert run("umount", file).returncode == 0


@pytest.mark.parametrize(("status", "code"), [(404, 3), (403, 4)])
def test_a_command_says_why_a_blob_does_not_come(
    tmp_path: Path, run: Run, registry: Registry, push: Push, status: int, code: int
) -> None:
    push(registry)
    refuse = threading.Event()
    refuse.set()

    def answer(seen: Seen) -> Answer:
        if "/blobs/" in seen.path and refuse.is_set():
            return Answer(status)
        names = {name: value for name, value in seen.headers.items() if name in ("accept", "range")}
        request = urllib.request.Request(f"http://{registry.host}{seen.path}", headers=names, method=seen.method)
        with urllib.request.urlopen(request) as came:
            return Answer(came.status, dict(came.headers), came.read())

    with HttpServer(answer) as front:
        reference = f"{front.host}/app:1"

        def refused(*command: object) -> None:
            done = run(*command)
            assert done.returncode == code, done
            assert f"{front.host}/app@sha256:" in done.stderr
            assert f"answered {status}" in done.stderr

        for command in ("inspect", "verify", "pull"):
            refused(command, reference)
        refused("ls", reference, "/")
        refused("export", reference, "-o", tmp_path / "raw")
        refuse.clear()
        assert run("inspect", reference).returncode == 0
        refuse.set()
        refused("verify", reference)
        refused("export", reference, "-o", tmp_path / "raw")
        refused("pull", reference, "--complete")


@pytest.fixture
def held(registries: Registries, push: Push) -> Iterator[tuple[str, threading.Semaphore]]:
    """An image whose registry answers no request for its bytes, and what is released for each."""
    store = ObjectStore()
    give, stalled, released = store.server.answer, threading.Semaphore(0), threading.Event()

    def answer(seen: Seen) -> Answer:
        if seen.range:
            stalled.release()
            released.wait()
        return give(seen)

    store.server.answer = answer
    registry = registries(redirect_to=store.server.url)
    store.folder = registry.storage
    reference, _ = push(registry)
    yield reference, stalled
    released.set()
    store.server.close()


@pytest.mark.parametrize("command", ["inspect", "pull"])
def test_who_is_killed_while_he_waits_leaves_nothing_that_waits(
    run: Run, start: Start, held: tuple[str, threading.Semaphore], command: str
) -> None:
    reference, stalled = held
    waiting = start(command, reference, "--on-error", "hang")
    assert stalled.acquire(timeout=30)
    assert len(json.loads(run("cache", "stat", "--json").stdout)["blobs"]) == 1
    waiting.kill()  # what has nothing in it goes with its last user
    assert until(lambda: not json.loads(run("cache", "stat", "--json").stdout)["blobs"])


def test_who_waits_when_the_owner_stops_is_told(
    run: Run, start: Start, held: tuple[str, threading.Semaphore]
) -> None:
    reference, stalled = held
    waiting = start("inspect", reference, "--on-error", "hang")
    assert stalled.acquire(timeout=30)
    assert run("daemon", "--stop").returncode == 0
    code, errors = ended(waiting)
    assert (code, errors.count("\n")) == (7, 1)
    assert "the owner is stopping" in errors


def test_an_environment_as_large_as_one_can_be_is_taken(run: Run, registry: Registry, push: Push) -> None:
    reference, _ = push(registry)
    assert run("inspect", reference, **{f"LARGE_{number}": "x" * 110_000 for number in range(11)}).returncode == 0
    done = run("inspect", reference, **{f"LARGE_{number}": "\N{SNOWMAN}" * 40_000 for number in range(13)})
    assert done.returncode == 2
    assert "the environment: " in done.stderr
