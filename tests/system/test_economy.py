# SPDX-License-Identifier: Apache-2.0
"""How little is asked of a registry for a real file system: counted in the registry's own log."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import requires
from tests.commands import WAIT, Run, devices, until
from tests.registries import Registry

MIB = 1 << 20
CONTENT = Path("/usr/lib")  # of the machine itself: real programs and libraries
CONTENT_BYTES = 160 * MIB
SEQUENTIAL_BYTES = 64 * MIB
SEQUENTIAL_REQUESTS = 80
PART = 10  # one file costs less than a tenth of the blob


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory, ociblk: str) -> Path:
    """An EROFS of real files as one lz4 layer."""
    requires.requires_command("mkfs.erofs")
    folder = tmp_path_factory.mktemp("erofs")
    tree = folder / "tree"
    taken = 0
    for path in sorted(CONTENT.rglob("*")):
        if taken < CONTENT_BYTES and path.is_file() and not path.is_symlink():
            copy = tree / path.relative_to(CONTENT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy) if path.stat().st_dev == folder.stat().st_dev else copy.write_bytes(path.read_bytes())
            taken += path.stat().st_size
    (tree / "one").write_text("one small file\n")
    raw, layer = folder / "raw", folder / "layer"
    subprocess.run(["mkfs.erofs", str(raw), str(tree)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([ociblk, "import", str(raw), "-o", str(layer), "--tar"], check=True)
    return layer


@pytest.fixture
def reference(layer: Path, registry: Registry, tmp_path: Path, ociblk: str) -> Iterator[str]:
    """The layer in a registry, pushed from a root of its own."""
    root = tmp_path / "pusher"
    reference = f"{registry.host}/app:1"
    subprocess.run(
        [ociblk, "push", str(layer), reference, "--root", str(root)], check=True, stdout=subprocess.DEVNULL
    )
    yield reference
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", str(root)], check=True, timeout=WAIT)


def test_mounting_and_reading_one_file_costs_less_than_a_tenth(
    reference: str, registry: Registry, layer: Path, run: Run, tmp_path: Path
) -> None:
    requires.requires_mount()
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    assert run("mount", reference, mnt).returncode == 0
    try:
        (blob,) = devices(run)[0]["blobs"]
        assert (mnt / "one").read_text() == "one small file\n"
        assert sum(registry.ranges(blob["name"])) < layer.stat().st_size / PART
        assert registry.whole_gets(blob["name"]) == 0
        asked = len(registry.ranges(blob["name"]))
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert (mnt / "one").read_text() == "one small file\n"
        assert len(registry.ranges(blob["name"])) == asked
    finally:
        assert run("umount", mnt).returncode == 0


def test_a_sequential_reader_asks_seldom_and_never_twice(
    reference: str, registry: Registry, run: Run, tmp_path: Path
) -> None:
    requires.requires_mount()
    file = tmp_path / "file"
    assert run("mount", "--raw", reference, file).returncode == 0
    try:
        (blob,) = devices(run)[0]["blobs"]
        opening = len(registry.ranges(blob["name"]))
        with open(file, "rb", buffering=0) as disk:
            done = 0
            while done < SEQUENTIAL_BYTES:
                done += len(disk.read(MIB))
        assert len(registry.ranges(blob["name"])) - opening <= SEQUENTIAL_REQUESTS

        def all_written() -> bool:
            (entry,) = json.loads(run("cache", "stat", "--json").stdout)["blobs"]
            return bool(entry["present"] == sum(registry.ranges(blob["name"])))

        assert until(all_written)
    finally:
        assert run("umount", file).returncode == 0
