# SPDX-License-Identifier: Apache-2.0
"""Every broken file of the fixtures is refused, or reads as the good one."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats.errors import FormatError
from tests import fixtures, oracle

FILES = sorted((fixtures.locate() or Path("/nowhere")).glob("08-corrupt/[rtz]-*"))
ACCEPTED = {
    "r-header-vsize.lsmt",  # the trailer's size counts, and no entry passes it
    "z-header-nodigestflag.zlsmt",
    "z-trailer-magic.zlsmt",  # the header has the index: the trailer is never read
    "z-trailer-digest.zlsmt",
    "z-trunc-1.zlsmt",
    "z-trunc-512.zlsmt",
    "z-append-512.zlsmt",
    "t-trunc-1k.tar",  # the payload is whole
}
UNCHECKED = "r-data-flip.lsmt"  # raw LSMT data carry no checksum


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_broken_file_is_refused_or_reads_right(path: Path) -> None:
    good = oracle.flatten_files(path.with_name("good.lsmt"))
    if path.name in ACCEPTED:
        assert oracle.flatten_files(path).sha256() == good.sha256()
    elif path.name == UNCHECKED:
        disk = oracle.flatten_files(path)
        differing = sum(a != b for a, b in zip(disk.read_at(0, disk.size), good.read_at(0, good.size), strict=True))
        assert differing == 1
    else:
        with pytest.raises(FormatError):
            oracle.flatten_files(path).sha256()
