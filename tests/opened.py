# SPDX-License-Identifier: Apache-2.0
"""Images of local files, opened in this process, and what they hash to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blockdev.engine import Engine, RunKind
from blockdev.image import OpenImage, open_image
from blockdev.layer import NamedBlob

_PIECE = 1 << 20


@contextmanager
def opened(*lowers: Path, upper: Sequence[Path] = ()) -> Iterator[OpenImage]:
    """The image of local layers, bottom first; `upper` is a read-write pair: data, index."""
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(work_threads=1))
        blobs = [file_blob(engine, path, stack) for path in lowers]
        pair = (file_blob(engine, upper[0], stack), file_blob(engine, upper[1], stack)) if upper else None
        yield stack.enter_context(open_image(engine, blobs, pair))


@contextmanager
def opened_bytes(engine: Engine, *lowers: bytes, upper: Sequence[bytes] = ()) -> Iterator[OpenImage]:
    """The image of layers in memory, named "layer 0" and so on."""
    with ExitStack() as stack:
        blobs = [memory_blob(engine, f"layer {place}", blob, stack) for place, blob in enumerate(lowers)]
        pair = [memory_blob(engine, name, blob, stack) for name, blob in zip(("data", "index"), upper, strict=False)]
        yield stack.enter_context(open_image(engine, blobs, (pair[0], pair[1]) if pair else None))


def file_blob(engine: Engine, path: Path, stack: ExitStack) -> NamedBlob:
    """A local file as a blob that `stack` closes."""
    with open(path, "rb") as file:
        blob = engine.open_local(file.fileno(), os.fstat(file.fileno()).st_size)
    return NamedBlob(str(path), stack.enter_context(blob))


def memory_blob(engine: Engine, name: str, content: bytes, stack: ExitStack) -> NamedBlob:
    """Bytes as a local blob that `stack` closes."""
    with open(os.memfd_create("blob", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        file.write(content)
        return NamedBlob(name, stack.enter_context(engine.open_local(file.fileno(), len(content))))


def sha256(image: OpenImage) -> str:
    """Of the whole disk."""
    digest = hashlib.sha256()
    zeros = bytes(_PIECE)
    at = 0
    while at < image.size:
        for run in image.runs(at, image.size - at):
            end = run.offset + run.length
            while at < end:
                length = min(_PIECE, end - at)
                digest.update(image.read_at(at, length) if run.kind is RunKind.DATA else zeros[:length])
                at += length
    return digest.hexdigest()
