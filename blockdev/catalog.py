# SPDX-License-Identifier: Apache-2.0
"""The catalog of a root: what is known of images without asking their registries.

    sha256/HEX          manifests, indexes and configs as they came, named by their digests
    tags/HEX            JSON: what a tag stood for when it was last asked, and when that was
    repositories/HEX    JSON: blobs of the cache that came from this repository

A tag's file is named by the sha256 of the tag's name, a repository's by its own. No file
names a path, so that a root may be copied. Whatever is read is checked; what is damaged counts
as not there. What cannot be written is logged, and missed only when there is no registry:
an image opens on a full disk too. Assumes one process a root; any thread may call.
"""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockdev.control import member
from blockdev.errors import BlockdevError, from_os
from blockdev.ownfile import read_own
from blockdev.replacement import UNFINISHED, replacing
from formats import oci
from formats.errors import FormatError

log = logging.getLogger(__name__)

SEEN_EVERY = 3600.0  # seconds: a tag that stays the same is not written anew at each opening
_VERSION = 1
_DAMAGED = {errno.EIO, errno.EINVAL}  # of the disk; no regular file
_DOCUMENTS = ("sha256", "sha512")
_TAGS = "tags"
_REPOSITORIES = "repositories"


@dataclass(frozen=True)
class Seen:
    """What a tag stood for at a time (seconds since 1970)."""

    digest: str
    time: float

    @property
    def date(self) -> str:
        """For people: UTC, to the second."""
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.time))


@dataclass(frozen=True)
class Place:
    """A repository, and how it was reached: what it takes to fetch a blob again."""

    registry: str
    repository: str
    plain_http: bool

    @property
    def name(self) -> str:
        """What it is known by: who answers without TLS need not be who answers with it."""
        return f"{'http://' if self.plain_http else ''}{self.registry}/{self.repository}"

    @property
    def key(self) -> str:
        """What a blob's entry in the cache knows it by."""
        return oci.digest_of(self.name.encode())

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Place:
        """What a caller says of a blob it has just pushed."""
        return cls(member(body, "registry", str), member(body, "repository", str), member(body, "plain_http", bool))


class Catalog:
    """The files below one directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()  # of all changes: prune() must not take what is being written

    # ---- documents ----

    def document(self, digest: str) -> bytes | None:
        """A manifest, index or config, if it is kept."""
        content = self._read(self._document(digest))
        if content is not None and not oci.matches(digest, content):
            log.warning("kept document is damaged digest=%s", digest)
            return None
        return content

    def manifest(self, digest: str) -> oci.Manifest | oci.Index | None:
        """A document that is an index, or a manifest whose layers say which blobs they are; if it is kept."""
        try:
            found = oci.parse_manifest(self.document(digest) or b"")
            for layer in found.layers if isinstance(found, oci.Manifest) else ():
                oci.layer_digest(layer)
        except FormatError:  # a config, whose manifest speaks for it
            return None
        return found

    def keep(self, documents: Mapping[str, bytes]) -> None:
        """Keep documents, by their digests. The blobs they lead to are in use: prune() goes by these."""
        with self._lock:
            for digest, content in documents.items():
                path = self._document(digest)
                if self._read(path) != content:
                    self._write(path, content)

    # ---- tags ----

    def seen(self, name: str) -> Seen | None:
        """What the tag `name` (registry/repository:tag) stood for last."""
        fields = self._fields(self._named(_TAGS, name), name)
        try:
            seen = Seen(fields["digest"], float(fields["seen"])) if fields else None
            return seen if seen and seen.date else None
        except (KeyError, TypeError, ValueError, OverflowError, OSError) as error:
            log.warning("kept tag is damaged name=%s: %r", name, error)
            return None

    def see(self, name: str, digest: str) -> None:
        """The registry has just said what the tag `name` stands for."""
        with self._lock:
            last = self.seen(name)
            now = time.time()
            if last is None or last.digest != digest or not 0 <= now - last.time < SEEN_EVERY:
                self._write_fields(self._named(_TAGS, name), {"name": name, "digest": digest, "seen": now})

    # ---- where blobs came from ----

    def place(self, digest: str, key: str = "") -> Place | None:
        """The repository that the blob came from, by its key; "": any that has it."""
        for path in self._files(_REPOSITORIES):
            fields = self._fields(path)
            if fields and digest in fields["blobs"]:
                place = Place(fields["registry"], fields["repository"], fields["plain_http"])
                if key in ("", place.key):
                    return place
        return None

    def note_place(self, place: Place, digests: Iterable[str]) -> None:
        """These blobs, which are in use, come from there."""
        path = self._named(_REPOSITORIES, place.name)
        with self._lock:
            known = self._fields(path, place.name) or {}
            fields = {
                "name": place.name,
                "registry": place.registry,
                "repository": place.repository,
                "plain_http": place.plain_http,
                "blobs": sorted({*known.get("blobs", ()), *digests}),
            }
            if {**known, **fields} != known:
                self._write_fields(path, fields)

    # ---- all of it ----

    def prune(self, cached: Callable[[], Collection[str]]) -> None:
        """Remove what leads to no blob of the cache. `cached` is asked once the files are known: whoever
        adds one has its blobs in the cache before."""
        with self._lock:
            documents = [path for folder in _DOCUMENTS for path in self._files(folder)]
            tags, repositories = list(self._files(_TAGS)), list(self._files(_REPOSITORIES))
            blobs = frozenset(cached())
            live = self._live(documents, blobs)
            dead = [path for path in documents if _digest_of(path) not in live]
            dead += [path for path in tags if (self._fields(path) or {}).get("digest") not in live]
            dead += [path for path in self.foreign() if path.name.endswith(UNFINISHED)]
            try:
                for path in dead:
                    path.unlink()
                for path in repositories:
                    self._prune_place(path, blobs)
            except OSError as error:
                raise from_os("prune catalog", error) from error

    def _live(self, documents: list[Path], blobs: frozenset[str]) -> set[str]:
        """Digests of the manifests that have a blob in the cache, of their configs, and of indexes that name them."""
        live: set[str] = set()
        indexes: dict[str, oci.Index] = {}
        for path in documents:
            digest = _digest_of(path)
            manifest = self.manifest(digest)
            if isinstance(manifest, oci.Index):
                indexes[digest] = manifest
            elif manifest and not blobs.isdisjoint(map(oci.layer_digest, manifest.layers)):
                live |= {digest, manifest.config.digest}
        return live | {
            digest for digest, index in indexes.items() if any(image.digest in live for image in index.manifests)
        }

    def _prune_place(self, path: Path, blobs: frozenset[str]) -> None:
        fields = self._fields(path)
        left = sorted(blobs.intersection(fields["blobs"])) if fields else []
        if not fields or not left:
            path.unlink()
        elif left != fields["blobs"]:
            self._write_fields(path, {**fields, "blobs": left})

    def foreign(self) -> list[Path]:
        """Files that are none of ours, or that were left half written."""
        if self._folder.exists() and not self._folder.is_dir():
            return [self._folder]
        rooms = {self._folder / room for room in (*_DOCUMENTS, _TAGS, _REPOSITORIES)}
        rooms = {room for room in rooms if room.is_dir()}
        ours = {path for room in rooms for path in self._files(room.name)}
        return [path for path in sorted(self._folder.rglob("*")) if path not in ours and path not in rooms]

    # ---- files ----

    def _document(self, digest: str) -> Path:
        algorithm, name = oci.parse_digest(digest)
        return self._folder / algorithm / name

    def _named(self, room: str, name: str) -> Path:
        return self._folder / room / oci.digest_of(name.encode()).partition(":")[2]

    def _files(self, room: str) -> Iterable[Path]:
        """The files of ours in a room."""
        try:
            found = sorted((self._folder / room).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [path for path in found if path.name.isalnum() and path.is_file() and not path.is_symlink()]

    def _fields(self, path: Path, name: str | None = None) -> dict[str, Any] | None:
        """What the JSON file of a tag or repository says; None if there is none, or none that can be read."""
        content = self._read(path)
        if content is None:
            return None
        try:
            fields = oci.load(content, "catalog")
            if path != self._named(path.parent.name, fields["name"]) or fields["v"] != _VERSION:
                raise FormatError("it is of another name or version")
            if path.parent.name == _REPOSITORIES:
                _check_place(fields)
            else:
                oci.parse_digest(fields["digest"])
        except (FormatError, KeyError, TypeError, AttributeError) as error:
            log.warning("kept file is damaged path=%s: %r", path, error)
            return None
        return fields

    def _read(self, path: Path) -> bytes | None:
        try:
            return read_own(path, oci.DOCUMENT_SIZE_MAX + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in _DAMAGED:
                log.warning("kept file is damaged path=%s: %s", path, error.strerror)
                return None
            raise from_os("reading the catalog failed", error, str(path)) from None

    def _write_fields(self, path: Path, fields: dict[str, Any]) -> None:
        self._write(path, json.dumps({"v": _VERSION, **fields}).encode() + b"\n")

    def _write(self, path: Path, content: bytes) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(path) as fd, open(fd, "wb", closefd=False) as file:
                file.write(content)
        except OSError as error:
            log.warning("catalog not written path=%s: %s", path, error.strerror)
        except BlockdevError as error:
            log.warning("catalog not written path=%s: %s", path, error)


def _digest_of(document: Path) -> str:
    return f"{document.parent.name}:{document.name}"


def _check_place(fields: dict[str, Any]) -> None:
    kinds = {"registry": str, "repository": str, "plain_http": bool, "blobs": list}
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise FormatError(f"{name} is no {kind.__name__}")
    if not all(isinstance(digest, str) for digest in fields["blobs"]):
        raise FormatError("blobs are no texts")
