# SPDX-License-Identifier: Apache-2.0
"""A blob is recognised by its content, and described as what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from blockdev.engine import Engine, LayerKind
from blockdev.errors import CorruptImage, EngineError
from blockdev.layer import Layer, open_layer, open_pair
from formats import lsmt, tar, zfile
from tests import stacks
from tests.opened import memory_blob

PLAN = stacks.Plan(2048, (stacks.Op(0, 300, 1), stacks.Op(700, 64, 2)))
RAW = PLAN.build()


@contextmanager
def _open(blob: bytes) -> Iterator[Layer]:
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(work_threads=1))
        layer = open_layer(memory_blob(engine, "the layer", blob, stack))
        stack.callback(layer.close)
        yield layer


def _wrap(blob: bytes) -> bytes:
    return tar.wrap_head(len(blob)) + blob + tar.wrap_tail(len(blob))


PACKED = zfile.build(RAW, zfile.Options(zfile.ZSTD, 16384))
SHAPES = {"raw": RAW, "zfile": PACKED, "tar of raw": _wrap(RAW), "tar of zfile": _wrap(PACKED)}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_nesting_is_recognised_and_described(shape: str) -> None:
    with _open(SHAPES[shape]) as layer:
        assert layer.virtual_size == 2048 * 512
        assert layer.table.kind is LayerKind.SEALED
        assert layer.table.file.read_at(0, len(RAW)) == RAW
        told = layer.describe()
    assert json.loads(json.dumps(told)) == told
    assert told["kind"] == "sealed"
    assert told["name"] == "the layer"
    assert told["size"] == len(SHAPES[shape])
    assert told["plain_size"] == len(RAW)
    assert told["lsmt"]["index_entries"] == 256
    assert told["lsmt"]["index_offset"] == 4096 + 364 * 512
    assert told["lsmt"]["uuid"] == lsmt.NULL_UUID
    assert ("tar" in told) == shape.startswith("tar")
    assert ("zfile" in told) == shape.endswith("zfile")
    if "zfile" in told:
        assert told["zfile"] == {
            "codec": "zstd",
            "block_size": 16384,
            "blocks": -(-len(RAW) // 16384),
            "crc": True,
            "header_overwritten": True,
        }
    if "tar" in told:
        payload = SHAPES["zfile" if "zfile" in told else "raw"]
        assert told["tar"] == {"member": "overlaybd.commit", "offset": 1536, "size": len(payload)}


def test_a_compressed_disk_is_a_flat_layer() -> None:
    disk = bytes(range(256)) * 1000
    with _open(zfile.build(disk, zfile.Options())) as layer:
        assert layer.flat
        assert layer.virtual_size == len(disk)
        assert layer.table.file.read_at(0, len(disk)) == disk
        assert "lsmt" not in layer.describe()


def test_a_pair_is_a_log_over_two_files() -> None:
    data, index = PLAN.build_pair()
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(work_threads=1))
        layer = open_pair(memory_blob(engine, "data", data, stack), memory_blob(engine, "index", index, stack))
        stack.callback(layer.close)
        assert layer.table.kind is LayerKind.LOG
        assert layer.describe()["lsmt"]["index_entries"] == 2
        assert layer.virtual_size == 2048 * 512


def test_two_files_that_are_no_pair_are_refused_by_both_names() -> None:
    data, index = PLAN.build_pair()
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(work_threads=1))
        first, second = memory_blob(engine, "one", data, stack), memory_blob(engine, "two", index, stack)
        with pytest.raises(CorruptImage, match="two with one"):
            open_pair(second, first)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_trailer_is_placed_in_the_blob_or_in_its_content(shape: str) -> None:
    broken = bytearray(RAW)
    broken[-4096] ^= 1
    blob = bytes(broken)
    place = len(RAW) - 4096
    if "zfile" in shape:
        blob = zfile.build(blob, zfile.Options())
    if "tar" in shape:
        blob = _wrap(blob)
        place += 0 if "zfile" in shape else 1536
    inside = " of the decoded content" if "zfile" in shape else ""
    with pytest.raises(CorruptImage, match=f"the layer: offset {place}{inside}: LSMT trailer"), _open(blob):
        pass


def test_a_closed_layer_is_closed_for_good() -> None:
    with _open(RAW) as layer:
        layer.close()
        layer.close()
        with pytest.raises(EngineError):
            layer.table.file.read_at(0, 1)
