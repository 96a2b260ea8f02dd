# SPDX-License-Identifier: Apache-2.0
"""Layers as an image in a registry, as overlaybd's own snapshotter would take it.

Every layer is checked to be one and is pushed inside overlaybd's tar wrapper, which is
put around it here where it is missing. A layer that carries a digest table is held against it, and its
descriptor says so. The config says no more than the layers do.
Blobs come first and the manifest last, so a failed push leaves no image behind.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from blockdev.build.depot import BlobFile, document_of, put_bytes
from blockdev.build.repository import Repository
from blockdev.engine import Engine
from blockdev.errors import CorruptImage, UsageError, from_os
from blockdev.image import OpenImage, open_image
from blockdev.layer import NamedBlob
from blockdev.registry.client import Client
from blockdev.regular import open_regular
from formats import digests, oci, superblock, tar
from formats.errors import FormatError

_PIECE = 4 << 20  # bytes hashed or copied at a time
_SCRATCH = "/var/tmp"  # for a layer that has to be wrapped: /tmp is often memory

Adopt = Callable[[int, str], None]  # a descriptor that reads the blob, and its digest
Progress = Callable[[str, int, int], None]  # layer, bytes sent, bytes in all


@dataclass(frozen=True)
class PushedLayer:
    """A layer that the registry has now. `wrapped`: the tar was put around it here; `sent`: it was not there before."""

    name: str
    digest: str
    size: int
    wrapped: bool
    sent: bool


@dataclass(frozen=True)
class Pushed:
    """An image that the registry has now, under `reference` and under `digest`."""

    reference: str
    digest: str
    file_system: str
    layers: tuple[PushedLayer, ...]


@dataclass(frozen=True)
class _Blob:
    """A layer as it will be pushed: an open file, and what it is."""

    name: str
    file: BinaryIO
    digest: str
    size: int
    wrapped: bool
    table: digests.Table | None


def push(
    client: Client,
    reference: oci.Reference,
    layers: Sequence[Path],
    *,
    adopt: Adopt | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Push local layer files, bottom first, as `reference`, which must have a tag and no digest.

    `adopt` is given each blob once the registry has all of them; then comes the image. CorruptImage or UsageError if
    the files make no image; the errors of registry.client.Client.
    """
    if reference.digest or not reference.tag:
        raise UsageError(f"push: {reference}: want a tag to push to, not a digest")
    with ExitStack() as stack:
        blobs, file_system = _prepare(layers, stack)
        repository = Repository(client, reference)
        pushed = []
        for blob in blobs:
            sent = _upload(repository, blob, progress or _silent)
            pushed.append(PushedLayer(blob.name, blob.digest, blob.size, blob.wrapped, sent))
        for blob in blobs:
            if adopt:
                adopt(blob.file.fileno(), blob.digest)
        digest = _put_image(repository, blobs, file_system)
        return Pushed(str(reference), digest, file_system, tuple(pushed))


def _prepare(paths: Sequence[Path], stack: ExitStack) -> tuple[list[_Blob], str]:
    """What to push, and the file system that the disk holds ("" if none is known)."""
    files = []
    for path in paths:
        files.append(stack.enter_context(os.fdopen(open_regular(path, "push"), "rb")))
    tables: list[digests.Table | None] = []
    with ExitStack() as reading:
        engine = reading.enter_context(Engine(work_threads=1))
        blobs = []
        for path, file in zip(paths, files, strict=True):
            blob = engine.open_local(file.fileno(), os.fstat(file.fileno()).st_size)
            blobs.append(NamedBlob(str(path), reading.enter_context(blob)))
        image = reading.enter_context(open_image(engine, blobs))
        flat = next((layer.name for layer in image.layers if layer.flat), None)
        if flat:
            raise UsageError(f"push: {flat}: it is a compressed disk and no layer; import the disk first")
        wrapped = [layer.tar is None for layer in image.layers]
        tables = [_table(named) for named in blobs]
        file_system = superblock.file_system(_head(image)) or ""
    made = []
    for path, file, wrap, table in zip(paths, files, wrapped, tables, strict=True):
        pushed = _in_tar(str(path), file, stack) if wrap else file
        made.append(_blob(str(path), pushed, table, wrapped=wrap))
    return made, file_system


def _table(named: NamedBlob) -> digests.Table | None:
    try:
        return digests.find(named.blob)
    except FormatError as error:
        raise CorruptImage(f"push: {named.name}: offset {error.offset or 0}: {error.what}") from error


def _head(image: OpenImage) -> bytes:
    return image.read_at(0, min(superblock.HEAD_SIZE, image.size))


def _in_tar(name: str, file: BinaryIO, stack: ExitStack) -> BinaryIO:
    scratch = os.environ.get("TMPDIR", _SCRATCH)
    try:
        return _wrapped(file, stack.enter_context(TemporaryFile(dir=scratch)))
    except OSError as error:
        raise from_os("push", error, name) from error


def _blob(name: str, file: BinaryIO, table: digests.Table | None, *, wrapped: bool) -> _Blob:
    """What the file is; CorruptImage if it is not what its own table says."""
    digest, size = hashlib.sha256(), 0
    try:
        while piece := os.pread(file.fileno(), _PIECE, size):
            digest.update(piece)
            for at in range(0, len(piece) if table else 0, digests.UNIT):
                if table and not table.matches((size + at) // digests.UNIT, piece[at : at + digests.UNIT]):
                    raise CorruptImage(f"push: {name}: offset {size + at}: not what its digest table says")
            size += len(piece)
    except OSError as error:
        raise from_os("push", error, name) from error
    return _Blob(name, file, f"sha256:{digest.hexdigest()}", size, wrapped, table)


def _wrapped(layer: BinaryIO, out: BinaryIO) -> BinaryIO:
    """A copy of the layer in overlaybd's tar."""
    size = os.fstat(layer.fileno()).st_size
    out.write(tar.wrap_head(size))
    done = 0
    while piece := os.pread(layer.fileno(), _PIECE, done):
        out.write(piece)
        done += len(piece)
    if done != size:
        raise UsageError("push: a layer changes while it is read")
    out.write(tar.wrap_tail(size))
    out.flush()
    return out


def _upload(repository: Repository, blob: _Blob, progress: Progress) -> bool:
    named = BlobFile(blob.digest, blob.size, blob.file.fileno())
    sent = repository.put_blob(named, lambda sent: progress(blob.name, sent, blob.size))
    progress(blob.name, blob.size, blob.size)
    return sent


def _put_image(repository: Repository, blobs: Sequence[_Blob], file_system: str) -> str:
    """Config and manifest; the manifest's digest."""
    config = oci.build_config(oci.Platform.of_machine(platform.machine()), [blob.digest for blob in blobs])
    layers = tuple(
        oci.Descriptor(
            oci.OCI_LAYER,
            blob.digest,
            blob.size,
            oci.layer_annotations(blob.digest, blob.size, file_system)
            | (blob.table.place.annotations() if blob.table else {}),
        )
        for blob in blobs
    )
    manifest = document_of(oci.Manifest(put_bytes(repository, oci.OCI_CONFIG, config), layers))
    repository.tag(manifest)
    return manifest.digest


def _silent(name: str, sent: int, total: int) -> None:
    pass
