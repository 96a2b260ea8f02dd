# SPDX-License-Identifier: Apache-2.0
"""A writer killed at any moment: what a flush acknowledged is there, and no sector is what nobody wrote.

The judge is a set for each sector: what it was at the last flush that was acknowledged, and
all that it was made since. What is left is read by the slow reader, which knows no C.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from blockdev.upper import create_pair
from tests import oracle
from tests.requires import scaled
from tests.system.upper_writer import DISK_SECTORS, SECTOR, operations

SEQUENCES = scaled(100, 1000)
AFRESH = 10  # sequences on one pair, each on what the one before left
ACKNOWLEDGED_MAX = 250  # operations before a kill
WRITER = Path(__file__).with_name("upper_writer.py")
WAIT = 60.0  # seconds for anything on a busy machine


class Writers:
    """The process that starts writers, and the pipe on which they acknowledge."""

    def __init__(self, pair: tuple[Path, Path]) -> None:
        self._acknowledged, theirs = os.pipe()
        os.set_blocking(self._acknowledged, False)
        command = [sys.executable, str(WRITER), *map(str, pair), str(theirs)]
        self._starter = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, pass_fds=[theirs]
        )
        os.close(theirs)

    def killed(self, seed: int, after: int) -> int:
        """Have one write, and kill it once it has acknowledged so many; how many it has in the end."""
        assert self._starter.stdin
        assert self._starter.stdout
        self._starter.stdin.write(f"{seed}\n")
        pid = int(self._starter.stdout.readline())
        count = 0
        while count < after:
            ready, _, _ = select.select([self._acknowledged], [], [], WAIT)
            assert ready, "the writer does not write"
            count += len(os.read(self._acknowledged, 4096))
        os.kill(pid, signal.SIGKILL)
        assert self._starter.stdout.readline() == "ended\n"
        while select.select([self._acknowledged], [], [], 0)[0]:
            count += len(os.read(self._acknowledged, 4096))
        return count

    def close(self) -> None:
        assert self._starter.stdin
        assert self._starter.stdout
        self._starter.stdin.close()
        self._starter.wait(WAIT)
        self._starter.stdout.close()
        os.close(self._acknowledged)


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    writers = Writers((tmp_path / "data", tmp_path / "index"))
    yield writers
    writers.close()


def possible(states: list[set[int]], seed: int, acknowledged: int) -> list[set[int]]:
    """What each sector may be after a kill; the operation after the last acknowledged one may have begun."""
    last = [next(iter(state)) for state in states]
    for place, operation in enumerate(islice(operations(seed), acknowledged + 1)):
        if operation.fill < 0:
            if place < acknowledged:
                states = [{byte} for byte in last]
            continue
        for sector in range(operation.sector, operation.sector + operation.count):
            states[sector] = states[sector] | {operation.fill}
            last[sector] = operation.fill
    return states


def test_kills_lose_nothing_that_was_flushed(
    tmp_path: Path, writers: Writers, record_measured: Callable[[str, dict[str, object]], None]
) -> None:
    pair = tmp_path / "data", tmp_path / "index"
    noise = random.Random(5)
    done = 0
    states: list[set[int]] = []
    for seed in range(SEQUENCES):
        if seed % AFRESH == 0:
            for path in pair:
                path.unlink(missing_ok=True)
            create_pair(*pair, DISK_SECTORS * SECTOR)
            states = [{0}] * DISK_SECTORS
        acknowledged = writers.killed(seed, noise.randint(1, ACKNOWLEDGED_MAX))
        allowed = possible(states, seed, acknowledged)
        disk = oracle.flatten([], (oracle.read_file(pair[0]), oracle.read_file(pair[1])))
        content = disk.read_at(0, disk.size)
        states = []
        for sector in range(DISK_SECTORS):
            found = set(content[sector * SECTOR : (sector + 1) * SECTOR])
            assert len(found) == 1, f"sequence {seed}: sector {sector} is torn"
            assert found <= allowed[sector], f"sequence {seed}: sector {sector}: {found}, not of {allowed[sector]}"
            states.append(found)
        done += acknowledged
    record_measured("upper-kill", {"sequences": SEQUENCES, "operations": done})
