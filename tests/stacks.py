# SPDX-License-Identifier: Apache-2.0
"""Random layer stacks as blob bytes, with a model of what they read as.

stacks() draws a stack: layers of writes and discards near each other and past 2 TiB,
committed or sealed, raw or compressed, bare or in a tar, and maybe a read-write pair on
top. The model keeps sectors in a dict, so it shares nothing with any reader. reads()
draws ranges that matter: around borders of writes, unaligned, at the end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from formats import lsmt, tar, zfile
from formats.lsmt import SECTOR
from formats.pair import PairWriter, replay, seal
from formats.readat import BytesAt

LAYERS_USUAL = 5
_WRITE_MAX = 200  # sectors
_NEAR = 400  # sectors around an anchor, so that operations overlap
_TWO_TIB = 1 << 32  # sectors: where 32-bit sector numbers wrap
_ANCHORS = (0, 0, 0, 5000, _TWO_TIB - 200, _TWO_TIB, 3 * _TWO_TIB + 8)
_SIZES = (0, 256, 6000, _TWO_TIB + 100, 4 * _TWO_TIB)  # sectors; 0 = takes the size below
_BLOCK_SIZES = (512, 4096, 16384, 65536)


@dataclass(frozen=True)
class Op:
    """A write (seed given) or a discard of `length` sectors."""

    offset: int
    length: int
    seed: int | None

    def content(self) -> bytes:
        """What a write stores: the same for the same op; noise for odd seeds, well compressible for even ones."""
        assert self.seed is not None
        noise = random.Random(self.seed)
        if self.seed % 2:
            return noise.randbytes(self.length * SECTOR)
        return b"".join(noise.randbytes(8) * (SECTOR // 8) for _ in range(self.length))


@dataclass(frozen=True)
class Plan:
    """How one layer is made. zfile: None = raw. sealed: index appended to the data as written, else committed."""

    size: int  # sectors
    ops: tuple[Op, ...]
    sealed: bool = False
    zfile: zfile.Options | None = None
    tar: bool = False

    def build(self) -> bytes:
        """The layer's blob."""
        data, index = self.build_pair()
        files = BytesAt(index), BytesAt(data)
        live = replay(lsmt.read_log(files[0], lsmt.open_log(*files)))
        head = lsmt.Head.parse(data[: lsmt.HEAD_SIZE])
        if self.sealed:
            blob = data + seal(head, len(data), live)
        else:
            out = bytearray()
            lsmt.commit(live, [files[1]], out.extend, head)
            blob = bytes(out)
        if self.zfile:
            blob = zfile.build(blob, self.zfile)
        return tar.wrap_head(len(blob)) + blob + tar.wrap_tail(len(blob)) if self.tar else blob

    def build_pair(self) -> tuple[bytes, bytes]:
        """The layer as a read-write pair: data file, index file."""
        data, index = bytearray(), bytearray()
        writer = PairWriter(data.extend, index.extend, lsmt.Head(0, self.size * SECTOR))
        for op in self.ops:
            if op.seed is None:
                writer.discard(op.offset, op.length)
            else:
                writer.write(op.offset, op.content())
        return bytes(data), bytes(index)


@dataclass(frozen=True)
class Stack:
    """Plans, bottom first. `upper` is a read-write pair over them."""

    lowers: tuple[Plan, ...]
    upper: Plan | None = None

    @property
    def plans(self) -> tuple[Plan, ...]:
        return (*self.lowers, self.upper) if self.upper else self.lowers

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return next((plan.size for plan in reversed(self.plans) if plan.size), 0) * SECTOR

    def model(self) -> Model:
        return Model(self)


class Model:
    """What a stack reads as: every touched sector in a dict; discarded ones hold None."""

    def __init__(self, stack: Stack) -> None:
        self.size = stack.size
        self._sectors: dict[int, tuple[Op, int] | None] = {}
        self._content: dict[Op, bytes] = {}
        for op in (op for plan in stack.plans for op in plan.ops):
            for step in range(op.length):
                self._sectors[op.offset + step] = None if op.seed is None else (op, step)

    def read_at(self, offset: int, length: int) -> bytes:
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        content = b"".join(self._sector(number) for number in range(first, last))
        return content[offset - first * SECTOR :][:length]

    def touched(self, sector: int) -> bool:
        """Whether any layer says something about this sector."""
        return sector in self._sectors

    def _sector(self, number: int) -> bytes:
        place = self._sectors.get(number)
        if place is None:
            return bytes(SECTOR)
        op, step = place
        if op not in self._content:
            self._content[op] = op.content()
        return self._content[op][step * SECTOR :][:SECTOR]


_options = st.builds(
    zfile.Options,
    codec=st.sampled_from((zfile.LZ4, zfile.ZSTD)),
    block_size=st.sampled_from(_BLOCK_SIZES),
    verify=st.booleans(),
    overwrite_header=st.booleans(),
)


@st.composite
def ops(draw: st.DrawFn) -> Op:
    offset = draw(st.sampled_from(_ANCHORS)) + draw(st.integers(0, _NEAR))
    seed = draw(st.none() | st.integers(0, 1 << 16))
    # Discards cost nothing, and only they reach the entry's length limit cheaply.
    longest = _WRITE_MAX if seed is not None else draw(st.sampled_from((_WRITE_MAX, 3 * lsmt.LENGTH_MAX)))
    return Op(offset, draw(st.integers(1, longest)), seed)


def plans() -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        size=st.sampled_from(_SIZES),
        ops=st.lists(ops(), max_size=8).map(tuple),
        sealed=st.booleans(),
        zfile=st.none() | _options,
        tar=st.booleans(),
    )


@st.composite
def stacks(draw: st.DrawFn, max_layers: int = LAYERS_USUAL) -> Stack:
    """A stack with a size: at least one of its layers has one."""
    lowers = draw(st.lists(plans(), min_size=1, max_size=max_layers))
    if not any(plan.size for plan in lowers):
        lowers[0] = replace(lowers[0], size=draw(st.sampled_from(_SIZES[1:])))
    upper = draw(st.none() | plans())
    return Stack(tuple(lowers), upper)


@st.composite
def reads(draw: st.DrawFn, stack: Stack) -> tuple[int, int]:
    """A range (offset, length) in bytes within the disk, near something that was written where there is any."""
    borders = [border for plan in stack.plans for op in plan.ops for border in (op.offset, op.offset + op.length)]
    near = draw(st.sampled_from([0, stack.size // SECTOR, *borders])) * SECTOR
    offset = near + draw(st.integers(-_NEAR * SECTOR, _NEAR * SECTOR))
    offset = max(0, min(offset, stack.size))
    length = draw(st.sampled_from((1, SECTOR, 4096)) | st.integers(0, _NEAR * SECTOR))
    return offset, min(length, stack.size - offset)
