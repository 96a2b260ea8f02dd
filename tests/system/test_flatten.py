# SPDX-License-Identifier: Apache-2.0
"""Layers made by overlaybd's own tools read, through the engine, as those tools say."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockdev.build.export import export_image
from blockdev.build.sink import Sink
from blockdev.engine import RunKind
from formats import imagespec
from tests import fixtures
from tests.opened import opened, sha256

ROWS = fixtures.rows("01", "02", "03", "04", "05", "07", "08")
TIB = 1 << 40


def _layers(row: fixtures.Row) -> tuple[list[Path], list[Path]]:
    """The row's lowers and its upper pair."""
    if row.kind != "config":
        return [fixtures.folder() / path for path in row.paths], []
    config = imagespec.parse(fixtures.config(row.paths[0]))
    lowers = [next(path for path in map(Path, lower.candidates()) if path.exists()) for lower in config.block_lowers]
    return lowers, [Path(config.upper.data), Path(config.upper.index)] if config.upper else []


def test_the_fixtures_are_there() -> None:
    assert fixtures.folder()
    assert len(ROWS) > 60


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_fixture_flattens_to_the_listed_digest(row: fixtures.Row) -> None:
    lowers, upper = _layers(row)
    with opened(*lowers, upper=upper) as image:
        assert image.size == row.size
        assert sha256(image) == row.sha256


def test_an_exported_file_is_the_disk_and_sparse(tmp_path: Path) -> None:
    out = tmp_path / "disk"
    with opened(fixtures.folder() / "01-raw-lsmt/basic.lsmt") as image, open(out, "w+b") as file:
        export_image(image, Sink(file.fileno(), "raw", made=True))
        expected = sha256(image)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == expected
    assert out.stat().st_blocks * 512 < 1 << 20 < out.stat().st_size


def test_an_export_into_a_pipe_has_every_byte() -> None:
    seen: list[tuple[int, int]] = []
    with opened(fixtures.folder() / "01-raw-lsmt/basic.lsmt") as image:
        reader, writer = os.pipe()
        with open(reader, "rb") as pipe, ThreadPoolExecutor(1) as pool:
            received = pool.submit(pipe.read)
            export_image(image, Sink(writer, "pipe", made=False), lambda done, total: seen.append((done, total)))
            os.close(writer)
            assert hashlib.sha256(received.result()).hexdigest() == sha256(image)
        assert seen[-1] == (image.size, image.size)


def test_the_4_tib_fixture_has_its_sectors_and_holes_where_it_should() -> None:
    with opened(fixtures.DATA / "huge-4t.lsmt") as image:
        assert image.size == 4 * TIB
        runs = [(run.offset, run.length) for run in image.runs(0, image.size) if run.kind is RunKind.DATA]
        assert runs == [(0, 512), (3 * TIB + 4096, 4096), (4 * TIB - 512, 512)]
        assert image.read_at(2 * TIB, 4096) == bytes(4096)
        for offset, length in runs:
            assert any(image.read_at(offset, length))


def test_a_4_tib_disk_exports_as_a_sparse_file(tmp_path: Path) -> None:
    out = tmp_path / "disk"
    with opened(fixtures.DATA / "huge-4t.lsmt") as image, open(out, "w+b") as file:
        export_image(image, Sink(file.fileno(), "raw", made=True))
        for offset in (0, 2 * TIB, 3 * TIB + 4096, 4 * TIB - 512):
            assert os.pread(file.fileno(), 512, offset) == image.read_at(offset, 512)
    assert out.stat().st_size == 4 * TIB
    assert out.stat().st_blocks * 512 <= 3 * 65536
