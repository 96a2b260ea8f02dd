# SPDX-License-Identifier: Apache-2.0
"""Finished rows of a bench, kept so that a run that was cut off goes on where it stopped.

A row is kept under the digest of what it measured: the product's sources and the bench's
own. A change to either begins anew; so does a change of what was asked for (the settings).
A row is written whole, when it is finished, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

SOURCES = ("blockdev", "formats", "native", "tests/bench")
BENCH_FILES = "tools/bench*"


def sources_digest(root: Path) -> str:
    """Of everything that can change a figure."""
    digest = hashlib.sha256()
    paths = [path for room in SOURCES for path in (root / room).rglob("*")] + list(root.glob(BENCH_FILES))
    for path in sorted(paths):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Kept:
    """The finished rows in a folder; those of other sources or settings are removed."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key
        if folder.exists():
            for other in folder.iterdir():
                if other.name != key:
                    shutil.rmtree(other)
        self.folder.mkdir(parents=True, exist_ok=True)

    def rows(self, name: str) -> list[dict[str, object]] | None:
        """What was recorded for a row, or None if it has not been finished."""
        path = self._path(name)
        if not path.exists():
            return None
        kept: list[dict[str, object]] = json.loads(path.read_text())
        return kept

    def keep(self, name: str, rows: list[dict[str, object]]) -> None:
        part = self._path(name).with_suffix(".part")
        part.write_text(json.dumps(rows, indent=2))
        part.replace(self._path(name))

    def forget(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def end(self) -> None:
        """All rows have been put together elsewhere."""
        shutil.rmtree(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
