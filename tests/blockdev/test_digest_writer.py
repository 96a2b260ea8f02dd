# SPDX-License-Identifier: Apache-2.0
"""Layers with a digest table: what is written once is hashed once, what is written anew is hashed as it ends up."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from blockdev.build.disk import LayerOptions, import_disk
from blockdev.build.layerfile import LayerFile, Wrapping
from blockdev.errors import UsageError
from formats import tar
from formats.digests import Table, TableWriter
from formats.lsmt import CommitWriter, Head
from formats.readat import BytesAt
from tests.opened import opened, sha256

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk() -> bytes:
    noise = random.Random(5)
    return (noise.randbytes(900_000) + bytes(MIB) + b"text " * 100_000).ljust(4 * MIB, b"\0")


def layer(disk: bytes, folder: Path, wrapping: Wrapping, *, stream: bool = False) -> bytes:
    """The layer of a disk, which is read from a file or comes as a stream."""
    (folder / "raw").write_bytes(disk)
    out = folder / "layer"
    if not stream:
        with open(folder / "raw", "rb") as file:
            import_disk(file.fileno(), "raw", out, LayerOptions(wrapping, jobs=2))
        return out.read_bytes()
    reader, writer = os.pipe()

    def send() -> None:
        with open(writer, "wb") as pipe:
            pipe.write(disk)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        import_disk(reader, "-", out, LayerOptions(wrapping, jobs=2))
    finally:
        sender.join()
        os.close(reader)
    return out.read_bytes()


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_table_is_that_of_the_file_and_nothing_else_changes(
    tmp_path: Path, disk: bytes, codec: str, stream: bool
) -> None:
    plain = layer(disk, tmp_path, Wrapping(codec, 4096, tar=True), stream=stream)
    blob = layer(disk, tmp_path, Wrapping(codec, 4096, tar=True, digests=True), stream=stream)
    size = len(plain) - len(tar.END)
    assert blob[:size] == plain[:size]
    writer = TableWriter(0)
    writer.add(plain[:size])
    table = writer.finish(plain[: 256 << 10])
    assert blob[size:] == table.tail
    assert Table.parse(blob[table.place.offset :][: table.place.length]).place == table.place
    payload = tar.find_payload(BytesAt(blob))
    assert payload is not None
    assert payload.length <= size - tar.WRAP_HEAD_SIZE
    (tmp_path / "plain").write_bytes(plain)
    with opened(tmp_path / "layer") as image, opened(tmp_path / "plain") as same:
        assert sha256(image) == sha256(same)


def test_the_layer_file_tells_its_table(tmp_path: Path) -> None:
    noise = random.Random(2).randbytes(MIB)
    with open(tmp_path / "layer", "w+b") as file:
        with LayerFile(file.fileno(), Wrapping("lz4", 4096, tar=True, digests=True), jobs=2) as out:
            writer = CommitWriter(out.write, Head(0, MIB))
            writer.data(0, noise)
            writer.finish()
            size = out.finish()
        assert out.table is not None
        assert out.table.blob_size == size == os.fstat(file.fileno()).st_size
        blob = os.pread(file.fileno(), size, 0)
    units = [out.table.span(number) for number in range(-(-size // (256 << 10)))]
    assert all(out.table.matches(number, blob[at : at + length]) for number, (at, length) in enumerate(units))


def test_no_table_where_none_is_wanted(tmp_path: Path) -> None:
    with (
        open(tmp_path / "layer", "w+b") as file,
        LayerFile(file.fileno(), Wrapping("none", tar=True)) as out,
    ):
        out.write(bytes(4096))
        out.finish()
        assert out.table is None


def test_a_table_needs_a_tar() -> None:
    with pytest.raises(UsageError, match="member of the tar"):
        Wrapping("lz4", digests=True).check()
