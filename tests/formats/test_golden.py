# SPDX-License-Identifier: Apache-2.0
"""overlaybd's golden vectors: one read-write layer and all that its tools make of it.

Made with overlaybd 063821f. The lz4 library there is 1.8.3; another version may find
other matches, so lz4 files are compared by their decoded bytes and their layout.
"""

from __future__ import annotations

import hashlib

import pytest

from formats import lsmt, tar, zfile
from formats.lsmt import SECTOR, Head, Segment
from formats.pair import PairWriter, replay
from formats.readat import BytesAt, Window

UUID = "11111111-2222-4333-8444-555555555555"
PARENT = "AAAAAAAA-BBBB-4CCC-8DDD-EEEEEEEEEEEE"


def pattern(sectors: int, seed: int) -> bytes:
    return bytes((7 * place + 31 * seed) % 256 for place in range(sectors * SECTOR))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def pair() -> tuple[bytes, bytes]:
    data, index = bytearray(), bytearray()
    writer = PairWriter(data.extend, index.extend, Head(0, 1 << 20, uuid=UUID))
    writer.write(0, pattern(100, 1))
    writer.write(200, pattern(8, 2))
    writer.discard(50, 4)
    writer.write(98, pattern(4, 3))
    writer.discard(1000, 16)
    return bytes(data), bytes(index)


@pytest.fixture(scope="module")
def committed(pair: tuple[bytes, bytes]) -> bytes:
    data, index = map(BytesAt, pair)
    live = replay(lsmt.read_log(index, lsmt.open_log(index, data)))
    out = bytearray()
    lsmt.commit(live, [data], out.extend, Head(0, 1 << 20, uuid=UUID, parent_uuid=PARENT))
    return bytes(out)


def test_the_pair(pair: tuple[bytes, bytes]) -> None:
    data, index = pair
    assert (len(data), len(index)) == (61440, 4176)
    assert sha256(data) == "8f87187f5c740390c771603322cac41b001ef281abaa9941350de329a6fd4bad"
    assert sha256(index) == "23559ca141dc0fa25f0f9c9a64960492e595be3a1e7293a34a0eefa058d1721b"


def test_the_commit(committed: bytes) -> None:
    assert len(committed) == 66560
    assert sha256(committed) == "88e48374012ba88fbdc5cebafb9dfcf4013edaf9f8399894952e9cd298bca1a2"
    sealed = lsmt.open_sealed(BytesAt(committed))
    assert (sealed.index_offset, sealed.index_count) == (58368, 256)
    assert lsmt.read_segments(BytesAt(committed), sealed) == [
        Segment(0, 50, 8, False, 0),
        Segment(50, 4, 58, True, 0),
        Segment(54, 48, 58, False, 0),
        Segment(200, 8, 106, False, 0),
        Segment(1000, 16, 114, True, 0),
    ]


def test_the_commit_with_zstd(committed: bytes) -> None:
    blob = zfile.build(committed, zfile.Options(zfile.ZSTD, 16384))
    assert len(blob) == 2452
    assert sha256(blob) == "eecbba697ce56d750c821477ad6ee8e3c9608c6931f1093fb13a37182dea1e40"


def test_the_commit_with_lz4_in_a_tar(committed: bytes) -> None:
    compressed = zfile.build(committed, zfile.Options())
    blob = tar.wrap_head(len(compressed)) + compressed + tar.wrap_tail(len(compressed))
    assert len(blob) == 8192
    payload = tar.find_payload(BytesAt(blob))
    assert payload is not None
    r = Window(BytesAt(blob), payload.base, payload.length)
    head = zfile.open_zfile(r)
    assert head is not None
    assert (head.flags, head.block_count, head.plain_size) == (zfile.FINAL_HEADER, 17, 66560)
    assert sha256(zfile.Decoder(r, head).read_at(0, head.plain_size)) == sha256(committed)
