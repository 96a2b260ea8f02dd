# SPDX-License-Identifier: Apache-2.0
"""The installed command on a root of the test's own: fixtures for tests of whole processes.

run("ps")             one command, to its end
start("serve", ...)   one in the background; killed when the test ends
root                  the root of both; its owner, mounts and exports are ended with the test
ext4                  an image to mount
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdev.root import Root
from tests import fixtures, requires

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]

WAIT = 20.0  # seconds that anything may take on a busy machine
COMMAND_WAIT = 60.0  # seconds for a whole command


def until(condition: Callable[[], bool], limit: float = WAIT) -> bool:
    """Whether the condition became true within the limit."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def root(tmp_path: Path, ociblk: str) -> Iterator[Root]:
    """A root that does not exist yet."""
    root = Root(tmp_path / "root")
    yield root
    subprocess.run([ociblk, "daemon", "--stop", "--force", "--root", str(root.path)], check=True, timeout=WAIT)


@pytest.fixture
def run(ociblk: str, root: Root) -> Run:
    def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [ociblk, *map(str, words), "--root", str(root.path)]
        env = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_WAIT, env=env)

    return run


@pytest.fixture
def start(ociblk: str, root: Root) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
        command = [ociblk, *map(str, words), "--root", str(root.path)]
        env = {**os.environ, **environment}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with an ext4 file system, as a config of three layers."""
    requires.requires_mount()
    config = tmp_path_factory.mktemp("ext4") / "config.v1.json"
    config.write_bytes(fixtures.config("04-apply-ext4/v64m-3layer.config.json"))
    return config


def uri_of(serving: subprocess.Popen[str]) -> str:
    """The URI that a started serve prints."""
    assert serving.stdout
    return serving.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a started command that is about to end."""
    _, errors = process.communicate(timeout=WAIT)
    return process.returncode, errors


def devices(run: Run) -> list[dict[str, Any]]:
    """What ps shows."""
    found: list[dict[str, Any]] = json.loads(run("ps", "--json").stdout)["devices"]
    return found


def owner_pid(root: Root) -> int:
    """Of the process that holds the root."""
    return int((root.holder() or "").rpartition(" ")[2])


def mounted(path: Path) -> bool:
    """Whether something is mounted exactly there."""
    return f" {path} " in Path("/proc/self/mountinfo").read_text()
