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


@pytest.mark.parametrize("text", [f"{LAYOUT_VERSION + 1}\n", "99", "beta", "0\n", "-1"])
def test_a_newer_or_unreadable_version_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    root = Root(tmp_path)
    root.version.write_text(text)
    root.blobs.mkdir()
    with pytest.raises(DeviceError, match=str(tmp_path)):
        root.check_version()
    assert root.version.read_text() == text
    assert root.blobs.exists()


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "blobs" / "sha256").mkdir(parents=True)
    (tmp_path / "blobs" / "sha256" / "theirs").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DeviceError, match=f"{tmp_path}: it is no root: blobs is there"):
        Root(tmp_path).prepare()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_volume_becomes_a_root(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "blobs" / "lost+found").mkdir(parents=True)
    root = Root(tmp_path)
    root.prepare()
    root.check_version()
    assert root.version.read_text() == f"{LAYOUT_VERSION}\n"


def test_a_first_start_that_was_cut_off_is_begun_again(tmp_path: Path) -> None:
    for name in ("lock", "owner.log", "version", ".0123456789abcdef.part"):
        (tmp_path / name).touch()
    root = Root(tmp_path)
    root.prepare()
    root.check_version()
    assert root.version.read_text() == f"{LAYOUT_VERSION}\n"


def test_an_empty_version_beside_a_cache_is_refused_with_what_to_do(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.version.touch()
    (root.blobs / "sha256").mkdir(parents=True)
    with pytest.raises(DeviceError, match=f"empty, but blobs is there.* write {LAYOUT_VERSION} to it"):
        root.prepare()
    root.version.write_text("1")
    root.prepare()


@pytest.mark.parametrize("name", ["version", "blobs"])
def test_what_is_no_file_or_directory_is_named_not_waited_for(tmp_path: Path, name: str) -> None:
    if name != "version":
        Root(tmp_path).check_version()
    os.mkfifo(tmp_path / name)
    with pytest.raises((AccessDenied, DeviceError), match=f"{name}: it is no"):
        Root(tmp_path).prepare()


def test_blobs_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.check_version()
    root.blobs.symlink_to("nowhere")
    with pytest.raises(DeviceError, match="blobs: it is no directory"):
        root.prepare()


def test_a_lock_that_is_a_fifo_has_no_holder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(AccessDenied, match="no regular file"):
        Root(tmp_path).owned()
    with pytest.raises(AccessDenied, match="no regular file"):
        Root(tmp_path).holder()
