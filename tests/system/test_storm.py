# SPDX-License-Identifier: Apache-2.0
"""Every fault a registry can have, alone and three at a time, under 8 readers and a pull.

What has to hold in each round (tests/storm.py), whatever the faults:

- Each read is right, or EIO; an open or pull ends well, or with an exit code that says whose fault it was.
- A host that told us to wait gets no more than one request a second until then, from all who use it.
- What is requested of blobs (the lengths of all ranges asked for and not refused) is at most 1.1
  times what is needed: the different extents that were asked for in the round, the pull's included,
  plus the whole range of each request that a fault of the proxy's own broke off or spoilt (once for
  each), plus all extents that were dropped because the whole blob's digest was wrong. A 200 in answer to
  a range counts as the range.
- No password, token or signature stands in the owner's debug log, or in what a command says.
- When the devices are closed, sockets and descriptors are soon what they were before the first image was opened;
  threads and memory, what an owner that had images always keeps.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import pytest

from blockdev.fetch.pool import THREADS
from tests import requires
from tests.commands import until
from tests.fakes.fault_proxy import SLOW, Fault, Plan
from tests.registries import Registry
from tests.storm import Storm, impatience, met

MIB = 1 << 20
RATE = 0.2  # of the requests meet a fault
SEED = 20261121
ROUND = 2.0  # seconds of one cold cache
ALONE = requires.scaled(3, 600) / 10  # seconds for each fault, and until it was met
TOGETHER = requires.scaled(4, 600)
CHANGE = requires.scaled(2, 5)  # seconds until three others are drawn
LIMIT = requires.scaled(300, 3600)  # seconds of one test: thirteen faults, a minute each, and what they hold up
WASTE = 1.1
CALM_WAIT = 60.0  # seconds: what hosts were told has to pass, and a stall or two to end
IDLE_WAIT = 60.0  # seconds: idle threads give their kept connections up after 15
THREADS_MAX = THREADS + 12  # of an owner without devices: fetch and work threads, clock, probe, verifier, callers
DESCRIPTORS_MORE = 1  # than before its first image: one caller's
MEMORY_MORE = 48 * MIB  # than before its first image, however many rounds: an HTTP client, 16 threads' arenas


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory, ociblk: str) -> Iterator[Storm]:
    requires.requires_mount()
    requires.requires_command("unshare", "docker-registry")
    tmp_path = tmp_path_factory.mktemp("storm")
    registry = Registry(tmp_path, {}, None)
    disk, layer = tmp_path / "disk", tmp_path / "layer"
    with open(disk, "wb") as file:
        file.write(os.urandom(10 * MIB))
        file.seek(14 * MIB)
        file.write(os.urandom(2 * MIB))
    subprocess.run([ociblk, "import", disk, "-o", layer, "--tar"], check=True)
    storm = Storm(tmp_path, ociblk, registry, disk, layer)
    yield storm
    storm.close()
    registry.stop()


def calm(storm: Storm) -> None:
    """A round without faults, in which all is right."""

    def served() -> bool:
        failed = storm.opens_failed, storm.pulls_failed
        readings = storm.round(0.2, SEED)
        assert not readings.wrong
        return readings.right > 0 and readings.failed == 0 and (storm.opens_failed, storm.pulls_failed) == failed

    assert until(served, CALM_WAIT), storm.outputs[-10:]


def assert_order(storm: Storm) -> None:
    """What the module's docstring says of requests and secrets; of all since the storm began."""
    assert not storm.readings.wrong, storm.readings.wrong[:10]
    assert not impatience(storm.proxy.served)
    assert storm.secrets_told() == []
    account = storm.account
    assert account.requested <= WASTE * (account.needed + account.lost), account


def weather(storm: Storm, faults: Sequence[Fault], seconds: float, number: int) -> dict[str, object]:
    """Rounds under these faults for so long, and until readers have met one; what they saw.

    Every third open is under them too, the others are before they begin.
    """
    since, before = len(storm.proxy.served), storm.tally()
    rate = RATE / SLOW.get(faults[0], 1) if len(faults) == 1 else RATE
    plan = Plan(tuple(faults), SEED + number, rate)
    end = time.monotonic() + seconds
    rounds = itertools.count(1)
    while time.monotonic() < end or not met(storm.proxy.served[since:], set(faults)):
        turn = next(rounds)
        storm.round(min(ROUND, seconds), SEED + number + turn, plan, rough_open=turn % 3 == 0)
    return {name: value - before[name] for name, value in storm.tally().items()}


@pytest.mark.timeout(LIMIT)
def test_each_fault_alone(storm: Storm, record_measured: Callable[[str, dict[str, object]], None]) -> None:
    calm(storm)
    print(f"seed {SEED}")
    seen = {}
    for number, fault in enumerate(Fault):
        seen[fault.name.lower()] = weather(storm, [fault], ALONE, 1000 * number)
        print(fault.name, seen[fault.name.lower()])
    assert_order(storm)
    record_measured("storm-alone", {"seed": SEED, "seconds_each": ALONE, "faults": seen})


@pytest.mark.timeout(LIMIT)
def test_three_faults_at_a_time(storm: Storm, record_measured: Callable[[str, dict[str, object]], None]) -> None:
    calm(storm)
    chance = random.Random(SEED)
    print(f"seed {SEED}")
    before, since, begin = storm.tally(), len(storm.proxy.served), time.monotonic()
    number = 0
    while time.monotonic() < begin + TOGETHER:
        number += 1000
        weather(storm, chance.sample(list(Fault), 3), CHANGE, number)
    assert_order(storm)
    times = {fault.name.lower(): sum(one.fault is fault for one in storm.proxy.served[since:]) for fault in Fault}
    assert all(times.values()) or not requires.FULL, times
    figures = {name: value - before[name] for name, value in storm.tally().items()}
    waste = figures["requested_bytes"] / (figures["needed_bytes"] + figures["lost_bytes"])
    record_measured("storm", {"seed": SEED, "seconds": TOGETHER, **figures, "waste": waste, "faults": times})


@pytest.mark.timeout(LIMIT)
def test_nothing_is_left_over(storm: Storm, record_measured: Callable[[str, dict[str, object]], None]) -> None:
    """After whatever this storm has been through: one round more takes nothing that does not come back."""
    calm(storm)

    def as_before() -> bool:
        left = storm.left()
        return left.threads <= THREADS_MAX and left.descriptors <= storm.begin.descriptors + DESCRIPTORS_MORE

    assert until(as_before, IDLE_WAIT), (storm.begin, storm.left())
    after = storm.left()
    assert after.anonymous <= storm.begin.anonymous + MEMORY_MORE, (storm.begin, after)
    figures = {"rounds": storm.rounds, "before": asdict(storm.begin), "after": asdict(after)}
    record_measured("storm-left", figures)
