# SPDX-License-Identifier: Apache-2.0
"""verify finds what is wrong with a layer, wherever it is, and says where."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack

import pytest

from blockdev.build.verify import Verified, verify_layer
from blockdev.engine import Engine
from blockdev.errors import CorruptImage
from formats import zfile
from tests import stacks
from tests.opened import memory_blob

OPS = (stacks.Op(0, 300, 1), stacks.Op(700, 64, 2), stacks.Op(100, 50, None))
RAW = stacks.Plan(2048, OPS).build()
PACKED = stacks.Plan(2048, OPS, zfile=zfile.Options(), tar=True).build()
UNCHECKED = stacks.Plan(2048, OPS, zfile=zfile.Options(verify=False)).build()


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _verify(blob: bytes, digest: str | None = None) -> Verified:
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(work_threads=1))
        return verify_layer(engine, memory_blob(engine, "the layer", blob, stack), digest)


@pytest.mark.parametrize("blob", [RAW, PACKED, UNCHECKED], ids=["raw", "packed", "unchecked"])
def test_a_good_layer_is_verified_and_said_to_have_checksums_or_not(blob: bytes) -> None:
    found = _verify(blob, _digest(blob))
    assert found == Verified("the layer", _digest(blob), len(blob), len(RAW), checksums=blob is PACKED)
    assert _verify(blob) == found


def test_a_damaged_block_is_named_by_its_offset() -> None:
    place = len(PACKED) // 2
    damaged = bytearray(PACKED)
    damaged[place] ^= 1
    with pytest.raises(CorruptImage, match="the layer: ZFile block") as refusal:
        _verify(bytes(damaged), _digest(PACKED))
    offset = int(str(refusal.value).split("offset ")[1].split(":")[0])
    assert 0 <= place - offset < 4096 + 100


def test_damage_that_no_checksum_covers_shows_in_the_digest() -> None:
    damaged = bytearray(RAW)
    damaged[5000] ^= 1
    assert _verify(bytes(damaged)).digest == _digest(bytes(damaged))
    with pytest.raises(CorruptImage, match=_digest(bytes(damaged))):
        _verify(bytes(damaged), _digest(RAW))


def test_a_broken_index_is_found() -> None:
    start = int.from_bytes(RAW[-4096 + 32 : -4096 + 40], "little")
    repeated = RAW[: start + 16] + RAW[start : start + 16] + RAW[start + 32 :]
    with pytest.raises(CorruptImage, match=f"the layer: offset {start}: index entry 1"):
        _verify(repeated)


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    with ExitStack() as stack:
        engine = stack.enter_context(Engine(work_threads=1))
        layer = memory_blob(engine, "the layer", PACKED, stack)
        verify_layer(engine, layer, None, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (len(PACKED) + len(RAW),) * 2
