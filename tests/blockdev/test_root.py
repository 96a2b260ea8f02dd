# SPDX-License-Identifier: Apache-2.0
"""A root has one owner and one version, and belongs to its user."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockdev.errors import AccessDenied, DeviceError
from blockdev.root import LAYOUT_VERSION, Root


def test_the_second_owner_is_refused_by_name_and_pid(tmp_path: Path) -> None:
    first, second = Root(tmp_path), Root(tmp_path)
    first.acquire("somebody", 0)
    with pytest.raises(DeviceError, match=rf"{tmp_path}.*somebody {os.getpid()}"):
        second.acquire("another", 0)
    assert second.owned()
    first.release()
    assert not second.owned()
    second.acquire("another", 0)
    second.release()


def test_a_root_is_made_with_its_parents_and_closed_to_others(tmp_path: Path) -> None:
    root = Root(tmp_path / "a" / "b")
    root.prepare()
    assert root.path.stat().st_mode & 0o777 == 0o700


def test_a_root_under_a_file_is_denied(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AccessDenied, match="file"):
        Root(tmp_path / "file" / "root").prepare()


def test_a_root_that_is_a_file_is_denied(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AccessDenied, match="file"):
        Root(tmp_path / "file").prepare()


def test_a_root_everybody_writes_to_is_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(AccessDenied, match="everybody"):
        Root(tmp_path).prepare()


def test_a_lock_that_is_a_link_is_denied(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessDenied):
        Root(tmp_path).acquire("x", 0)


def test_a_new_root_gets_the_version(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.check_version()
    assert root.version.read_text() == f"{LAYOUT_VERSION}\n"
    root.check_version()


@pytest.mark.parametrize("text", [f"{LAYOUT_VERSION + 1}\n", "99", "beta", "", "-1"])
def test_a_newer_or_unreadable_version_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    root = Root(tmp_path)
    root.version.write_text(text)
    root.blobs.mkdir()
    with pytest.raises(DeviceError, match=str(tmp_path)):
        root.check_version()
    assert root.version.read_text() == text
    assert root.blobs.exists()


def test_an_older_cache_is_rebuilt(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.version.write_text("0\n")
    (root.blobs / "sha256").mkdir(parents=True)
    (root.blobs / "sha256" / "old").touch()
    root.check_version()
    assert not root.blobs.exists()
    assert root.version.read_text() == f"{LAYOUT_VERSION}\n"
