# SPDX-License-Identifier: Apache-2.0
"""push puts layers into a real registry in the shape that overlaybd's snapshotter takes, and into the cache."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.build.disk import LayerOptions, import_disk
from blockdev.build.layerfile import Wrapping
from blockdev.build.push import Pushed, push
from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.errors import CorruptImage, EngineError, NotFound, SourceError, UsageError
from blockdev.registry.client import Client
from blockdev.registry.credentials import Provider
from formats import digests, oci, tar, zfile
from formats.oci import Reference
from formats.readat import BytesAt
from tests import stacks
from tests.opened import opened, opened_bytes
from tests.registries import Registry
from tests.requires import requires_command

PREFIX = "containerd.io/snapshot/overlaybd/"
REPOSITORY = "team/app"


@pytest.fixture
def client(registry: Registry) -> Iterator[Client]:
    made = Client(registry.host, Provider())
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An ext4 file system."""
    requires_command("mke2fs")
    path = tmp_path / "disk"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(path), "4M"], check=True)
    return path


def _layer(disk: Path, out: Path, wrapping: Wrapping) -> Path:
    with open(disk, "rb") as file:
        import_disk(file.fileno(), str(disk), out, LayerOptions(wrapping))
    return out


def _reference(registry: Registry, tag: str = "v1") -> Reference:
    return Reference.parse(f"{registry.host}/{REPOSITORY}:{tag}")


def _pushed(client: Client, pushed: Pushed) -> tuple[dict[str, object], list[bytes]]:
    """The manifest and the blobs as the registry gives them."""
    body = client.manifest(REPOSITORY, "v1").body
    assert oci.digest_of(body) == pushed.digest
    manifest = json.loads(body)
    return manifest, [client.blob(REPOSITORY, layer["digest"], 64 << 20) for layer in manifest["layers"]]


def test_a_bare_layer_arrives_wrapped_and_annotated(
    registry: Registry, client: Client, disk: Path, tmp_path: Path
) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("lz4"))
    pushed = push(client, _reference(registry), [layer])
    manifest, (blob,) = _pushed(client, pushed)
    payload = tar.find_payload(BytesAt(blob))
    assert payload
    assert payload.name == "overlaybd.commit"
    assert blob == tar.wrap_head(layer.stat().st_size) + layer.read_bytes() + tar.wrap_tail(layer.stat().st_size)
    digest = oci.digest_of(blob)
    assert manifest["mediaType"] == oci.OCI_MANIFEST
    assert manifest["layers"] == [
        {
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": digest,
            "size": len(blob),
            "annotations": {
                PREFIX + "blob-digest": digest,
                PREFIX + "blob-size": str(len(blob)),
                PREFIX + "blob-fs-type": "ext4",
                PREFIX + "version": "0.1.0",
            },
        }
    ]
    config = json.loads(client.blob(REPOSITORY, manifest["config"]["digest"], 1 << 20))  # type: ignore[index]
    assert config["rootfs"] == {"type": "layers", "diff_ids": [digest]}
    assert config["os"] == "linux"
    assert config["architecture"] in oci.ARCHITECTURES.values()
    assert pushed.file_system == "ext4"
    assert (pushed.layers[0].wrapped, pushed.layers[0].sent) == (True, True)


def test_a_layer_in_a_tar_is_pushed_as_it_is(registry: Registry, client: Client, disk: Path, tmp_path: Path) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("zstd", 16384, tar=True))
    pushed = push(client, _reference(registry), [layer])
    _, (blob,) = _pushed(client, pushed)
    assert blob == layer.read_bytes()
    assert not pushed.layers[0].wrapped


def test_a_layer_with_a_digest_table_is_announced_with_it(
    registry: Registry, client: Client, disk: Path, tmp_path: Path
) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("lz4", tar=True, digests=True))
    manifest, (blob,) = _pushed(client, push(client, _reference(registry), [layer]))
    assert blob == layer.read_bytes()
    place = digests.Place.of(manifest["layers"][0]["annotations"], len(blob))  # type: ignore[index]
    assert place is not None
    assert oci.digest_of(blob[place.offset :][: place.length]) == place.digest


def test_a_layer_that_is_not_what_its_table_says_is_not_pushed(
    registry: Registry, client: Client, disk: Path, tmp_path: Path
) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("none", tar=True, digests=True))
    content = bytearray(layer.read_bytes())
    content[20_000] ^= 1
    layer.write_bytes(content)
    with pytest.raises(CorruptImage, match="offset 0: not what its digest table says"):
        push(client, _reference(registry), [layer])
    with pytest.raises(NotFound):
        client.manifest(REPOSITORY, "v1")


def test_a_stack_keeps_its_order_and_reads_as_before(registry: Registry, client: Client, tmp_path: Path) -> None:
    plans = [
        stacks.Plan(4096, (stacks.Op(0, 200, 1),)),
        stacks.Plan(4096, (stacks.Op(100, 200, 3),), zfile=zfile.Options()),
        stacks.Plan(4096, (stacks.Op(150, 20, None),), zfile=zfile.Options(zfile.ZSTD), tar=True),
    ]
    paths = []
    for number, plan in enumerate(plans):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(plan.build())
    pushed = push(client, _reference(registry), paths)
    assert [layer.name for layer in pushed.layers] == list(map(str, paths))
    _, blobs = _pushed(client, pushed)
    with opened(*paths) as local, Engine(work_threads=1) as engine, opened_bytes(engine, *blobs) as image:
        assert image.read_at(0, image.size) == local.read_at(0, local.size)


def test_what_the_registry_has_is_not_sent_again(
    registry: Registry, client: Client, disk: Path, tmp_path: Path
) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("lz4"))
    first = push(client, _reference(registry), [layer])
    again = push(client, _reference(registry, "v2"), [layer])
    assert again.digest == first.digest
    assert not again.layers[0].sent


def test_pushed_blobs_are_in_the_cache_verified(registry: Registry, client: Client, disk: Path, tmp_path: Path) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("lz4"))
    with Engine(work_threads=1) as engine:
        cache = Cache(tmp_path / "blobs", engine)
        pushed = push(client, _reference(registry), [layer], adopt=cache.adopt)
        entry = cache.open(pushed.layers[0].digest, pushed.layers[0].size, Policy("eio"))
        assert entry.verified
        assert entry.complete
        entry.close()


def test_progress_is_told_for_each_layer(registry: Registry, client: Client, disk: Path, tmp_path: Path) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("none"))
    seen: list[tuple[str, int, int]] = []
    pushed = push(client, _reference(registry), [layer], progress=lambda *told: seen.append(told))
    assert seen[-1] == (str(layer), pushed.layers[0].size, pushed.layers[0].size)


def test_what_is_no_layer_is_not_pushed(registry: Registry, client: Client, disk: Path, tmp_path: Path) -> None:
    good = _layer(disk, tmp_path / "layer", Wrapping("lz4"))
    flat = tmp_path / "flat"
    flat.write_bytes(zfile.build(disk.read_bytes(), zfile.Options()))
    with pytest.raises(CorruptImage, match=str(disk)):
        push(client, _reference(registry), [good, disk])
    with pytest.raises(UsageError, match=str(flat)):
        push(client, _reference(registry), [flat])
    with pytest.raises(NotFound, match="missing"):
        push(client, _reference(registry), [tmp_path / "missing"])
    with pytest.raises(UsageError):
        push(client, _reference(registry), [])
    assert registry.accesses(REPOSITORY) == []


def test_a_digest_is_nothing_to_push_to(registry: Registry, client: Client, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tag"):
        push(client, Reference.parse(f"{registry.host}/{REPOSITORY}@sha256:{'0' * 64}"), [tmp_path / "layer"])


def test_a_push_whose_layers_cannot_be_kept_leaves_no_image(
    registry: Registry, client: Client, disk: Path, tmp_path: Path
) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("lz4"))

    def adopt(fd: int, digest: str) -> None:
        raise EngineError("keeping a blob failed: no space left")

    with pytest.raises(EngineError):
        push(client, _reference(registry), [layer], adopt=adopt)
    with pytest.raises(NotFound):
        client.manifest(REPOSITORY, "v1")


def test_a_push_that_breaks_leaves_no_image(registry: Registry, client: Client, disk: Path, tmp_path: Path) -> None:
    layer = _layer(disk, tmp_path / "layer", Wrapping("lz4"))
    adopted: list[str] = []

    def stop(name: str, sent: int, total: int) -> None:
        registry.stop()

    with pytest.raises(SourceError):
        push(client, _reference(registry), [layer], adopt=lambda fd, digest: adopted.append(digest), progress=stop)
    registry.start()
    assert adopted == []
    with pytest.raises(NotFound):
        client.manifest(REPOSITORY, "v1")
