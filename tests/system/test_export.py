# SPDX-License-Identifier: Apache-2.0
"""Where an export goes: what is 0 is there, and a stream is written on from where it stands, whoever writes it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import syscalls
from blockdev.root import Root
from tests import fixtures
from tests.commands import WAIT, Run, Start
from tests.registries import Registry
from tests.requires import requires_mount

LAYER = fixtures.DATA / "a-l2.lz4-4k.zlsmt"
SIZE = 16 << 20


@pytest.fixture(params=["local", "of a registry"])
def image(request: pytest.FixtureRequest, run: Run) -> str:
    if request.param == "local":
        return str(LAYER)
    registry: Registry = request.getfixturevalue("registry")
    assert run("push", LAYER, f"{registry.host}/app:1").returncode == 0
    return f"{registry.host}/app:1"


@pytest.fixture
def disk(tmp_path: Path, run: Run) -> bytes:
    assert run("export", LAYER, "-o", tmp_path / "disk").returncode == 0
    return (tmp_path / "disk").read_bytes()


@pytest.fixture(params=[8, 24], ids=["no room", "room"])
def roomy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A folder, and whether a whole disk has room in it."""
    requires_mount()
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    syscalls.mount("none", folder, "tmpfs", flags=0, options=f"size={request.param}m")
    yield folder, request.param << 20 > SIZE
    syscalls.umount(folder, 0)


def test_a_block_device_has_all_of_it_or_it_is_an_error(
    roomy: tuple[Path, bool], run: Run, image: str, disk: bytes
) -> None:
    folder, room = roomy
    backing = folder / "backing"
    with backing.open("wb") as file:
        file.truncate(SIZE)
    with syscalls.attach_loop(backing, writable=True) as loop:
        done = run("export", image, "-o", loop.path)
    if room:
        assert (done.returncode, done.stderr) == (0, "")
        assert (backing.read_bytes() == disk) is True
    else:
        assert (done.returncode, done.stderr.count("\n")) == (8, 1)
        assert f"write disk: {loop.path}: " in done.stderr


def test_a_reader_that_leaves_ends_it_quietly(image: str, start: Start) -> None:
    exporting = start("export", image, "-o", "-")
    assert exporting.stdout
    assert exporting.stderr
    exporting.stdout.close()
    assert (exporting.stderr.read(), exporting.wait(WAIT)) == ("", 141)


def test_a_file_on_stdout_is_written_from_where_it_stands(
    tmp_path: Path, ociblk: str, root: Root, image: str, disk: bytes
) -> None:
    export = f"{ociblk} export {image} --root {root.path} -o -"
    for words in (f"echo before > out; {export} >> out; echo after >> out",
                  f"{{ echo before; {export}; echo after; }} > out"):  # fmt: skip
        assert subprocess.run(["bash", "-ec", words], cwd=tmp_path, check=False, timeout=60).returncode == 0
        assert ((tmp_path / "out").read_bytes() == b"before\n" + disk + b"after\n") is True
