# SPDX-License-Identifier: Apache-2.0
"""The catalog: what is kept comes back, what is damaged does not, what leads nowhere is cleaned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev import catalog as module
from blockdev.catalog import Catalog, Place
from blockdev.errors import AccessDenied
from formats import oci
from tests import requires

LAYERS = [oci.digest_of(b"one"), oci.digest_of(b"two")]
PLACE = Place("registry.example:5000", "team/app", plain_http=True)
NAME = "registry.example:5000/team/app:1"
CONFIG = oci.build_config(oci.Platform("linux", "amd64"), LAYERS)


def _manifest(*layers: str, config: bytes = CONFIG) -> bytes:
    described = oci.Descriptor(oci.OCI_CONFIG, oci.digest_of(config), len(config))
    return oci.Manifest(described, tuple(oci.Descriptor(oci.OCI_LAYER, layer, 3) for layer in layers)).build()


MANIFEST = _manifest(*LAYERS)
INDEX = oci.Index((oci.Descriptor(oci.OCI_MANIFEST, oci.digest_of(MANIFEST), len(MANIFEST)),)).build()


def _keep(catalog: Catalog, *documents: bytes) -> None:
    catalog.keep({oci.digest_of(document): document for document in documents})


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "catalog")


def _files(catalog: Catalog) -> list[Path]:
    return [path for path in catalog._folder.rglob("*") if path.is_file()]


def test_nothing_is_known_in_the_beginning(catalog: Catalog) -> None:
    assert catalog.document(oci.digest_of(b"")) is None
    assert catalog.seen(NAME) is None
    assert catalog.place(LAYERS[0]) is None
    catalog.prune(lambda: [])
    assert catalog.foreign() == []


def test_what_was_kept_is_there_for_the_next_owner_and_elsewhere(catalog: Catalog, tmp_path: Path) -> None:
    _keep(catalog, INDEX, MANIFEST, CONFIG)
    catalog.see(NAME, oci.digest_of(INDEX))
    catalog.note_place(PLACE, LAYERS)
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in _files(catalog))
    shutil.copytree(tmp_path / "catalog", tmp_path / "elsewhere")
    again = Catalog(tmp_path / "elsewhere")
    for document in (INDEX, MANIFEST, CONFIG):
        assert again.document(oci.digest_of(document)) == document
    seen = again.seen(NAME)
    assert seen
    assert seen.digest == oci.digest_of(INDEX)
    assert seen.date.startswith("20")
    assert again.place(LAYERS[1]) == PLACE
    assert again.foreign() == []


def test_a_tag_that_moved_is_what_it_was_seen_as_last(catalog: Catalog) -> None:
    catalog.see(NAME, LAYERS[0])
    catalog.see(NAME, LAYERS[1])
    seen = catalog.seen(NAME)
    assert seen
    assert seen.digest == LAYERS[1]


def test_a_tag_that_stays_is_written_seldom(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.see(NAME, LAYERS[0])
    (path,) = _files(catalog)
    written = path.stat().st_ino
    catalog.see(NAME, LAYERS[0])
    assert path.stat().st_ino == written
    monkeypatch.setattr(module, "SEEN_EVERY", 0.0)
    catalog.see(NAME, LAYERS[0])
    assert path.stat().st_ino != written


@pytest.mark.parametrize("damage", [lambda text: text[:-3], lambda text: b"", lambda text: b"x" + text[1:]])
def test_what_is_damaged_is_not_known(catalog: Catalog, damage, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    _keep(catalog, MANIFEST)
    catalog.see(NAME, oci.digest_of(MANIFEST))
    catalog.note_place(PLACE, LAYERS)
    for path in _files(catalog):
        path.write_bytes(damage(path.read_bytes()))
    assert catalog.document(oci.digest_of(MANIFEST)) is None
    assert catalog.seen(NAME) is None
    assert catalog.place(LAYERS[0]) is None
    assert caplog.text.count(" is damaged") == 3
    _keep(catalog, MANIFEST)
    catalog.see(NAME, oci.digest_of(MANIFEST))
    catalog.note_place(PLACE, LAYERS)
    assert catalog.document(oci.digest_of(MANIFEST)) == MANIFEST
    assert catalog.seen(NAME)
    assert catalog.place(LAYERS[0]) == PLACE


@pytest.mark.parametrize(
    "change",
    [{"v": 2}, {"name": "other:1"}, {"digest": "../../etc/passwd"}, {"digest": 1}, {"seen": "x"}, {"seen": 1e300}],
)
def test_a_tag_of_strange_content_is_not_known(catalog: Catalog, change: dict[str, object]) -> None:
    catalog.see(NAME, LAYERS[0])
    (path,) = _files(catalog)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert catalog.seen(NAME) is None


@pytest.mark.parametrize(
    "change", [{"blobs": "x"}, {"blobs": [{}]}, {"registry": None}, {"plain_http": 1}, {"repository": []}]
)
def test_a_place_of_strange_content_is_not_known(catalog: Catalog, change: dict[str, object]) -> None:
    catalog.note_place(PLACE, LAYERS)
    (path,) = _files(catalog)
    strange = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(strange)
    assert catalog.place(LAYERS[0]) is None
    catalog.note_place(PLACE, LAYERS)
    assert catalog.place(LAYERS[0]) == PLACE
    path.write_text(strange)
    catalog.prune(lambda: LAYERS)
    assert not path.exists()


def test_a_prune_leaves_what_leads_to_a_blob_and_nothing_else(catalog: Catalog) -> None:
    other_config = oci.build_config(oci.Platform("linux", "arm64"), ["sha256:" + "5" * 64])
    other = _manifest(oci.digest_of(b"three"), config=other_config)
    _keep(catalog, INDEX, MANIFEST, CONFIG, other, other_config)
    catalog.see(NAME, oci.digest_of(INDEX))
    catalog.see("registry.example/other:1", oci.digest_of(other))
    catalog.note_place(PLACE, [*LAYERS, oci.digest_of(b"three")])
    catalog.note_place(Place("registry.example", "other", plain_http=False), [oci.digest_of(b"three")])
    catalog.prune(lambda: [LAYERS[1]])
    assert [catalog.document(oci.digest_of(document)) for document in (INDEX, MANIFEST, CONFIG)] == [
        INDEX,
        MANIFEST,
        CONFIG,
    ]
    assert catalog.document(oci.digest_of(other)) is None
    assert catalog.document(oci.digest_of(other_config)) is None
    assert catalog.seen(NAME)
    assert catalog.seen("registry.example/other:1") is None
    assert catalog.place(LAYERS[1]) == PLACE
    assert catalog.place(LAYERS[0]) is None
    assert catalog.place(oci.digest_of(b"three")) is None
    catalog.prune(lambda: [])
    assert _files(catalog) == []


def test_what_was_left_half_written_is_named(catalog: Catalog) -> None:
    _keep(catalog, MANIFEST)
    left = catalog._folder / "sha256" / ".0123.part"
    left.write_bytes(b"half")
    strange = catalog._folder / "letter"
    strange.write_bytes(b"")
    assert catalog.foreign() == [strange, left]


def test_a_full_disk_is_said_and_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    requires.requires_root()
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        catalog = Catalog(folder / "catalog")
        _keep(catalog, MANIFEST)
        (folder / "filler").write_bytes(bytes(48 << 10))
        _keep(catalog, INDEX, b"{}" + bytes(16 << 10))
        assert "No space left" in caplog.text
        assert catalog.document(oci.digest_of(MANIFEST)) == MANIFEST
        assert catalog.foreign() == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_catalog_is_read_and_refuses_to_be_pruned(tmp_path: Path) -> None:
    requires.requires_root()
    folder = tmp_path / "fixed"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        catalog = Catalog(folder)
        _keep(catalog, MANIFEST)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        assert catalog.document(oci.digest_of(MANIFEST)) == MANIFEST
        with pytest.raises(AccessDenied, match="Read-only"):
            catalog.prune(lambda: [])
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_repository_without_tls_is_another(catalog: Catalog) -> None:
    plain = Place(PLACE.registry, PLACE.repository, plain_http=not PLACE.plain_http)
    assert plain.key != PLACE.key
    catalog.note_place(PLACE, LAYERS)
    catalog.note_place(plain, LAYERS[:1])
    assert [catalog.place(LAYERS[0], place.key) for place in (PLACE, plain)] == [PLACE, plain]
    assert catalog.place(LAYERS[1], plain.key) is None


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo])
def test_a_catalog_that_is_no_directory_holds_nothing(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "catalog")
    catalog = Catalog(tmp_path / "catalog")
    catalog.see("r/app:1", "sha256:" + "0" * 64)
    assert catalog.seen("r/app:1") is None
    assert catalog.place("sha256:" + "0" * 64) is None
    assert catalog.foreign() == [tmp_path / "catalog"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_of_the_catalog_is_not_there(tmp_path: Path, make: Callable[[Path], None]) -> None:
    digest = "sha256:" + "0" * 64
    (tmp_path / "sha256").mkdir()
    make(tmp_path / "sha256" / ("0" * 64))
    catalog = Catalog(tmp_path)
    assert catalog.document(digest) is None
    catalog.keep({digest: b"{}"})
    assert catalog.foreign() == [tmp_path / "sha256" / ("0" * 64)]
