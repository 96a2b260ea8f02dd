# SPDX-License-Identifier: Apache-2.0
"""A conversion makes the same image of the same source always, keeps what it says, and leaves nothing half-made."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from blockdev.build.convert import Converted, Options, convert
from blockdev.build.depot import Depot, Read
from blockdev.build.layerfile import Wrapping
from blockdev.build.layout import Layout
from blockdev.build.repository import Repository
from blockdev.build.workshop import Workshop
from blockdev.cache import Cache
from blockdev.config import Policy
from blockdev.engine import Engine
from blockdev.errors import AccessDenied, BlockdevError, CorruptImage, EngineError, NotFound, UsageError
from blockdev.registry.client import Client, Document
from blockdev.root import Root
from formats import layout, oci
from tests import ordinary
from tests.fakes.http_server import Answer, HttpServer, Seen
from tests.images import TAG
from tests.ordinary import digests, document, lower, make, manifest, upper
from tests.registries import Registry
from tests.requires import requires_command, requires_root, scaled
from tests.small_image import NOBODY

PREFIX = "containerd.io/snapshot/overlaybd/"
FILES = scaled(3_000, 30_000)
# A changed byte costs all metadata anew, 40 to 50 bytes of a file once compressed: 1.5 MiB at 30,000 files.
BYTE_COST = (3 << 19) * FILES // 30_000
WRAPPING = Wrapping("lz4", 4096, tar=True, digests=True)


class Converter:
    """Conversions of one root's, in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = Root(folder)
        self.root.prepare()
        self._engine = Engine(work_threads=1)
        self.cache = Cache(self.root.blobs, self._engine)

    def __call__(self, source: Depot | Path, target: Depot | Path, **options: Any) -> Converted:
        workshop = Workshop(self.root, self.cache.adopt)
        chosen = Options(**{"platform": None, "wrapping": WRAPPING, "jobs": 2, **options})
        try:
            return convert(_depot(source), _depot(target), workshop, chosen)
        finally:
            workshop.close()

    def close(self) -> None:
        self._engine.close()


def _depot(place: Depot | Path) -> Depot:
    return Layout(place, TAG) if isinstance(place, Path) else place


@pytest.fixture
def converter(tmp_path: Path) -> Iterator[Converter]:
    made = Converter(tmp_path / "root")
    yield made
    made.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "source", lower, upper)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "block"


# ---- what comes out -------------------------------------------------------------------------


def test_manifest_and_config_say_what_a_snapshotter_reads_and_what_the_source_said(
    converter: Converter, source: Path, target: Path
) -> None:
    converter(source, target)
    found, before = manifest(target), manifest(source)
    assert found["mediaType"] == oci.OCI_MANIFEST
    for layer in found["layers"]:
        blob = (target / layout.blob_path(layer["digest"])).read_bytes()
        assert (oci.digest_of(blob), len(blob)) == (layer["digest"], layer["size"])
        assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar"
        said = layer["annotations"]
        assert said[PREFIX + "version"] == "0.1.0"
        assert said[PREFIX + "blob-digest"] == layer["digest"]
        assert said[PREFIX + "blob-size"] == str(layer["size"])
        assert said[PREFIX + "blob-fs-type"] == "erofs"
        assert "dev.ociblk.digests.digest" in said
    config = document(target, found["config"]["digest"])
    original = document(source, before["config"]["digest"])
    assert config.pop("rootfs") == {"type": "layers", "diff_ids": digests(target)}
    original.pop("rootfs")
    assert config == original


def test_what_was_built_is_in_the_cache_verified(converter: Converter, source: Path, target: Path) -> None:
    for layer in converter(source, target).images[0].layers:
        entry = converter.cache.open(layer.digest, layer.size, Policy("eio"))
        assert entry.verified
        entry.close()


def test_content_that_a_lower_layer_has_is_not_stored_again(converter: Converter, source: Path, target: Path) -> None:
    sizes = [layer.size for layer in converter(source, target).images[0].layers]
    assert sizes[0] > 2_300_000
    assert sizes[1] < 50_000, "it has the lower layer's 300,000 random bytes once more"


@pytest.mark.parametrize("wrapping", [WRAPPING, Wrapping("zstd", 65536, tar=True)])
def test_the_result_does_not_depend_on_jobs_or_on_what_was_made_before(
    converter: Converter, tmp_path: Path, source: Path, wrapping: Wrapping
) -> None:
    made = converter(source, tmp_path / "first", jobs=1, wrapping=wrapping)
    again = converter(source, tmp_path / "second", wrapping=wrapping)
    assert [layer.reused for layer in again.images[0].layers] == [True, True]
    shutil.rmtree(converter.root.converted)
    anew = converter(source, tmp_path / "third", jobs=8, wrapping=wrapping)
    assert [layer.reused for layer in anew.images[0].layers] == [False, False]
    assert made.digest == again.digest == anew.digest


def test_another_top_layer_changes_no_layer_below(converter: Converter, tmp_path: Path, source: Path) -> None:
    def other(tar: tarfile.TarFile) -> None:
        ordinary.add(tar, "etc/other", b"x")

    converter(source, tmp_path / "before")
    rebuilt = make(tmp_path / "rebuilt", lower, other)
    found = converter(rebuilt, tmp_path / "after")
    assert digests(tmp_path / "before")[0] == digests(tmp_path / "after")[0]
    assert digests(tmp_path / "before")[1] != digests(tmp_path / "after")[1]
    assert [layer.reused for layer in found.images[0].layers] == [True, False]
    shutil.rmtree(converter.root.converted)
    assert converter(rebuilt, tmp_path / "anew").digest == found.digest


def test_a_layer_that_the_cache_has_lost_or_spoilt_is_made_again(
    converter: Converter, tmp_path: Path, source: Path
) -> None:
    made = converter(source, tmp_path / "first")
    lost, spoilt = (
        converter.root.blobs / "sha256" / layer.digest.removeprefix("sha256:") for layer in made.images[0].layers
    )
    lost.unlink()
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"x")
    again = converter(source, tmp_path / "second")
    assert [layer.reused for layer in again.images[0].layers] == [False, False]
    assert again.digest == made.digest


@pytest.mark.parametrize("record", [b"\xff", b"[1]", b'{"digest":1,"written":{},"places":[]}'])
def test_a_record_that_is_damaged_is_none(converter: Converter, tmp_path: Path, source: Path, record: bytes) -> None:
    made = converter(source, tmp_path / "first")
    for path in converter.root.converted.iterdir():
        path.write_bytes(record)
    assert converter(source, tmp_path / "second").digest == made.digest


def test_a_changed_byte_in_an_image_of_many_files_costs_its_metadata_only(
    converter: Converter,
    tmp_path: Path,
    target: Path,
    record_measured: Callable[[str, dict[str, object]], None],
) -> None:
    def many(tar: tarfile.TarFile) -> None:
        chance = random.Random(2)
        for number in range(FILES):
            content = chance.randbytes(chance.randrange(1, 500))
            ordinary.add(tar, f"usr/d{number % 300}/file-{number}.name", content, mtime=number)

    def change(tar: tarfile.TarFile) -> None:
        ordinary.add(tar, "usr/d1/file-1.name", b"y")

    layers = converter(make(tmp_path / "many", many, change), target).images[0].layers
    record_measured("convert-byte", {"files": FILES, "layer_bytes": layers[1].size, "bound": BYTE_COST})
    assert layers[1].size <= BYTE_COST


def test_progress_ends_where_it_should(converter: Converter, source: Path, target: Path) -> None:
    told: list[tuple[str, int, int]] = []
    workshop = Workshop(converter.root, converter.cache.adopt)
    options = Options(None, wrapping=WRAPPING, jobs=1)
    convert(_depot(source), _depot(target), workshop, options, lambda *now: told.append(now))
    workshop.close()
    read = [done for stage, done, _ in told if stage == "converted"]
    assert read == sorted(read)
    assert read[-1] == sum(layer["size"] for layer in manifest(source)["layers"])


# ---- platforms and referrers ----------------------------------------------------------------


_WITH_MORE = {"os": "linux", "architecture": "amd64", "os.version": "10.0.1", "os.features": ["x", "y"]}


@pytest.fixture
def platforms(tmp_path: Path, source: Path) -> Path:
    """Two images under one name, and an attestation of which nothing is there."""
    other = make(tmp_path / "arm", lower)
    shutil.copytree(other / "blobs", source / "blobs", dirs_exist_ok=True)
    first, second = (json.loads((folder / "index.json").read_bytes())["manifests"][0] for folder in (source, other))
    first.pop("annotations")
    entries = [
        {**first, "platform": _WITH_MORE},
        {
            **second,
            "annotations": {"kept": "yes"},
            "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"},
        },
        {
            "mediaType": oci.OCI_MANIFEST,
            "digest": oci.digest_of(b"none"),
            "size": 4,
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
        },
    ]
    body = oci.canonical({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries})
    (source / layout.blob_path(oci.digest_of(body))).write_bytes(body)
    top = oci.Descriptor(oci.OCI_INDEX, oci.digest_of(body), len(body), {layout.REF_NAME: TAG})
    (source / "index.json").write_bytes(oci.Index((top,)).build())
    return source


def test_all_platforms_become_an_index_without_attestations(
    converter: Converter, platforms: Path, target: Path
) -> None:
    made = converter(platforms, target)
    index = manifest(target)
    assert [entry["platform"] for entry in index["manifests"]] == [
        _WITH_MORE,
        {"os": "linux", "architecture": "arm64", "variant": "v8"},
    ]
    assert index["manifests"][1]["annotations"] == {"kept": "yes"}
    assert [image.digest for image in made.images] == [entry["digest"] for entry in index["manifests"]]
    first, second = (document(target, image.digest)["layers"] for image in made.images)
    assert first[0] == second[0], "the layer they have in common"


def test_one_platform_becomes_an_image(converter: Converter, platforms: Path, target: Path) -> None:
    made = converter(platforms, target, platform=oci.Platform("linux", "arm64"))
    assert len(manifest(target)["layers"]) == 1
    assert made.images[0].platform == "linux/arm64/v8"
    with pytest.raises(NotFound, match="no image for linux/s390x"):
        converter(platforms, target, platform=oci.Platform("linux", "s390x"))


def test_an_only_image_is_taken_unless_another_platform_is_insisted_on(
    converter: Converter, source: Path, target: Path
) -> None:
    other = oci.Platform("linux", "sparc")
    with pytest.raises(NotFound, match="no image for linux/sparc"):
        converter(source, target, platform=other, strict=True)
    assert not target.exists()
    made = converter(source, target, platform=other)
    assert converter(source, target, platform=oci.Platform("linux", "amd64"), strict=True).digest == made.digest


def test_an_index_without_images_is_refused(converter: Converter, source: Path, target: Path) -> None:
    body = oci.Index(()).build()
    Layout(source, TAG).tag(Document(oci.OCI_INDEX, oci.digest_of(body), body))
    with pytest.raises(NotFound, match="no images"):
        converter(source, target)


def test_a_referrer_is_found_from_its_source(
    converter: Converter, registry: Registry, target: Path, source: Path
) -> None:
    requires_command("skopeo")
    ordinary_image = f"{registry.host}/team/app:1"
    command = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{source}:{TAG}"]
    subprocess.run([*command, f"docker://{ordinary_image}"], check=True, timeout=60)
    client = Client(registry.host, NOBODY)
    repository = Repository(client, oci.Reference.parse(ordinary_image))
    before = client.manifest("team/app", "1")
    made = converter(repository, repository, referrer=True)
    assert client.manifest("team/app", "1") == before, "the source keeps its tag"
    listed = json.loads(client.manifest("team/app", before.digest.replace(":", "-")).body)["manifests"]
    found = client.manifest("team/app", listed[0]["digest"])
    assert [entry["artifactType"] for entry in listed] == [oci.NATIVE_ARTIFACT]
    said = json.loads(found.body)
    assert said["artifactType"] == oci.NATIVE_ARTIFACT
    assert said["subject"] == {"mediaType": before.media_type, "digest": before.digest, "size": len(before.body)}
    assert found.digest == made.digest
    with pytest.raises(UsageError, match="has to be where its subject is"):
        converter(repository, target, referrer=True)
    with pytest.raises(UsageError, match="take its source's place"):
        converter(repository, repository)
    client.close()


def test_referrers_in_a_layout_are_entries_without_a_name(converter: Converter, platforms: Path) -> None:
    made = converter(platforms, Layout(platforms, "block"), referrer=True)
    entries = json.loads((platforms / "index.json").read_bytes())["manifests"]
    referrers = {entry["digest"] for entry in entries if entry.get("artifactType") == oci.NATIVE_ARTIFACT}
    assert referrers == {made.digest, *(image.digest for image in made.images)}
    subjects = {document(platforms, digest)["subject"]["digest"] for digest in referrers}
    assert subjects == {entries[0]["digest"], *(image.source for image in made.images)}
    assert Layout(platforms, "block").document("").digest == made.digest


@pytest.mark.parametrize("into", ["it:TAG", "it", "link", "link/../it", "link:TAG"])
def test_a_source_keeps_its_tag_however_it_is_spelled(converter: Converter, source: Path, into: str) -> None:
    (source.parent / "link").symlink_to(source)
    before = (source / "index.json").read_bytes()
    target = into.replace("it", source.name).replace("TAG", TAG)
    for read in (f"{source}", f"{source}:{TAG}"):
        if read == str(source) or target.endswith(TAG):
            with pytest.raises(UsageError, match="take its source's place"):
                converter(Layout.parse(read), Layout.parse(f"{source.parent}/{target}"))
    assert (source / "index.json").read_bytes() == before
    converter(Layout.parse(str(source)), Layout(source, "another"))


def test_a_tag_beside_a_digest_is_the_sources(converter: Converter, registry: Registry, source: Path) -> None:
    client = Client(registry.host, NOBODY)
    names = ("1", f"1@{oci.digest_of(b'')}", "2")
    depots = [Repository(client, oci.Reference.parse(f"{registry.host}/team/app:{name}")) for name in names]
    assert [depots[0].displaces(depot) for depot in (*depots, Layout(source, "1"))] == [True, True, False, False]
    client.close()


def test_a_blob_of_the_target_that_is_damaged_is_brought_again(
    converter: Converter, source: Path, target: Path
) -> None:
    made = converter(source, target).images[0].layers
    path = target / layout.blob_path(made[0].digest)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [layer.sent for layer in converter(source, target).images[0].layers] == [True, False]
    assert path.read_bytes() == content


# ---- what is wrong --------------------------------------------------------------------------


def _refused(converter: Converter, kind: type[BlockdevError], source: Path, target: Path) -> str:
    """What it says. Nothing is under the target's tag."""
    with pytest.raises(kind) as raised:
        converter(source, target)
    assert not (target / "index.json").exists()
    return str(raised.value)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    requires_root()
    point = tmp_path / "tiny"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(point)], check=True)
    yield point
    subprocess.run(["umount", "--lazy", str(point)], check=True)


def test_a_target_of_a_version_that_is_not_known_is_left_alone(
    converter: Converter, source: Path, target: Path
) -> None:
    target.mkdir()
    (target / "oci-layout").write_text('{"imageLayoutVersion": "9"}')
    assert "version '9'" in _refused(converter, CorruptImage, source, target)
    assert [path.name for path in target.iterdir()] == ["oci-layout"]


def test_a_full_target_has_no_image(converter: Converter, tiny: Path, source: Path) -> None:
    assert "No space left" in _refused(converter, EngineError, source, tiny / "block")


def test_without_room_for_its_records_there_is_no_image(
    converter: Converter, tiny: Path, tmp_path: Path, source: Path, target: Path
) -> None:
    converter(source, tmp_path / "first")
    shutil.copytree(converter.root.converted, tiny / "converted")
    shutil.rmtree(converter.root.converted)
    converter.root.converted.symlink_to(tiny / "converted")
    with open(tiny / "full", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert "No space left" in _refused(converter, EngineError, source, target)


def test_without_room_for_scratch_there_is_no_image(tiny: Path, source: Path, target: Path) -> None:
    converter = Converter(tiny / "root")
    try:
        assert "No space left" in _refused(converter, EngineError, source, target)
    finally:
        converter.close()


def test_a_target_that_cannot_be_written_to_is_denied(converter: Converter, tiny: Path, source: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny)], check=True)
    assert "Read-only file system" in _refused(converter, AccessDenied, source, tiny / "block")


def test_a_registry_that_takes_nothing_says_so_before_anything_is_made(converter: Converter, source: Path) -> None:
    with HttpServer(lambda seen: Answer(404 if seen.method == "HEAD" else 403)) as server:
        client = Client(server.host, NOBODY)
        target = Repository(client, oci.Reference.parse(f"{server.host}/app:one"))
        with pytest.raises(AccessDenied):
            converter(source, target)
        client.close()
    assert not converter.root.converted.exists()


class Endless(Layout):
    """An image whose topmost layer does not end."""

    @contextmanager
    def opened(self, blob: oci.Descriptor) -> Iterator[Read]:
        if blob.digest != digests(self.folder)[-1]:
            with super().opened(blob) as read:
                yield read
            return
        entry = tarfile.TarInfo("endless")
        entry.size = 1 << 43
        head = io.BytesIO(entry.tobuf())
        yield lambda length: head.read(length) or bytes(length)


def test_a_layer_that_cannot_be_sent_ends_the_making_of_the_next_one(converter: Converter, source: Path) -> None:
    def answer(seen: Seen) -> Answer:
        status = {"HEAD": 404, "POST": 202, "DELETE": 204}.get(seen.method, 403)
        return Answer(status, {"Location": "/upload"} if status == 202 else {})

    with HttpServer(answer) as server:
        client = Client(server.host, NOBODY)
        target = Repository(client, oci.Reference.parse(f"{server.host}/app:one"))
        with pytest.raises(AccessDenied):
            converter(Endless(source, TAG), target)
        client.close()


Change = Callable[[dict[str, Any], dict[str, Any]], object]
_BLOCKS = {PREFIX + "blob-digest": oci.digest_of(b"")}
_WRONG: dict[str, tuple[Change, type[BlockdevError], str]] = {
    "another archive": (
        lambda manifest, config: config["rootfs"].update(diff_ids=[oci.digest_of(b"x")]),
        CorruptImage,
        "another digest than the config says",
    ),
    "another number": (lambda manifest, config: config["rootfs"].update(diff_ids=[]), CorruptImage, "0 diff_ids"),
    "no diff_ids": (lambda manifest, config: config.pop("rootfs"), CorruptImage, "want a list of digests"),
    "no layers": (lambda manifest, config: manifest.update(layers=[]), UsageError, "it has no layers"),
    "too many": (
        lambda manifest, config: (
            manifest.update(layers=manifest["layers"] * 256),
            config["rootfs"].update(diff_ids=config["rootfs"]["diff_ids"] * 256),
        ),
        UsageError,
        "at most 255 can be stacked",
    ),
    "no archive": (lambda manifest, config: manifest["layers"][0].update(mediaType="text/x"), UsageError, "text/x"),
    "blocks": (
        lambda manifest, config: manifest["layers"][0].update(annotations=_BLOCKS),
        UsageError,
        "a block image already",
    ),
}


@pytest.mark.parametrize("wrong", _WRONG)
def test_an_image_that_is_wrong_is_refused(converter: Converter, tmp_path: Path, target: Path, wrong: str) -> None:
    change, kind, words = _WRONG[wrong]
    source = make(tmp_path / "source", lower)
    found = manifest(source)
    config = document(source, found["config"]["digest"])
    change(found, config)
    body = oci.canonical(config)
    (source / layout.blob_path(oci.digest_of(body))).write_bytes(body)
    found["config"] |= {"digest": oci.digest_of(body), "size": len(body)}
    body = oci.canonical(found)
    (source / layout.blob_path(oci.digest_of(body))).write_bytes(body)
    entry = oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(body), len(body), {layout.REF_NAME: TAG})
    (source / "index.json").write_bytes(oci.Index((entry,)).build())
    assert words in _refused(converter, kind, source, target)


@pytest.mark.parametrize("wrong", ["cut", "changed", "no tar"])
def test_a_blob_that_is_wrong_is_named(converter: Converter, tmp_path: Path, target: Path, wrong: str) -> None:
    source = make(tmp_path / "source", lower)
    digest = digests(source)[0]
    path = source / layout.blob_path(digest)
    content = path.read_bytes()
    if wrong == "cut":
        path.write_bytes(content[:-100])
    elif wrong == "changed":
        path.write_bytes(gzip.compress(gzip.decompress(content)[:-1] + b"x", 1))
    else:
        path.write_bytes(b"no tar" * 1000)
    assert digest.removeprefix("sha256:") in _refused(converter, CorruptImage, source, target)


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"wrapping": Wrapping("lz4", 5000)}])
def test_options_that_make_no_sense_are_refused(
    converter: Converter, source: Path, target: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        converter(source, target, **wrong)
    assert not target.exists()
