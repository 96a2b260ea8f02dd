# SPDX-License-Identifier: Apache-2.0
"""The engine reads what the oracle reads: random stacks, random ranges, and broken layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdev.engine import Engine
from blockdev.errors import CorruptImage
from blockdev.image import OpenImage
from formats import lsmt, zfile
from formats.errors import FormatError
from formats.readat import BytesAt
from tests import oracle, stacks
from tests.opened import opened_bytes
from tests.requires import scaled

STACKS = scaled(500, 10_000)
BROKEN = scaled(300, 5_000)
_READS = 6
_SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(work_threads=1) as made:
        yield made


def _runs(image: OpenImage) -> Iterator[oracle.Run]:
    at = 0
    while at < image.size:
        for run in image.runs(at, image.size - at):
            yield oracle.Run(run.offset, run.length, int(run.kind), run.layer)
            at = run.offset + run.length


@settings(max_examples=STACKS, **_SETTINGS)
@given(data=st.data())
def test_random_stacks_read_alike(engine: Engine, data: st.DataObject) -> None:
    stack = data.draw(stacks.stacks())
    lowers = [plan.build() for plan in stack.lowers]
    upper = stack.upper.build_pair() if stack.upper else ()
    disk = oracle.flatten(map(BytesAt, lowers), (BytesAt(upper[0]), BytesAt(upper[1])) if upper else None)
    with opened_bytes(engine, *lowers, upper=upper) as image:
        assert image.size == disk.size
        assert list(_runs(image)) == disk.runs()
        for run in disk.runs():
            if run.kind == oracle.DATA:
                assert image.read_at(run.offset, run.length) == disk.read_at(run.offset, run.length)
        for _ in range(_READS):
            offset, length = data.draw(stacks.reads(stack))
            assert image.read_at(offset, length) == disk.read_at(offset, length)


def _oracle_content(blob: bytes) -> list[tuple[oracle.Run, bytes]] | None:
    try:
        disk = oracle.flatten([BytesAt(blob)])
        return [(run, disk.read_at(run.offset, run.length) if run.kind == oracle.DATA else b"") for run in disk.runs()]
    except FormatError:
        return None


def _engine_content(engine: Engine, blob: bytes) -> list[tuple[oracle.Run, bytes]] | None:
    try:
        with opened_bytes(engine, blob) as image:
            return [
                (run, image.read_at(run.offset, run.length) if run.kind == oracle.DATA else b"") for run in _runs(image)
            ]
    except CorruptImage:
        return None


def _mutate(blob: bytes, changes: Sequence[tuple[float, int]]) -> bytes:
    """Overwrite a byte for each (place as a share of the length, value)."""
    out = bytearray(blob)
    for place, value in changes:
        out[min(int(place * len(out)), len(out) - 1)] = value
    return bytes(out)


# Heads and tables are small against the data: half of the changes go to the first and last part.
_places = st.floats(0, 1) | st.floats(0, 0.02) | st.floats(0.98, 1)


@settings(max_examples=BROKEN, **_SETTINGS)
@given(plan=stacks.plans(), changes=st.lists(st.tuples(_places, st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_layers_are_refused_by_both_or_read_alike(
    engine: Engine, plan: stacks.Plan, changes: list[tuple[float, int]]
) -> None:
    blob = _mutate(plan.build(), changes)
    assert _engine_content(engine, blob) == _oracle_content(blob)


@settings(max_examples=BROKEN, **_SETTINGS)
@given(plan=stacks.plans(), kept=st.floats(0, 1) | st.floats(0.95, 1))
def test_truncated_layers_are_refused_by_both_or_read_alike(engine: Engine, plan: stacks.Plan, kept: float) -> None:
    whole = plan.build()
    blob = whole[: int(kept * len(whole))]
    content = _engine_content(engine, blob)
    assert content == _oracle_content(blob)
    assert content in (None, _oracle_content(whole))


@settings(max_examples=scaled(60, 600), **_SETTINGS)
@given(
    plain=st.binary(max_size=70_000),
    codec=st.sampled_from((zfile.LZ4, zfile.ZSTD)),
    block_size=st.sampled_from((512, 4096, 65536)),
)
def test_a_zfile_of_anything_else_is_the_disk(engine: Engine, plain: bytes, codec: int, block_size: int) -> None:
    blob = zfile.build(plain, zfile.Options(codec=codec, block_size=block_size))
    with opened_bytes(engine, blob) as image:
        assert image.size == len(plain)
        assert image.read_at(0, len(plain)) == plain
        assert image.layers[0].flat


def test_a_zfile_with_lsmt_at_its_end_only_is_refused_by_both(engine: Engine) -> None:
    trailer = lsmt.Head(flags=lsmt.SEALED_TRAILER, virtual_size=4096).build()
    blob = zfile.build(bytes(lsmt.HEAD_SIZE) + trailer, zfile.Options())
    assert _engine_content(engine, blob) is None
    assert _oracle_content(blob) is None
