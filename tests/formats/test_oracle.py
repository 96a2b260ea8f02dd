# SPDX-License-Identifier: Apache-2.0
"""The oracle reproduces what overlaybd's own tools flatten the fixtures to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import imagespec
from formats.errors import FormatError
from formats.lsmt import SECTOR
from formats.readat import BytesAt
from tests import fixtures, oracle, requires, stacks

ROWS = fixtures.rows("01", "02", "03", "04", "05", "07", "08")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_fixture_flattens_to_the_listed_digest(row: fixtures.Row) -> None:
    if row.kind == "config":
        disk = oracle.flatten_config(imagespec.parse(fixtures.config(row.paths[0])))
    else:
        disk = oracle.flatten_files(*(fixtures.folder() / path for path in row.paths))
    assert disk.size == row.size
    assert disk.sha256() == row.sha256


@settings(max_examples=requires.scaled(200, 5000), deadline=None)
@given(st.data())
def test_random_stacks_read_as_the_model_says(data: st.DataObject) -> None:
    stack = data.draw(stacks.stacks())
    upper = stack.upper.build_pair() if stack.upper else None
    blobs = [BytesAt(plan.build()) for plan in stack.lowers]
    disk = oracle.flatten(blobs, (BytesAt(upper[0]), BytesAt(upper[1])) if upper else None)
    assert disk.size == stack.size
    model = stack.model()
    for _ in range(5):
        offset, length = data.draw(stacks.reads(stack))
        assert disk.read_at(offset, length) == model.read_at(offset, length)
        runs = disk.runs(offset, length)
        assert sum(run.length for run in runs) == length
        for run in runs:
            touched = {
                model.touched(sector) for sector in {run.offset // SECTOR, (run.offset + run.length - 1) // SECTOR}
            }
            assert touched == {run.kind != oracle.HOLE}


def test_the_4_tib_fixture_has_data_at_both_ends_and_past_2_tib_and_holes_between() -> None:
    disk = oracle.flatten_files(fixtures.DATA / "huge-4t.lsmt")
    tib = 1 << 40
    assert [(run.offset, run.length) for run in disk.runs() if run.kind == oracle.DATA] == [
        (0, 512),
        (3 * tib + 4096, 4096),
        (4 * tib - 512, 512),
    ]
    assert disk.read_at(2 * tib, 4096) == bytes(4096)
    assert any(disk.read_at(3 * tib + 4096, 4096))


def test_more_than_255_layers_are_refused() -> None:
    layer = BytesAt(stacks.Plan(8, ()).build())
    assert oracle.flatten([layer] * oracle.LAYERS_MAX).size == 8 * SECTOR
    with pytest.raises(FormatError):
        oracle.flatten([layer] * (oracle.LAYERS_MAX + 1))
