# SPDX-License-Identifier: Apache-2.0
"""A root whose file system has no files without names, as /proc has none: whoever needs one says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev import entryfiles
from blockdev.build.workshop import Workshop
from blockdev.entryfiles import EntryFiles
from blockdev.errors import EngineError
from blockdev.root import Root
from blockdev.staging import Copy
from formats.oci import digest_of

DIGEST = digest_of(b"content")


def stage(blobs: Path) -> None:
    with open(os.memfd_create("content"), "wb", buffering=0) as file:
        Copy(blobs, file.fileno(), DIGEST)


def open_apart(blobs: Path) -> None:
    EntryFiles.open_nameless(blobs, entryfiles.wanted(DIGEST, 7))


def work(blobs: Path) -> None:
    Workshop(Root(blobs / "sha256"), lambda fd, digest: digest).scratch()


@pytest.mark.parametrize("act", [stage, open_apart, work])
def test_a_file_system_without_nameless_files_is_named(tmp_path: Path, act: Callable[[Path], None]) -> None:
    (tmp_path / "sha256").symlink_to("/proc")
    with pytest.raises(EngineError, match=rf"the file system of {tmp_path}/sha256 has no files without names"):
        act(tmp_path)
