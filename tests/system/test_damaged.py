# SPDX-License-Identifier: Apache-2.0
"""Blocks that are wrong for good: EIO for whoever reads them, and the log, ps and mount say which."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev.root import Root
from tests import requires
from tests.commands import Run, devices, until
from tests.filling import flip

BLOCK = 4096  # of the disk
STORED = BLOCK + 24  # what lz4 makes of random bytes, with its CRC
BLOCKS = 256


@pytest.fixture
def layer(tmp_path: Path, ociblk: str) -> Path:
    (tmp_path / "disk").write_bytes(os.urandom(BLOCKS * BLOCK))
    subprocess.run([ociblk, "import", tmp_path / "disk", "-o", tmp_path / "layer"], check=True)
    return tmp_path / "layer"


@pytest.fixture
def file(tmp_path: Path, run: Run) -> Iterator[Path]:
    """Where a disk may be mounted; it is not at the end."""
    requires.requires_mount()
    yield tmp_path / "file"
    assert run("umount", tmp_path / "file").returncode == 0


def damage(layer: Path, *blocks: int) -> None:
    for block in blocks:
        flip(layer, 512 + block * STORED + BLOCK // 2)


def said(root: Root) -> list[str]:
    return [line for line in root.log.read_text().splitlines() if "damaged" in line]


def test_a_block_that_is_wrong_is_named_by_the_log_once_and_by_ps(
    root: Root, run: Run, layer: Path, file: Path
) -> None:
    damage(layer, 40, 200)
    assert run("mount", "--raw", layer, file).returncode == 0
    assert [device["error"] for device in devices(run)] == [""]
    with open(file, "rb", buffering=0) as disk:
        for number, block in enumerate((40, 200, 40, 200), start=1):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(disk.fileno(), BLOCK, block * BLOCK)
            assert until(lambda number=number: len(said(root)) == min(number, 2))  # type: ignore[misc]
    first, second = said(root)
    (device,) = devices(run)
    assert device["error"] in second
    assert str(layer) in device["error"]
    assert "offset " in device["error"]
    assert first != second


def test_a_layer_that_is_all_wrong_does_not_fill_the_log(root: Root, run: Run, layer: Path, file: Path) -> None:
    damage(layer, *range(60, 120))
    assert run("mount", "--raw", layer, file).returncode == 0
    with open(file, "rb", buffering=0) as disk:
        for block in range(60, 120):
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(disk.fileno(), 1, block * BLOCK)
    assert until(lambda: devices(run)[0]["error"] != "")
    assert 0 < len(said(root)) <= 16


def test_a_mount_that_fails_for_a_wrong_block_names_it(tmp_path: Path, run: Run, layer: Path) -> None:
    requires.requires_mount()
    damage(layer, 0)
    (tmp_path / "mnt").mkdir()
    refused = run("mount", layer, tmp_path / "mnt")
    assert (refused.returncode, refused.stderr.count("\n")) == (5, 1)
    assert f"{layer}: offset " in refused.stderr
    assert devices(run) == []
