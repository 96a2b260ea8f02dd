# SPDX-License-Identifier: Apache-2.0
"""A command reads an image's disk by offset: itself if the image is local, else through the owner."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from blockdev import client
from blockdev.cli.ask import image_request
from blockdev.cli.disk import opened_disk
from blockdev.config import parse_policy
from blockdev.errors import NotFound, UsageError
from blockdev.origin import locate
from blockdev.root import Root
from formats.errors import FormatError
from formats.readat import ReadAt
from tests import fixtures
from tests.commands import Run
from tests.registries import Registry

LAYER = fixtures.DATA / "a-l2.lz4-4k.zlsmt"
SIZE = 16 << 20
RANGES = ((0, 1), (0, 4096), (SIZE - 1, 1), ((1 << 20) - 5, 10), (300_001, 3 << 20), (SIZE, 0))


def arguments(root: Root) -> argparse.Namespace:
    return argparse.Namespace(root=root.path, on_error=parse_policy("eio:1s"), plain_http=True, ca=None)


@pytest.fixture
def reference(run: Run, registry: Registry) -> str:
    reference = f"{registry.host}/app:1"
    assert run("push", LAYER, reference).returncode == 0
    return reference


def check_ranges(disk: ReadAt, whole: bytes) -> None:
    assert disk.size == SIZE
    for offset, length in RANGES:
        # Not `==` of megabytes, which pytest would want to explain.
        assert (disk.read_at(offset, length) == whole[offset : offset + length]) is True
    for offset, length in ((SIZE, 1), (-1, 2), (0, SIZE + 1)):
        with pytest.raises(FormatError):
            disk.read_at(offset, length)


def test_ranges_of_a_local_image_and_of_a_registrys_are_the_same(
    tmp_path: Path, run: Run, root: Root, reference: str
) -> None:
    assert run("export", LAYER, "-o", tmp_path / "raw").returncode == 0
    whole = (tmp_path / "raw").read_bytes()
    for image in (str(LAYER), reference):
        with locate(image) as origin, opened_disk(arguments(root), origin) as disk:
            check_ranges(disk, whole)


def test_the_owners_errors_are_the_readers(root: Root, registry: Registry) -> None:
    absent = f"{registry.host}/app:none"
    with pytest.raises(NotFound, match=absent), locate(absent) as origin, opened_disk(arguments(root), origin):
        pass


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (SIZE, 1), (-1, 1), (0, -1), (1 << 70, 1)], ids=str)
def test_a_range_that_is_none_is_refused_by_the_owner(root: Root, reference: str, offset: int, length: int) -> None:
    window = os.memfd_create("window")
    with locate(reference) as origin, client.connect(root) as owner:
        body, _ = image_request(arguments(root), origin)
        assert owner.call("disk", body, [window])["size"] == SIZE
        with pytest.raises(UsageError, match="no range of the disk"):
            owner.call("read", {"offset": offset, "length": length})
        assert owner.call("hello")["pid"] > 0
    os.close(window)


def test_a_file_that_cannot_be_written_is_refused(root: Root, reference: str) -> None:
    window = os.open(LAYER, os.O_RDONLY)
    with locate(reference) as origin, client.connect(root) as owner:
        body, _ = image_request(arguments(root), origin)
        owner.call("disk", body, [window])
        with pytest.raises(UsageError, match="Bad file descriptor"):
            owner.call("read", {"offset": 0, "length": 512})
    os.close(window)
