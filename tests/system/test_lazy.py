# SPDX-License-Identifier: Apache-2.0
"""Images of a real registry through the commands: what is fetched, kept, and survived; who is let in."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdev.root import Root
from tests import requires
from tests.authority import Authority
from tests.commands import Run, Start, devices, ended, owner_pid, until, uri_of
from tests.fakes.object_store import ObjectStore
from tests.fakes.token_server import TokenServer
from tests.registries import Registry

Registries = Callable[..., Registry]

MIB = 1 << 20
SECRET = "Pa55:word-and-more"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 MiB that no codec makes smaller, with a hole in the middle."""
    path = tmp_path_factory.mktemp("disk") / "disk"
    with open(path, "wb") as file:
        file.write(os.urandom(12 * MIB))
        file.seek(20 * MIB)
        file.write(os.urandom(4 * MIB))
    return path


@pytest.fixture(scope="module")
def layer(disk: Path, ociblk: str) -> Path:
    path = disk.with_name("layer")
    subprocess.run([ociblk, "import", disk, "-o", path, "--tar"], check=True)
    return path


@pytest.fixture
def pusher(tmp_path: Path, ociblk: str, layer: Path) -> Iterator[Callable[..., str]]:
    """push(registry) puts the layer there, from a root of its own, and returns the reference."""
    root = tmp_path / "pusher"

    def push(registry: Registry, *options: str, **environment: str) -> str:
        reference = f"{registry.host}/app:1"
        command = [ociblk, "push", str(layer), reference, "--root", str(root), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environment})
        return reference

    yield push
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", str(root)], check=True)


def blob_of(run: Run) -> dict[str, Any]:
    (device,) = devices(run)
    (blob,) = device["blobs"]
    found: dict[str, Any] = blob
    return found


def read(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


# ---- fetched once, and only what is read ----


def test_what_is_read_is_fetched_once_and_nothing_else(
    tmp_path: Path, run: Run, start: Start, registry: Registry, pusher: Callable[..., str], disk: Path
) -> None:
    requires.requires_mount()
    reference = pusher(registry)
    file = tmp_path / "file"
    assert run("mount", "--raw", reference, file).returncode == 0
    digest = blob_of(run)["name"]
    assert read(file, 5 * MIB, 8192) == read(disk, 5 * MIB, 8192)
    (device,) = devices(run)
    assert (device["mode"], registry.whole_gets(digest)) == ("lazy", 0)
    assert sum(registry.ranges(digest)) < device["blob_bytes"] / 3
    asked = len(registry.ranges(digest))
    assert run("umount", file).returncode == 0
    assert run("mount", "--raw", reference, file).returncode == 0
    assert read(file, 5 * MIB, 8192) == read(disk, 5 * MIB, 8192)
    assert len(registry.ranges(digest)) == asked
    assert run("umount", file).returncode == 0


def test_an_image_read_to_its_end_is_verified_and_asks_for_nothing_again(
    tmp_path: Path, run: Run, registry: Registry, pusher: Callable[..., str], disk: Path
) -> None:
    reference = pusher(registry)
    for _ in range(2):
        assert run("export", reference, "-o", tmp_path / "raw").returncode == 0
        assert (tmp_path / "raw").read_bytes() == disk.read_bytes()
    (blob,) = json.loads(run("cache", "stat", "--json").stdout)["blobs"]
    assert blob["present"] == blob["size"] == sum(registry.ranges(blob["digest"]))

    def verified() -> bool:
        return bool(json.loads(run("cache", "stat", "--json").stdout)["blobs"][0]["verified"])

    assert until(verified)


def test_what_was_pushed_is_here_already(
    tmp_path: Path, ociblk: str, run: Run, registry: Registry, layer: Path, disk: Path
) -> None:
    reference = f"{registry.host}/app:1"
    pushed = json.loads(run("push", layer, reference, "--json").stdout)
    digest = pushed["layers"][0]["digest"]
    (blob,) = json.loads(run("cache", "stat", "--json").stdout)["blobs"]
    assert (blob["digest"], blob["verified"], blob["present"]) == (digest, True, blob["size"])
    assert run("export", reference, "-o", tmp_path / "raw").returncode == 0
    assert (tmp_path / "raw").read_bytes() == disk.read_bytes()
    assert registry.ranges(digest) == []
    assert registry.whole_gets(digest) == 0


def test_two_devices_share_what_is_fetched(
    tmp_path: Path, run: Run, start: Start, registry: Registry, pusher: Callable[..., str]
) -> None:
    requires.requires_command("nbdcopy")
    reference = pusher(registry)
    first = start("serve", reference, "--socket", tmp_path / "1")
    second = start("serve", reference, "--socket", tmp_path / "2")
    copies = [
        subprocess.Popen(["nbdcopy", uri_of(serving), str(tmp_path / f"copy-{name}")])
        for name, serving in (("1", first), ("2", second))
    ]
    assert [copy.wait(60) for copy in copies] == [0, 0]
    assert (tmp_path / "copy-1").read_bytes() == (tmp_path / "copy-2").read_bytes()
    shown = devices(run)
    blob = shown[0]["blobs"][0]
    assert sum(registry.ranges(blob["name"])) == blob["size"]
    first.terminate()
    assert ended(first) == (0, "")
    subprocess.run(["nbdinfo", f"nbd+unix:///?socket={tmp_path}/2"], check=True, stdout=subprocess.DEVNULL)


def test_the_first_device_still_has_a_source_when_the_second_goes(
    tmp_path: Path, run: Run, start: Start, registry: Registry, pusher: Callable[..., str], disk: Path
) -> None:
    requires.requires_mount()
    reference = pusher(registry)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("mount", "--raw", reference, first).returncode == 0
    assert run("mount", "--raw", reference, second).returncode == 0
    assert run("umount", second).returncode == 0
    assert until(lambda: len(devices(run)) == 1)
    assert read(first, 3 * MIB, MIB) == read(disk, 3 * MIB, MIB)
    assert run("umount", first).returncode == 0


def test_prune_keeps_what_is_in_use(
    tmp_path: Path, run: Run, start: Start, registry: Registry, pusher: Callable[..., str]
) -> None:
    serving = start("serve", pusher(registry), "--socket", tmp_path / "s")
    assert uri_of(serving)
    pruned = json.loads(run("cache", "prune", "--json").stdout)
    assert (pruned["removed"], len(pruned["kept"])) == ([], 1)
    serving.terminate()
    assert ended(serving) == (0, "")
    assert len(json.loads(run("cache", "prune", "--json").stdout)["removed"]) == 1
    assert json.loads(run("cache", "stat", "--json").stdout)["blobs"] == []


# ---- the registry goes and comes ----


def test_a_registry_that_stops_and_returns(
    tmp_path: Path, run: Run, registry: Registry, pusher: Callable[..., str], disk: Path
) -> None:
    requires.requires_mount()
    file = tmp_path / "file"
    assert run("mount", "--raw", pusher(registry), file, "--on-error", "eio:2s").returncode == 0
    assert read(file, 0, 4096) == read(disk, 0, 4096)
    registry.stop()
    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output"):
        read(file, 10 * MIB, 4096)
    assert time.monotonic() - started < 10
    assert read(file, 0, 4096) == read(disk, 0, 4096)
    (device,) = devices(run)
    assert registry.host in device["error"]
    registry.start()

    def back() -> bool:
        try:
            return read(file, 10 * MIB, 4096) == read(disk, 10 * MIB, 4096)
        except OSError:
            return False

    assert until(back)
    assert run("umount", file).returncode == 0


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_umount_is_quick_with_a_dead_registry(
    tmp_path: Path, run: Run, registry: Registry, pusher: Callable[..., str], force: list[str]
) -> None:
    requires.requires_mount()
    file = tmp_path / "file"
    assert run("mount", "--raw", pusher(registry), file, "--on-error", "hang").returncode == 0
    registry.stop()
    started = time.monotonic()
    assert run("umount", file, *force).returncode == 0
    assert time.monotonic() - started < 10
    assert until(lambda: devices(run) == [])


def test_forced_umount_ends_a_read_that_hangs(
    tmp_path: Path, run: Run, registry: Registry, pusher: Callable[..., str]
) -> None:
    requires.requires_mount()
    file = tmp_path / "file"
    assert run("mount", "--raw", pusher(registry), file, "--on-error", "hang").returncode == 0
    registry.stop()
    reader = subprocess.Popen(["dd", f"if={file}", "of=/dev/null", "bs=4k", "skip=2500", "count=1"], stderr=-1)
    assert not until(lambda: reader.poll() is not None, limit=1)
    assert run("umount", file).returncode == 7
    started = time.monotonic()
    assert run("umount", "--force", file).returncode == 0
    assert time.monotonic() - started < 10
    reader.communicate(timeout=10)
    assert reader.returncode != 0
    assert until(lambda: devices(run) == [])


def test_an_owner_stops_in_time_while_reads_hang(
    tmp_path: Path, run: Run, start: Start, root: Root, registry: Registry, pusher: Callable[..., str]
) -> None:
    requires.requires_command("nbdcopy")
    serving = start("serve", pusher(registry), "--socket", tmp_path / "s", "--on-error", "hang")
    uri = uri_of(serving)
    registry.stop()
    reader = subprocess.Popen(["nbdcopy", uri, str(tmp_path / "copy")], stderr=subprocess.DEVNULL)
    assert not until(lambda: reader.poll() is not None, limit=1)
    started = time.monotonic()
    assert run("daemon", "--stop", "--force").returncode == 0
    assert time.monotonic() - started < 10
    assert not root.owned()
    assert reader.wait(10) != 0
    assert ended(serving)[0] == 7


# ---- who is let in ----


def auth_file(folder: Path, host: str, password: str) -> str:
    path = folder / f"auth-{password[:3]}.json"
    entry = {"auth": base64.b64encode(f"ann:{password}".encode()).decode()}
    path.write_text(json.dumps({"auths": {host: entry}}))
    return str(path)


def secrets_found(root: Root, *secrets: str) -> list[str]:
    """Which of them stand where somebody could read them: the log, or the command line of a process."""
    places = [root.log.read_text()]
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            places.append(entry.read_text(errors="replace"))
        except OSError:  # gone
            continue
    encoded = [base64.b64encode(f"ann:{secret}".encode()).decode() for secret in secrets]
    return [secret for secret in (*secrets, *encoded) if any(secret in place for place in places)]


@pytest.mark.parametrize("kind", ["basic", "token", "tls"])
def test_logins_work_and_wrong_ones_are_denied(
    tmp_path: Path,
    run: Run,
    start: Start,
    root: Root,
    registries: Registries,
    pusher: Callable[..., str],
    authority: Authority,
    kind: str,
) -> None:
    tokens = TokenServer(authority.server("127.0.0.1"), {"ann": SECRET}) if kind == "token" else None
    try:
        if tokens:
            registry = registries(auth=tokens.registry_options())
        else:
            registry = registries(users={"ann": SECRET}, tls=authority.server("127.0.0.1") if kind == "tls" else None)
        (tmp_path / "ca.pem").write_text(authority.root.pem)
        options = ["--ca", str(tmp_path / "ca.pem")] if kind == "tls" else []
        right = auth_file(tmp_path, registry.host, SECRET)
        reference = pusher(registry, *options, REGISTRY_AUTH_FILE=right)
        serving = start("serve", reference, "--socket", tmp_path / "s", *options, "--debug", REGISTRY_AUTH_FILE=right)
        assert uri_of(serving)
        shown = run("ps", "--json").stdout
        wrong = auth_file(tmp_path, registry.host, "not-the-Pa55word")
        denied = run("inspect", reference, *options, REGISTRY_AUTH_FILE=wrong)
        assert (denied.returncode, denied.stderr.count("\n")) == (4, 1)
        none = run("inspect", reference, *options, DOCKER_CONFIG=str(tmp_path / "none"))
        assert (none.returncode, none.stderr.count("\n")) == (4, 1)
        serving.terminate()
        code, errors = ended(serving)
        assert code == 0
        assert secrets_found(root, SECRET, "not-the-Pa55word") == []
        assert not any(SECRET in text for text in (shown, errors, denied.stderr, none.stderr))
    finally:
        if tokens:
            tokens.close()


def test_blobs_behind_a_redirect_are_read_without_authorization(
    tmp_path: Path, run: Run, registries: Registries, pusher: Callable[..., str], disk: Path
) -> None:
    store = ObjectStore()
    try:
        registry = registries(users={"ann": SECRET}, redirect_to=store.server.url)
        store.folder = registry.storage
        login = auth_file(tmp_path, registry.host, SECRET)
        reference = pusher(registry, REGISTRY_AUTH_FILE=login)
        assert run("export", reference, "-o", tmp_path / "raw", REGISTRY_AUTH_FILE=login).returncode == 0
        assert (tmp_path / "raw").read_bytes() == disk.read_bytes()
        assert [seen for seen in store.server.seen if seen.range]
        assert not [seen for seen in store.server.seen if "authorization" in seen.headers]
    finally:
        store.server.close()


@pytest.mark.parametrize(
    ("name", "code"),
    [("{host}/app:absent", 3), ("{host}/absent:1", 3), (f"{{host}}/app@sha256:{'0' * 64}", 3), ("{dead}/app:1", 6)],
)
def test_what_is_not_there_is_one_line_and_its_code(
    run: Run, registry: Registry, pusher: Callable[..., str], name: str, code: int, root: Root
) -> None:
    pusher(registry)
    reference = name.format(host=registry.host, dead="127.0.0.1:1")
    started = time.monotonic()
    done = run("inspect", reference, "--on-error", "eio:2s")
    assert (done.returncode, done.stderr.count("\n")) == (code, 1)
    assert time.monotonic() - started < 15
    assert devices(run) == []


# ---- the disk under the cache ----


def test_a_full_cache_disk_is_one_warning_and_reads_go_on(
    tmp_path: Path, run: Run, start: Start, root: Root, registry: Registry, pusher: Callable[..., str], disk: Path
) -> None:
    requires.requires_root()
    requires.requires_command("nbdcopy")
    reference = pusher(registry)
    root.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", root.path], check=True)
    try:
        serving = start("serve", reference, "--socket", tmp_path / "s")
        uri = uri_of(serving)
        for _ in range(2):
            subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True, timeout=60)
            assert (tmp_path / "copy").read_bytes() == disk.read_bytes()
        serving.terminate()
        assert ended(serving) == (0, "")
        warnings = re.findall(r"level=(?:warning|error) .*", root.log.read_text())
        assert len(warnings) == 1
        assert "No space left" in warnings[0]
        assert run("daemon", "--stop").returncode == 0
    finally:
        subprocess.run(["umount", "--lazy", root.path], check=True)


def test_an_owner_of_a_registrys_images_stays_small(
    tmp_path: Path, start: Start, root: Root, registry: Registry, pusher: Callable[..., str]
) -> None:
    assert uri_of(start("serve", pusher(registry), "--socket", tmp_path / "s"))
    status = Path(f"/proc/{owner_pid(root)}/status").read_text()
    assert int(status.partition("RssAnon:")[2].split()[0]) <= 40 << 10
