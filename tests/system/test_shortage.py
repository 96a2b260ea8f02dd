# SPDX-License-Identifier: Apache-2.0
"""An owner that runs out of descriptors or threads: it says so, and goes on with what it has."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev import client
from blockdev.errors import EngineError
from blockdev.root import Root
from tests.commands import Run, Start, devices, owner_pid, until, uri_of
from tests.requires import requires_mount

LAYER = Path(__file__).parent.parent / "data" / "d-l0.lsmt"
PIDS = [Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")]


def asked_pid(root: Root) -> int:
    """Of the owner, which is started if there is none."""
    with client.connect(root) as connection:
        return int(connection.call("hello")["pid"])


def limit_descriptors(pid: int, limit: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))


def open_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def connected(path: Path) -> socket.socket:
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(str(path))
    return caller


def test_callers_wait_while_no_descriptor_is_left(root: Root) -> None:
    pid = asked_pid(root)
    before, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    limit_descriptors(pid, 3)
    with connected(root.socket):
        assert until(lambda: "callers have to wait" in root.log.read_text())
        limit_descriptors(pid, before)
        assert asked_pid(root) == pid
    assert root.log.read_text().count("callers have to wait") == 1


def test_callers_that_say_nothing_leave_descriptors_to_the_owner(root: Root) -> None:
    pid = asked_pid(root)
    limit_descriptors(pid, 64)
    with ExitStack() as callers:
        for _ in range(100):
            callers.enter_context(connected(root.socket))
        with pytest.raises(EngineError, match="too many descriptors"):
            client.connect(root)
        assert open_descriptors(pid) < 64
    assert until(lambda: open_descriptors(pid) < 30)
    assert asked_pid(root) == pid


def test_clients_of_an_export_leave_descriptors_to_the_owner(
    tmp_path: Path, root: Root, start: Start, run: Run
) -> None:
    serving = start("serve", LAYER, "--socket", tmp_path / "socket")
    uri_of(serving)
    limit_descriptors(owner_pid(root), 128)
    with ExitStack() as clients:
        for _ in range(120):
            with contextlib.suppress(ConnectionRefusedError, BrokenPipeError):
                clients.enter_context(connected(tmp_path / "socket"))
        assert len(devices(run)) == 1
        assert run("inspect", LAYER).returncode == 0


@pytest.fixture
def threads(root: Root) -> Iterator[Path]:
    """The limit of the owner's threads, a file."""
    parent = next((path for path in PIDS if (path / "cgroup.procs").exists()), None)
    if parent is None:
        pytest.skip("needs a cgroup of processes")
    folder = parent / f"ociblk-test-{os.getpid()}"
    try:
        if parent == PIDS[1]:
            (parent / "cgroup.subtree_control").write_text("+pids")
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs a cgroup of processes, and {folder} cannot be made: {error.strerror}")
    pid = asked_pid(root)
    (folder / "cgroup.procs").write_text(str(pid))
    yield folder / "pids.max"
    (folder / "pids.max").write_text("max")
    subprocess.run(["kill", str(pid)], check=False)
    assert until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


def test_a_caller_for_whom_there_is_no_thread_is_told(root: Root, threads: Path) -> None:
    pid = asked_pid(root)
    threads.write_text("1")
    with pytest.raises(EngineError, match="it can start no thread"):
        client.connect(root)
    threads.write_text("max")
    assert asked_pid(root) == pid


def test_a_mount_that_ended_while_there_was_no_thread_is_ended_later(
    tmp_path: Path, root: Root, threads: Path, run: Run
) -> None:
    requires_mount()
    file = tmp_path / "file"
    assert run("mount", "--raw", LAYER, file).returncode == 0
    threads.write_text("1")
    assert run("umount", file).returncode == 0
    assert until(lambda: "device ends later" in root.log.read_text())
    threads.write_text("max")
    assert until(lambda: devices(run) == [])
