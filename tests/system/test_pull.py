# SPDX-License-Identifier: Apache-2.0
"""ociblk pull: all of an image, beside its readers, once; cut off and gone on with; refused when wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdev.engine import EXTENT_SIZE
from blockdev.root import Root
from tests import requires
from tests.commands import Run, Start, devices, ended, owner_pid, until, uri_of
from tests.fakes.http_server import Answer, Seen
from tests.fakes.object_store import ObjectStore
from tests.registries import Registry

MIB = 1 << 20
DISK = 32 * MIB
HELD = 8 * MIB  # what a held store lets through


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory, ociblk: str) -> list[Path]:
    """Two layers of one disk, that no codec makes smaller."""
    folder = tmp_path_factory.mktemp("layers")
    made = []
    for number, (start, length) in enumerate(((0, 20 * MIB), (16 * MIB, 10 * MIB))):
        disk, layer = folder / "disk", folder / f"layer-{number}"
        with open(disk, "wb") as file:
            file.truncate(DISK)
            os.pwrite(file.fileno(), os.urandom(length), start)
        subprocess.run([ociblk, "import", disk, "-o", layer, "--tar"], check=True)
        disk.unlink()
        made.append(layer)
    return made


@pytest.fixture
def pusher(tmp_path: Path, ociblk: str, layers: list[Path]) -> Iterator[Callable[[Registry], str]]:
    """push(registry) puts the layers there, from a root of its own, and returns the reference."""
    root = tmp_path / "pusher"

    def push(registry: Registry) -> str:
        reference = f"{registry.host}/app:1"
        command = [ociblk, "push", *layers, reference, "--root", root]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return reference

    yield push
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", root], check=True)


class HeldStore(ObjectStore):
    """Gives out HELD bytes of blobs or little more, and the rest once it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.given = 0  # bytes of ranges that were let through
        self.waiting = threading.Semaphore(0)
        self._opened = threading.Event()
        self._lock = threading.Lock()
        plain = self.server.answer

        def answer(seen: Seen) -> Answer:
            found = plain(seen)
            if not seen.range:  # an image's config
                return found
            with self._lock:
                held = self.given >= HELD and not self._opened.is_set()
                if not held:
                    self.given += len(found.body)
            if held:
                self.waiting.release()
                self._opened.wait()
                with self._lock:
                    self.given += len(found.body)
            return found

        self.server.answer = answer

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def held() -> Iterator[HeldStore]:
    store = HeldStore()
    yield store
    store.open()
    store.server.close()


@pytest.fixture
def held_reference(held: HeldStore, registries: Callable[..., Registry], pusher: Callable[[Registry], str]) -> str:
    registry = registries(redirect_to=held.server.url)
    held.folder = registry.storage
    return pusher(registry)


def in_cache(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("cache", "stat", "--json").stdout)["blobs"]
    return found


def present(run: Run) -> int:
    return sum(blob["present"] for blob in in_cache(run))


def pulled(run: Run, reference: str, *more: str) -> dict[str, Any]:
    done = run("pull", reference, "--complete", "--json", *more)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def asked_of(registry: Registry, result: dict[str, Any]) -> dict[str, int]:
    return {blob["digest"]: sum(registry.ranges(blob["digest"])) for blob in result["blobs"]}


# ---- all of it, once ----


def test_a_complete_pull_asks_for_every_byte_once_and_verifies_it(
    tmp_path: Path, run: Run, registry: Registry, pusher: Callable[[Registry], str], layers: list[Path]
) -> None:
    reference = pusher(registry)
    result = pulled(run, reference)
    sizes = {blob["digest"]: blob["size"] for blob in result["blobs"]}
    assert sorted(sizes.values()) == sorted(layer.stat().st_size for layer in layers)
    assert asked_of(registry, result) == sizes
    assert (result["v"], result["complete"], result["verified"]) == (1, True, True)
    assert result["bytes"] == result["present"] == result["fetched"] == sum(sizes.values())
    assert all(blob["verified"] for blob in in_cache(run))
    again = pulled(run, reference)
    assert (again["fetched"], again["verified"]) == (0, True)
    assert run("export", reference, "-o", tmp_path / "raw").returncode == 0
    assert asked_of(registry, result) == sizes


def test_a_pull_that_is_not_complete_takes_what_opening_takes(
    tmp_path: Path, run: Run, registry: Registry, pusher: Callable[[Registry], str]
) -> None:
    reference = pusher(registry)
    result = json.loads(run("pull", reference, "--json").stdout)
    assert not result["complete"]
    assert 0 < result["fetched"] < result["bytes"] / 4
    asked = asked_of(registry, result)
    assert run("inspect", reference).returncode == 0
    assert asked_of(registry, result) == asked


def test_a_pull_and_two_readers_ask_for_the_image_once(
    tmp_path: Path, run: Run, start: Start, registry: Registry, pusher: Callable[[Registry], str]
) -> None:
    requires.requires_command("nbdcopy")
    reference = pusher(registry)
    serving = [start("serve", reference, "--socket", tmp_path / str(number)) for number in range(2)]
    uris = [uri_of(server) for server in serving]
    pull = start("pull", reference, "--complete", "--json")
    copies = [subprocess.Popen(["nbdcopy", uri, tmp_path / f"copy-{number}"]) for number, uri in enumerate(uris)]
    assert [copy.wait(60) for copy in copies] == [0, 0]
    output, errors = pull.communicate(timeout=60)
    assert (pull.returncode, errors) == (0, "")
    assert (tmp_path / "copy-0").read_bytes() == (tmp_path / "copy-1").read_bytes()
    result = json.loads(output)
    sizes = {blob["digest"]: blob["size"] for blob in result["blobs"]}
    for digest, asked in asked_of(registry, result).items():
        assert abs(asked - sizes[digest]) <= 3 * EXTENT_SIZE  # one for each stream
        assert registry.whole_gets(digest) == 0
    assert {device["mode"] for device in devices(run)} == {"local"}


# ---- cut off ----


def test_a_pull_whose_owner_was_killed_goes_on_where_it_was(
    run: Run, start: Start, root: Root, held: HeldStore, held_reference: str
) -> None:
    cut = start("pull", held_reference, "--complete")
    assert held.waiting.acquire(timeout=20)
    assert until(lambda: present(run) == held.given)
    os.kill(owner_pid(root), signal.SIGKILL)
    code, errors = ended(cut)
    assert (code, errors.count("\n")) == (7, 1)
    had = held.given
    held.open()
    result = pulled(run, held_reference)
    assert result["fetched"] == result["bytes"] - had
    assert result["verified"]


def test_an_interrupted_pull_leaves_what_it_has_and_nothing_else(
    run: Run, start: Start, held: HeldStore, held_reference: str
) -> None:
    cut = start("pull", held_reference, "--complete")
    assert held.waiting.acquire(timeout=20)
    assert until(lambda: present(run) == held.given)
    had = held.given
    cut.send_signal(signal.SIGINT)
    assert ended(cut) == (130, "")
    assert until(lambda: not any(blob["in_use"] for blob in in_cache(run)))
    held.open()
    result = pulled(run, held_reference)
    assert result["verified"]
    # What was on its way when it was cut off may have come after all.
    assert had <= result["bytes"] - result["fetched"]


def test_an_owner_that_is_stopped_ends_its_pulls(run: Run, start: Start, held: HeldStore, held_reference: str) -> None:
    cut = start("pull", held_reference, "--complete", "--on-error", "hang")
    assert held.waiting.acquire(timeout=20)
    assert run("daemon", "--stop", "--force").returncode == 0
    code, errors = ended(cut)
    assert (code, errors.count("\n")) == (7, 1)


# ---- refused ----


def test_a_wrong_digest_is_refused_and_its_blob_dropped(
    run: Run, registry: Registry, pusher: Callable[[Registry], str], layers: list[Path]
) -> None:
    reference = pusher(registry)
    wrong = next(path for path in registry.storage.rglob("data") if path.stat().st_size == layers[0].stat().st_size)
    with open(wrong, "r+b") as file:
        os.pwrite(file.fileno(), b"wrong", 5 * MIB)
    refused = run("pull", reference, "--complete")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (5, "", 1)
    digest = f"sha256:{wrong.parent.name}"
    assert digest in refused.stderr
    assert digest not in [blob["digest"] for blob in in_cache(run)]


def test_a_registry_that_goes_is_waited_for_as_told(
    run: Run, start: Start, registries: Callable[..., Registry], held: HeldStore, pusher: Callable[[Registry], str]
) -> None:
    registry = registries(redirect_to=held.server.url)
    held.folder = registry.storage
    reference = pusher(registry)
    waiting = start("pull", reference, "--complete", "--on-error", "eio:1s")
    assert held.waiting.acquire(timeout=20)
    registry.stop()
    held.server.close()
    code, errors = ended(waiting)
    assert (code, errors.count("\n")) == (6, 1)
    assert registry.host in errors


def test_a_blob_that_is_not_there_is_no_matter_of_waiting(
    run: Run, registry: Registry, pusher: Callable[[Registry], str], layers: list[Path]
) -> None:
    reference = pusher(registry)
    for path in registry.storage.rglob("data"):
        if path.stat().st_size == layers[1].stat().st_size:
            path.unlink()
    refused = run("pull", reference, "--complete", "--on-error", "hang")
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)


def test_a_full_disk_is_no_success(
    run: Run, root: Root, registry: Registry, pusher: Callable[[Registry], str]
) -> None:
    requires.requires_root()
    reference = pusher(registry)
    root.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", root.path], check=True)
    try:
        refused = run("pull", reference, "--complete", "--on-error", "hang")
        assert (refused.returncode, refused.stderr.count("\n")) == (8, 1)
        assert "No space left" in refused.stderr
    finally:
        run("daemon", "--stop", "--force")
        subprocess.run(["umount", "--lazy", root.path], check=True)


def test_an_image_in_files_is_not_pulled(run: Run, layers: list[Path]) -> None:
    refused = run("pull", layers[0])
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "cache add" in refused.stderr
