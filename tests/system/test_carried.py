# SPDX-License-Identifier: Apache-2.0
"""Blobs that come another way than from the registry: taken in with cache add, or with a copied root."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from formats import layout
from tests import requires
from tests.commands import COMMAND_WAIT, Run, devices, until
from tests.registries import Registry

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("carried") / "disk"
    path.write_bytes(os.urandom(12 * MIB))
    return path


@pytest.fixture(scope="module")
def layer(disk: Path, ociblk: str) -> Path:
    path = disk.with_name("layer")
    subprocess.run([ociblk, "import", disk, "-o", path, "--tar"], check=True)
    return path


@pytest.fixture(scope="module")
def digest(layer: Path) -> str:
    return f"sha256:{hashlib.sha256(layer.read_bytes()).hexdigest()}"


@pytest.fixture
def reference(tmp_path: Path, ociblk: str, layer: Path, registry: Registry) -> Iterator[str]:
    """The image in the registry, pushed from a root of its own."""
    root = tmp_path / "pusher"
    reference = f"{registry.host}/app:1"
    subprocess.run([ociblk, "push", layer, reference, "--root", root], check=True, stdout=subprocess.DEVNULL)
    yield reference
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", root], check=True)


def named(folder: Path, layer: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    os.link(layer, folder / name)
    return folder / name


# ---- cache add ----


@pytest.mark.parametrize("name", ["layer.tar", "{hex}", "sha256:{hex}", "sha256-{hex}"])
def test_a_blob_by_any_name_is_taken_in_once(
    tmp_path: Path, run: Run, registry: Registry, reference: str, layer: Path, disk: Path, digest: str, name: str
) -> None:
    file = named(tmp_path / "downloads", layer, name.format(hex=digest.partition(":")[2]))
    for _ in range(2):
        added = run("cache", "add", file)
        assert (added.returncode, added.stdout, added.stderr) == (0, f"{digest}\n", "")
    (blob,) = json.loads(run("cache", "stat", "--json").stdout)["blobs"]
    assert (blob["digest"], blob["present"], blob["verified"]) == (digest, layer.stat().st_size, True)
    assert run("export", reference, "-o", tmp_path / "raw").returncode == 0
    assert (tmp_path / "raw").read_bytes() == disk.read_bytes()
    assert (registry.ranges(digest), registry.whole_gets(digest)) == ([], 0)


def test_the_blobs_of_a_layout_are_taken_in(tmp_path: Path, run: Run, layer: Path, digest: str) -> None:
    folder = tmp_path / "layout"
    for content in (layer.read_bytes(), b"{}"):
        path = folder / layout.blob_path(f"sha256:{hashlib.sha256(content).hexdigest()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    added = json.loads(run("cache", "add", f"oci:{folder}", "--json").stdout)
    assert added["v"] == 1
    assert {blob["digest"]: blob["size"] for blob in added["blobs"]} == {
        digest: layer.stat().st_size,
        f"sha256:{hashlib.sha256(b'{}').hexdigest()}": 2,
    }


def test_a_blob_that_is_not_what_its_name_says_is_refused(tmp_path: Path, run: Run, layer: Path) -> None:
    wrong = named(tmp_path / "downloads", layer, "0" * 64)
    refused = run("cache", "add", wrong)
    assert (refused.returncode, refused.stderr.count("\n")) == (5, 1)
    assert json.loads(run("cache", "stat", "--json").stdout)["blobs"] == []


@pytest.mark.parametrize(
    ("words", "code"), [(["add"], 2), (["stat", "x"], 2), (["add", "absent"], 3), (["add", "/"], 2)]
)
def test_what_makes_no_sense_is_one_line(run: Run, words: list[str], code: int) -> None:
    refused = run("cache", *words)
    assert (refused.returncode, refused.stderr.count("\n")) == (code, 1)


def test_a_device_that_waits_for_its_registry_is_served_at_once(
    tmp_path: Path, run: Run, registry: Registry, reference: str, layer: Path, disk: Path, digest: str
) -> None:
    requires.requires_mount()
    file = tmp_path / "file"
    assert run("mount", "--raw", reference, file, "--on-error", "hang").returncode == 0
    asked = len(registry.ranges(digest))
    registry.stop()
    reader = subprocess.Popen(["cmp", file, disk])
    try:
        assert until(lambda: devices(run)[0]["error"] != "")
        assert reader.poll() is None
        assert run("cache", "add", layer).stdout == f"{digest}\n"
        assert reader.wait(COMMAND_WAIT) == 0
        assert until(lambda: json.loads(run("cache", "stat", "--json").stdout)["blobs"][0]["verified"])
        (device,) = devices(run)
        assert device["mode"] == "local"
    finally:
        reader.kill()
        reader.wait()
        assert run("umount", "--force", file).returncode == 0
    registry.start()
    assert len(registry.ranges(digest)) == asked


# ---- a root that is carried ----


@pytest.mark.parametrize("way", ["cp -a --sparse=always one two", "mkdir two; tar -C one -cS . | tar -C two -x"])
def test_a_pulled_root_works_elsewhere_without_its_registry(
    tmp_path: Path,
    ociblk: str,
    registry: Registry,
    reference: str,
    disk: Path,
    way: str,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"

    def run(root: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [ociblk, *map(str, words), "--root", str(root)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_WAIT)

    try:
        assert run(one, "pull", reference, "--complete").returncode == 0
        assert run(one, "daemon", "--stop").returncode == 0
        subprocess.run(["sh", "-ec", way], cwd=tmp_path, check=True)
        registry.stop()
        one.rename(tmp_path / "away")
        exported = run(two, "export", reference, "-o", tmp_path / "raw")
        assert exported.returncode == 0, exported.stderr
        assert (tmp_path / "raw").read_bytes() == disk.read_bytes()
        assert json.loads(run(two, "cache", "stat", "--json").stdout)["blobs"][0]["verified"]
        again = run(two, "pull", reference, "--complete", "--json")
        assert (again.returncode, json.loads(again.stdout)["fetched"]) == (0, 0)
    finally:
        for root in (one, two):
            run(root, "daemon", "--stop", "--force")
