# SPDX-License-Identifier: Apache-2.0
"""The reference fixtures: layers made by overlaybd's own tools, and what they flatten to.

They lie outside the checkout: $OCIBLK_FIXTURES, else ../shared/fixtures beside it (for
a git worktree also beside the main checkout). Tests that need them skip aloud without.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
_PLACE = Path("shared") / "fixtures"


@dataclass(frozen=True)
class Row:
    """One line of EXPECT.tsv. kind: `layers` (paths bottom first), `zfile` or `config` (one path)."""

    kind: str
    paths: tuple[str, ...]
    size: int
    sha256: str

    def __str__(self) -> str:
        return ",".join(self.paths)


def locate() -> Path | None:
    """The fixtures' folder, or None."""
    named = os.environ.get("OCIBLK_FIXTURES")
    candidates = [Path(named)] if named else [ROOT.parent / _PLACE, _main_checkout().parent / _PLACE]
    return next((folder for folder in candidates if (folder / "EXPECT.tsv").is_file()), None)


def _main_checkout() -> Path:
    """Where the repository of a worktree lives; in a plain checkout, ROOT."""
    link = ROOT / ".git"
    if not link.is_file():
        return ROOT
    git_dir = Path(link.read_text().removeprefix("gitdir:").strip())
    return git_dir.parent.parent.parent


def folder() -> Path:
    """The fixtures' folder; skips the test, or the module at import, if there is none."""
    __tracebackhide__ = True
    found = locate()
    if found is None:
        pytest.skip("reference fixtures not found: set OCIBLK_FIXTURES", allow_module_level=True)
    return found


def rows(*folders: str) -> list[Row]:
    """EXPECT.tsv's rows whose paths lie in `folders` ("01", "02" ...; none = all). Empty without fixtures."""
    found = locate()
    if found is None:
        return []
    lines = (found / "EXPECT.tsv").read_text().splitlines()
    parsed = [_row(line) for line in lines if not line.startswith("#")]
    return [row for row in parsed if not folders or row.paths[0][:2] in folders]


def _row(line: str) -> Row:
    kind, paths, size, sha256 = line.split("\t")[:4]
    return Row(kind, tuple(paths.split(",")), int(size), sha256)


def config(path: str) -> bytes:
    """A config of the fixtures, its placeholder replaced by the folder's path."""
    home = folder()
    return (home / path).read_bytes().replace(b"@FIXTURES@", str(home).encode())
