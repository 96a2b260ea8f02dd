# SPDX-License-Identifier: Apache-2.0
"""ociblk fsck: what is bad is found, not served, and fetched again; nothing else is."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockdev.root import Root
from formats import presence
from tests import requires
from tests.commands import Run, Start, devices, ended, until, uri_of
from tests.registries import Registry

MIB = 1 << 20
EXTENT = presence.EXTENT_SIZE


@dataclass(frozen=True)
class Filled:
    """A root that holds an image whole and verified, and whose owner has ended."""

    reference: str
    digest: str
    data: Path
    disk: Path
    run: Run
    registry: Registry

    @property
    def map(self) -> Path:
        return self.data.with_name(f"{self.data.name}.map")

    def flip(self, offset: int, bit: int = 1) -> None:
        """A bit of the cached bytes."""
        flip(self.data, offset, bit)

    def fsck(self, *words: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, report and stderr."""
        done = self.run("fsck", "--json", *words)
        return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def asked(self) -> list[int]:
        """Bytes of each range of the blob that the registry has sent so far."""
        return self.registry.ranges(self.digest)

    def verified(self) -> bool:
        return bool(json.loads(self.run("cache", "stat", "--json").stdout)["blobs"][0]["verified"])

    def exported(self, folder: Path) -> bytes:
        done = self.run("export", self.reference, "-o", folder / "raw")
        assert (done.returncode, done.stderr) == (0, "")
        return (folder / "raw").read_bytes()


def flip(path: Path, offset: int, bit: int = 1) -> None:
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ bit]), offset)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk"
    path.write_bytes(random.Random(11).randbytes(3 * MIB))
    return path


@dataclass(frozen=True)
class _Template:
    """An image in a registry, and a root that holds all of it. Roots can be copied."""

    registry: Registry
    root: Path
    layer: Path
    reference: str
    digest: str


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory, disk: Path, ociblk: str) -> Iterator[dict[str, _Template]]:
    """By codec."""
    requires.requires_command("docker-registry")
    folder = tmp_path_factory.mktemp("templates")
    (folder / "registry").mkdir()
    registry = Registry(folder / "registry", {}, None)
    templates = {}
    for codec in ("none", "lz4"):
        layer, root = folder / f"layer-{codec}", folder / f"root-{codec}"
        subprocess.run([ociblk, "import", disk, "-o", layer, "--tar", "--codec", codec], check=True)
        reference = f"{registry.host}/{codec}:1"
        command = [ociblk, "push", layer, reference, "--root", root, "--json"]
        pushed = subprocess.run(command, check=True, capture_output=True, text=True)
        subprocess.run([ociblk, "inspect", reference, "--root", root], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([ociblk, "daemon", "--stop", "--root", root], check=True)
        digest = json.loads(pushed.stdout)["layers"][0]["digest"]
        templates[codec] = _Template(registry, root, layer, reference, digest)
    yield templates
    registry.stop()


@pytest.fixture
def filled(
    request: pytest.FixtureRequest, templates: dict[str, _Template], disk: Path, run: Run, root: Root
) -> Filled:
    template = templates[getattr(request, "param", "lz4")]
    shutil.copytree(template.root, root.path, ignore=shutil.ignore_patterns("*.sock"))
    data = root.blobs / "sha256" / template.digest.partition(":")[2]
    return Filled(template.reference, template.digest, data, disk, run, template.registry)


@pytest.mark.parametrize("filled", ["none", "lz4"], indirect=True)  # bytes without a checksum of their own, and with
def test_a_flipped_bit_is_found_never_served_and_repaired(filled: Filled, tmp_path: Path) -> None:
    rng = random.Random(5)
    size = filled.data.stat().st_size
    for repair in (True, False):
        place = rng.randrange(size)
        filled.flip(place, 1 << rng.randrange(8))
        code, report, errors = filled.fsck()
        assert (code, errors.count("\n")) == (5, 1)
        (bad,) = report["bad"]
        assert (bad["digest"], bad["offset"], bad["state"]) == (filled.digest, place // EXTENT * EXTENT, "bad")
        assert "CRC32C" in bad["why"]
        assert filled.fsck()[0] == 5  # looking changes nothing
        asked = filled.asked()
        if repair:
            code, report, errors = filled.fsck("--repair")
            assert (code, errors, [one["state"] for one in report["bad"]]) == (0, "", ["repaired"])
            assert filled.asked()[len(asked) :] == [bad["length"]]
            assert filled.verified()
        assert filled.exported(tmp_path) == filled.disk.read_bytes()
        assert filled.asked()[len(asked) :] == [bad["length"]]
        assert until(lambda: filled.exported(tmp_path) == filled.disk.read_bytes() and filled.verified())
        assert filled.fsck("--digests")[0] == 0
        assert filled.run("daemon", "--stop").returncode == 0


def test_exactly_what_is_bad_is_fetched_again(filled: Filled, tmp_path: Path) -> None:
    extents = [1, 2, 3, 10, -(-filled.data.stat().st_size // EXTENT) - 1]
    for extent in extents:
        filled.flip(extent * EXTENT + 9)
    asked = len(filled.asked())
    code, report, _ = filled.fsck("--repair")
    assert code == 0
    assert [one["offset"] // EXTENT for one in report["bad"]] == [1, 10, extents[-1]]
    assert sum(filled.asked()[asked:]) == sum(one["length"] for one in report["bad"])
    assert filled.fsck("--digests")[0] == 0
    assert filled.exported(tmp_path) == filled.disk.read_bytes()


def test_a_rotten_table_is_found_too(filled: Filled, tmp_path: Path) -> None:
    flip(filled.map, presence.TABLE_OFFSET + 4 * 7)
    code, report, _ = filled.fsck()
    assert (code, [one["offset"] for one in report["bad"]]) == (5, [7 * EXTENT])
    assert filled.fsck("--repair")[0] == 0
    assert filled.fsck()[0] == 0


def test_a_rotten_head_is_found_and_its_entry_starts_empty(filled: Filled, tmp_path: Path) -> None:
    flip(filled.map, 100)
    code, report, _ = filled.fsck()
    assert (code, "checksum" in report["bad"][0]["why"]) == (5, True)
    assert filled.fsck("--repair")[0] == 0
    code, report, _ = filled.fsck()
    assert (code, report["blobs"]) == (0, 0)
    assert filled.exported(tmp_path) == filled.disk.read_bytes()


def test_a_blob_that_is_another_is_found_by_its_digest(filled: Filled, tmp_path: Path) -> None:
    """As if it had been pushed so: every checksum is right."""
    content = bytearray(filled.data.read_bytes())
    content[5 * EXTENT : 6 * EXTENT] = bytes(EXTENT)
    filled.data.write_bytes(content)
    with open(filled.map, "r+b", buffering=0) as file:
        entry = presence.extent_entry(bytes(EXTENT))
        os.pwrite(file.fileno(), entry.to_bytes(4, "little"), presence.TABLE_OFFSET + 4 * 5)
    assert filled.fsck()[0] == 0  # it says that it was verified
    code, report, _ = filled.fsck("--digests")
    assert (code, report["bad"][0]["length"]) == (5, len(content))
    assert "sha256" in report["bad"][0]["why"]
    code, report, _ = filled.fsck("--digests", "--repair")
    assert (code, report["bad"][0]["state"]) == (0, "repaired")
    assert filled.fsck("--digests")[0] == 0
    assert filled.data.read_bytes() != content
    assert filled.exported(tmp_path) == filled.disk.read_bytes()


def test_it_works_under_a_running_device(filled: Filled, tmp_path: Path, start: Start) -> None:
    requires.requires_command("nbdcopy")
    serving = start("serve", filled.reference, "--socket", tmp_path / "s")
    uri = uri_of(serving)
    subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True)
    filled.flip(4 * EXTENT + 1)
    code, report, _ = filled.fsck("--repair")
    assert (code, [one["offset"] for one in report["bad"]]) == (0, [4 * EXTENT])
    filled.flip(7 * EXTENT + 1)
    reader = subprocess.Popen(["nbdcopy", uri, "null:"])  # it may come first, and drop the extent itself
    assert filled.fsck("--repair")[0] == 0
    assert reader.wait(60) == 0
    assert filled.fsck("--digests")[0] == 0
    subprocess.run(["nbdcopy", uri, tmp_path / "copy"], check=True)
    assert (tmp_path / "copy").read_bytes() == filled.disk.read_bytes()
    assert until(lambda: bool(devices(filled.run)[0]["blobs"][0]["verified"]))
    serving.terminate()
    assert ended(serving) == (0, "")


def test_only_what_is_named_is_checked(filled: Filled) -> None:
    filled.flip(0)
    assert filled.fsck(filled.reference)[0] == 5
    assert filled.fsck(filled.digest)[0] == 5
    code, _, errors = filled.fsck(f"sha256:{'0' * 64}")
    assert (code, errors.count("\n")) == (3, 1)
    code, _, errors = filled.fsck(f"{filled.registry.host}/other:1")
    assert (code, errors.count("\n")) == (3, 1)
    assert filled.fsck("Not/A:/name")[0] == 2


def test_a_registry_that_is_away_leaves_an_extent_absent(filled: Filled, tmp_path: Path) -> None:
    filled.flip(2 * EXTENT)
    filled.registry.stop()
    assert filled.fsck()[0] == 5
    done = filled.run("fsck", "--repair", "--json", "--on-error", "eio:500ms")
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert json.loads(done.stdout)["bad"][0]["state"] == "dropped"
    assert filled.fsck()[0] == 0
    assert not filled.verified()
    filled.registry.start()
    assert filled.exported(tmp_path) == filled.disk.read_bytes()


def test_a_killed_repair_ends(filled: Filled, start: Start) -> None:
    def in_use() -> bool:
        return bool(json.loads(filled.run("cache", "stat", "--json").stdout)["blobs"][0]["in_use"])

    filled.flip(2 * EXTENT)
    filled.registry.stop()
    repairing = start("fsck", "--repair", "--on-error", "hang")
    assert until(in_use)
    repairing.kill()
    assert until(lambda: not in_use())
    filled.registry.start()
    assert filled.fsck("--repair")[0] == 0


def test_what_is_not_of_the_cache_is_named_and_left(filled: Filled) -> None:
    folder = filled.data.parent
    (folder / "letter").write_text("dear cache")
    (folder / ("ab" * 32)).write_bytes(b"data without a map")
    (folder.parent / "md5").mkdir()
    (folder.parent.parent / "catalog" / "sha256" / ".77.part").write_bytes(b"")
    code, report, errors = filled.fsck()
    assert (code, errors, report["bad"]) == (0, "", [])
    assert report["leftovers"] == [
        f"blobs/sha256/{'ab' * 32}: its map is missing",
        "blobs/md5",
        "blobs/sha256/letter",
        "catalog/sha256/.77.part",
    ]
    shown = filled.run("fsck")
    assert shown.stdout.count("not part of the cache") == 4
    assert shown.stdout.splitlines()[-1].startswith("checked 2 blobs, ")
    assert filled.run("cache", "prune").returncode == 0
    assert (folder / "letter").exists()
    assert not (folder / ("ab" * 32)).exists()
    assert not (folder.parent.parent / "catalog" / "sha256" / ".77.part").exists()


def test_a_report_that_is_too_long_is_an_error(run: Run, root: Root) -> None:
    """Of files that are not of the cache: a few hundred, with the longest names that there are."""
    assert run("cache", "stat").returncode == 0
    folder = root.blobs.joinpath(*["\1" * 250] * 13)
    folder.mkdir(parents=True)
    for number in range(500):
        (folder / str(number)).touch()
    refused = run("fsck")
    assert (refused.returncode, refused.stderr.count("\n")) == (8, 1), refused.stderr
    assert "at most" in refused.stderr
    assert "Traceback" not in root.log.read_text()


def test_a_table_for_people_and_no_progress_into_a_pipe(filled: Filled) -> None:
    filled.flip(3 * EXTENT)
    shown = filled.run("fsck")
    assert shown.returncode == 5
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["BLOB", "OFFSET", "LENGTH", "STATE", "WHY"]
    assert lines[1].split()[:4] == [filled.digest, str(3 * EXTENT), str(EXTENT), "bad"]
    assert lines[2].endswith(": 1 bad")
    assert shown.stderr.startswith("ociblk: checking the cache failed: ")
    assert shown.stderr.count("\n") == 1


def test_a_lazy_blob_is_repaired_without_more_of_it(
    run: Run, filled: Filled, tmp_path: Path
) -> None:
    requires.requires_mount()
    assert run("cache", "prune").returncode == 0
    file = tmp_path / "file"
    assert run("mount", "--raw", filled.reference, file).returncode == 0
    with open(file, "rb", buffering=0) as image:
        image.read(4096)
    assert run("umount", file).returncode == 0
    assert run("daemon", "--stop", "--force").returncode == 0
    before = json.loads(run("cache", "stat", "--json").stdout)["blobs"][0]["present"]
    assert before < filled.data.stat().st_size / 2
    assert run("daemon", "--stop").returncode == 0
    filled.flip(100)
    asked = len(filled.asked())
    code, report, _ = filled.fsck("--repair")
    assert (code, [one["state"] for one in report["bad"]]) == (0, ["repaired"])
    assert filled.asked()[asked:] == [EXTENT]
    assert json.loads(run("cache", "stat", "--json").stdout)["blobs"][0]["present"] == before


def test_a_blob_of_unknown_origin_is_dropped_and_that_is_said(filled: Filled, root: Root) -> None:
    for path in (root.catalog / "repositories").iterdir():
        path.unlink()
    filled.flip(0)
    code, report, errors = filled.fsck("--repair")
    assert (code, errors.count("\n")) == (3, 1)
    assert "not known" in errors
    assert report["bad"][0]["state"] == "dropped"


def test_what_was_pushed_can_be_repaired(templates: dict[str, _Template], run: Run, root: Root) -> None:
    template = templates["lz4"]
    assert run("push", template.layer, f"{template.registry.host}/again:1").returncode == 0
    assert run("daemon", "--stop").returncode == 0
    flip(root.blobs / "sha256" / template.digest.partition(":")[2], 70000)
    assert run("fsck").returncode == 5
    assert run("fsck", "--repair").returncode == 0
    assert run("fsck").returncode == 0
