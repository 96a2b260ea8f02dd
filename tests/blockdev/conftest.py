# SPDX-License-Identifier: Apache-2.0
"""A blob with a digest table, in a cache, from a registry that can lie (tests/checked.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.checked import Bench, Liar


@pytest.fixture
def liar() -> Iterator[Liar]:
    made = Liar()
    yield made
    made.server.close()


@pytest.fixture
def bench(tmp_path: Path, liar: Liar) -> Iterator[Bench]:
    made = Bench(tmp_path / "blobs", liar)
    yield made
    made.close()


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack
