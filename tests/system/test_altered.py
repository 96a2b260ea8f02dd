# SPDX-License-Identifier: Apache-2.0
"""Somebody alters a byte of a converted layer and mends the block's checksum: who notices, and who cannot.

The image goes to another registry with skopeo, which knows nothing of digest tables; there
the blob is altered where it is stored. A layer without a table is the same layer under a
manifest that says nothing of it.
"""

from __future__ import annotations

import errno
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev.engine import crc32c
from blockdev.root import Root
from formats import oci, presence, tar, zfile
from formats.digests import UNIT
from formats.readat import BytesAt, Window
from tests.commands import Run, devices
from tests.images import TAG
from tests.ordinary import add, make
from tests.registries import Registry
from tests.requires import requires_command, requires_mount

FILES = {f"file-{number}": random.Random(number).randbytes(700_000) for number in range(4)}
CRC_SIZE = 4
CRC_SEED = 100007  # ZFile's, for blocks


@dataclass
class Copied:
    """A converted image in a registry that skopeo has copied it to."""

    registry: Registry
    reference: str  # by digest
    original: bytes = b""  # the layer, before it was altered

    @property
    def manifest(self) -> oci.Manifest:
        found = oci.parse_manifest(self._blob(self.reference.partition("@")[2]).read_bytes())
        assert isinstance(found, oci.Manifest)
        return found

    @property
    def layer(self) -> oci.Descriptor:
        (layer,) = self.manifest.layers
        return layer

    def alter(self) -> int:
        """Change a byte in the middle of the layer, and the checksum of its block; where the block is."""
        path = self._blob(self.layer.digest)
        self.original = path.read_bytes()
        blob = bytearray(self.original)
        place = mended(blob, len(blob) // 2)
        path.write_bytes(blob)
        return place

    def forget_table(self, client_put: Callable[[str, bytes], str]) -> None:
        """The same image under a manifest that says nothing of the table."""
        document = json.loads(self.manifest.build())
        for layer in document["layers"]:
            kept = {name: value for name, value in layer["annotations"].items() if "dev.ociblk" not in name}
            layer["annotations"] = kept
        self.reference = client_put("plain", oci.canonical(document))

    def _blob(self, digest: str) -> Path:
        name = digest.partition(":")[2]
        return self.registry.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


def mended(blob: bytearray, near: int) -> int:
    """Alter the first block that starts behind `near` so that it decodes to something else, with a right CRC."""
    payload = tar.find_payload(BytesAt(bytes(blob)))
    assert payload
    window = Window(BytesAt(bytes(blob)), payload.base, payload.length)
    head = zfile.open_zfile(window)
    assert head
    offsets = [payload.base + offset for offset in zfile.read_table(window, head)]
    number = next(number for number, offset in enumerate(offsets) if offset > near)
    start, end = offsets[number], offsets[number + 1] - CRC_SIZE
    assert end - start > head.block_size, "incompressible: literals, of which any decodes"
    before = zfile.Decoder(window, head).block(number)
    blob[(start + end) // 2] ^= 0x20
    blob[end : end + CRC_SIZE] = crc32c(CRC_SEED, bytes(blob[start:end])).to_bytes(CRC_SIZE, "little")
    after = zfile.Decoder(Window(BytesAt(bytes(blob)), payload.base, payload.length), head).block(number)
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
    return start


@pytest.fixture
def copied(tmp_path: Path, registries: Callable[..., Registry], ociblk: str) -> Copied:
    requires_command("skopeo")
    requires_mount()
    first, second, root = registries(), registries(), tmp_path / "converter"

    def fill(archive: object) -> None:
        for name, content in FILES.items():
            add(archive, name, content)  # type: ignore[arg-type]

    source = f"oci:{make(tmp_path / 'source', fill)}:{TAG}"
    command = [ociblk, "convert", source, f"{first.host}/team/app:1", "--root", root]
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", root], check=True)
    # Without it skopeo compresses layers that are not, and makes an ordinary image of any block image.
    copy = ["skopeo", "copy", "--quiet", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"]
    subprocess.run(
        [*copy, f"docker://{first.host}/team/app:1", f"docker://{second.host}/mirror/app:1"], check=True, timeout=60
    )
    first.stop()
    inspected = subprocess.run(
        ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}", f"docker://{second.host}/mirror/app:1"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Copied(second, f"{second.host}/mirror/app@{inspected.stdout.strip()}")


@pytest.fixture
def mounted(tmp_path: Path, run: Run) -> Iterator[Callable[[str], Path]]:
    point = tmp_path / "mounted"
    point.mkdir()

    def mount(reference: str) -> Path:
        done = run("mount", reference, point)
        assert done.returncode == 0, done.stderr
        return point

    yield mount
    run("umount", point)


def read_all(point: Path) -> dict[str, str]:
    """Of each file: "right", "altered", or the name of the error."""
    found = {}
    for name, content in FILES.items():
        try:
            with open(point / name, "rb") as file:
                found[name] = "right" if file.read() == content else "altered"
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def map_head(root: Root, digest: str) -> presence.Head:
    path = root.blobs / "sha256" / f"{digest.partition(':')[2]}.map"
    return presence.Head.parse(path.read_bytes()[: presence.HEAD_SIZE])


def test_a_copy_by_skopeo_is_checked_as_the_first_one(
    run: Run, root: Root, copied: Copied, mounted: Callable[[str], Path]
) -> None:
    assert set(read_all(mounted(copied.reference)).values()) == {"right"}
    (device,) = devices(run)
    assert device["checked"] == "sha256"
    assert "  sha256  " in run("ps").stdout
    inspected = json.loads(run("inspect", copied.reference, "--json").stdout)
    assert [layer["checked"] for layer in inspected["layers"]] == ["sha256"]
    table = copied.layer.annotations["dev.ociblk.digests.digest"]
    assert map_head(root, copied.layer.digest).table == table


def test_an_altered_block_with_a_mended_checksum_is_refused(
    run: Run, root: Root, copied: Copied, mounted: Callable[[str], Path]
) -> None:
    place = copied.alter()
    unit = place // UNIT * UNIT
    answers = read_all(mounted(copied.reference))
    assert sorted(set(answers.values())) == ["EIO", "right"], answers
    (device,) = devices(run)
    assert f"{copied.layer.digest}: offset {unit}: extent of {UNIT} bytes" in device["error"]
    assert [(blob["checked"], blob["mismatches"] >= 2) for blob in device["blobs"]] == [("sha256", True)]
    pulled = run("pull", copied.reference, "--complete")
    assert pulled.returncode == 5
    assert f"{copied.layer.digest}: offset {unit}" in pulled.stderr
    assert_cache_is_right(root, copied, unit)


def assert_cache_is_right(root: Root, copied: Copied, unit: int) -> None:
    """What is there is the layer, and of the unit nothing is."""
    path = root.blobs / "sha256" / copied.layer.digest.partition(":")[2]
    table = path.with_name(path.name + ".map").read_bytes()[presence.TABLE_OFFSET :]
    content = path.read_bytes()
    present = set(range(presence.extent_count(copied.layer.size)))
    for first, count in presence.absent_runs(table, 0, len(present)):
        present -= set(range(first, first + count))
    assert present
    for extent in present:
        part = slice(extent * presence.EXTENT_SIZE, (extent + 1) * presence.EXTENT_SIZE)
        assert content[part] == copied.original[part], f"extent {extent}"
    first = unit // presence.EXTENT_SIZE
    assert not present & set(range(first, first + UNIT // presence.EXTENT_SIZE))


def test_without_a_table_the_altered_bytes_are_served(
    run: Run, copied: Copied, mounted: Callable[[str], Path], put_manifest: Callable[[str, bytes], str]
) -> None:
    """Why the table is needed: this is what a block's CRC alone is worth against who can compute one. Only when
    the whole blob is there does its digest tell."""
    copied.alter()
    copied.forget_table(put_manifest)
    answers = read_all(mounted(copied.reference))
    assert sorted(answers.values()) == ["altered", "right", "right", "right"]
    (device,) = devices(run)
    assert (device["checked"], device["error"]) == ("crc only", "")
    assert "  crc only  " in run("ps").stdout
    inspected = json.loads(run("inspect", copied.reference, "--json").stdout)
    assert [layer["checked"] for layer in inspected["layers"]] == ["crc only"]


@pytest.fixture
def put_manifest(copied: Copied) -> Callable[[str, bytes], str]:
    from blockdev.registry.client import Client
    from blockdev.registry.credentials import Provider

    def put(tag: str, document: bytes) -> str:
        client = Client(copied.registry.host, Provider())
        try:
            digest = client.put_manifest("mirror/app", tag, oci.OCI_MANIFEST, document)
        finally:
            client.close()
        return f"{copied.registry.host}/mirror/app@{digest}"

    return put
