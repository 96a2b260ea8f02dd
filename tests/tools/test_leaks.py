# SPDX-License-Identifier: Apache-2.0
"""The leak check sees what a test leaves behind, and takes only that away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leaks
from tests.requires import requires_mount


@pytest.fixture
def sleeper(tmp_path: Path):
    """A process that belongs to the run tmp_path/run, and one that does not."""
    environments = [os.environ | {leaks.RUN_VARIABLE: str(tmp_path / name)} for name in ("run", "other")]
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = [subprocess.Popen(command, env=environment) for environment in environments]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_only_processes_of_the_run_are_found_and_ended(tmp_path: Path, sleeper):
    mine, other = sleeper
    assert set(leaks.processes(tmp_path / "run")) == {mine.pid}
    assert any(str(mine.pid) in line for line in leaks.sweep(tmp_path / "run"))
    assert mine.wait(timeout=5) == -9
    assert other.poll() is None


def test_mounts_and_loops_are_found_and_taken_away(tmp_path: Path):
    requires_mount()
    run = tmp_path / "run"
    point = run / "a point"
    point.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    (run / "disk").write_bytes(bytes(1 << 20))
    loop = subprocess.run(["losetup", "-f", "--show", str(run / "disk")], check=True, capture_output=True, text=True)
    assert leaks.mounts(run) == [str(point)]
    assert leaks.loops(run) == [loop.stdout.strip()]
    leaks.sweep(run)
    assert leaks.describe(run) == []
