# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup of the test's own, of either version."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_EMPTY_WAIT = 20.0  # seconds for the last process of it to have gone


@dataclass(frozen=True)
class MemoryCgroup:
    """Its folder. What is started with `prefix` runs in it."""

    folder: Path

    @property
    def prefix(self) -> list[str]:
        return ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder)]

    @property
    def peak(self) -> int:
        """The most bytes it had; 0 if the kernel does not tell."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (self.folder / name).exists():
                return int((self.folder / name).read_text())
        return 0


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[MemoryCgroup]:
    """One of `limit` bytes, page cache included. Skips, saying what is missing, if none can be made."""
    parent, name = (_V1, "memory.limit_in_bytes") if (_V1 / "memory.limit_in_bytes").exists() else (_V2, "memory.max")
    folder = parent / f"ociblk-test-{os.getpid()}"
    try:
        if parent == _V2:
            (parent / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        (folder / name).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"needs a memory cgroup, and {folder}/{name} cannot be made or written: {error.strerror}")
    try:
        yield MemoryCgroup(folder)
    finally:
        deadline = time.monotonic() + _EMPTY_WAIT
        while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        folder.rmdir()
