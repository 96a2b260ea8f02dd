# SPDX-License-Identifier: Apache-2.0
"""When a host is asked again, by a clock that tests turn."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest

from blockdev.errors import AccessDenied, NotFound, SourceError
from blockdev.registry.backoff import (
    DELAY_MAX,
    FIRST_DELAY,
    JITTER,
    LIMITED_INTERVAL,
    TOLD_MAX,
    Backoff,
    LeftAlone,
)
from blockdev.source.retrying import Retrying, patiently
from tests.fakes.memory_source import MemorySource

HOST = "a.example"
RESET = SourceError("reading failed: x: reset")
BUSY = SourceError("reading failed: x: answered 429", retry_after=10)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backoff(clock: Clock) -> Backoff:
    return Backoff(clock)


def test_a_host_that_never_failed_is_asked_at_once(backoff: Backoff) -> None:
    assert backoff.admit(HOST) == backoff.waiting(HOST) == 0
    backoff.succeeded(HOST)
    assert backoff.admit(HOST) == backoff.waiting(HOST) == 0


def test_delays_double_up_to_a_ceiling_and_vary(backoff: Backoff, clock: Clock) -> None:
    delays = []
    for _ in range(12):
        delays.append(backoff.failed(HOST, RESET))
        assert backoff.waiting(HOST) == delays[-1]
        assert backoff.admit(HOST) == 0, "a person who asks need not wait for a host that only fails"
        clock.now += delays[-1]
        assert backoff.waiting(HOST) == 0
    for number, delay in enumerate(delays):
        least = min(FIRST_DELAY * 2**number, DELAY_MAX)
        assert least <= delay <= least * (1 + JITTER)
    assert len(set(delays)) == len(delays)


def test_failures_of_one_moment_count_once(backoff: Backoff) -> None:
    first = backoff.failed(HOST, RESET)
    for _ in range(7):
        assert backoff.failed(HOST, RESET) == first


def test_hosts_do_not_share_their_failures(backoff: Backoff) -> None:
    backoff.failed(HOST, RESET)
    assert backoff.waiting("b.example") == 0


def test_a_failure_is_the_hosts_that_the_error_names(backoff: Backoff) -> None:
    assert backoff.failed(HOST, SourceError("reading failed: x: answered 503", retry_after=7, host="cdn.example")) == 7
    assert backoff.waiting(HOST) == 0
    assert backoff.admit("cdn.example") == 7


def test_success_forgets_everything(backoff: Backoff, clock: Clock) -> None:
    for _ in range(5):
        clock.now += backoff.failed(HOST, RESET)
    backoff.failed(HOST, BUSY)
    backoff.succeeded(HOST)
    assert backoff.admit(HOST) == backoff.waiting(HOST) == 0
    assert backoff.failed(HOST, RESET) <= FIRST_DELAY * (1 + JITTER)


def test_a_host_says_how_long_to_wait(backoff: Backoff, clock: Clock) -> None:
    assert backoff.failed(HOST, BUSY) == 10
    clock.now += 9.9
    assert backoff.admit(HOST) == backoff.waiting(HOST) == pytest.approx(0.1)


def test_no_host_stops_us_for_longer_than_a_minute(backoff: Backoff) -> None:
    assert backoff.failed(HOST, SourceError("x", retry_after=1e9)) == TOLD_MAX


def test_a_host_that_limits_us_gets_one_request_a_second(backoff: Backoff, clock: Clock) -> None:
    backoff.failed(HOST, BUSY)
    clock.now += 10
    admitted = []
    for _ in range(500):
        if backoff.admit(HOST) == 0:
            admitted.append(clock.now)
        clock.now += 0.01
    assert len(admitted) == 5
    assert all(after - before >= LIMITED_INTERVAL for before, after in itertools.pairwise(admitted))
    backoff.answered(HOST)
    assert [backoff.admit(HOST) for _ in range(5)] == [0] * 5


def test_looking_takes_no_turn(backoff: Backoff, clock: Clock) -> None:
    backoff.failed(HOST, BUSY)
    clock.now += 10
    assert [backoff.waiting(HOST) for _ in range(5)] == [0] * 5
    assert backoff.admit(HOST) == 0


# ---- patiently() -----------------------------------------------------------------------------------


def test_one_answer_is_waited_for_while_the_host_says_so() -> None:
    outcomes: list[Exception] = [BUSY, LeftAlone("x", seconds=3)]
    slept: list[float] = []

    def ask() -> str:
        if outcomes:
            raise outcomes.pop(0)
        return "answer"

    assert patiently(ask, time.monotonic() + 60, slept.append) == "answer"
    assert slept == [10, 3]


@pytest.mark.parametrize(("error", "seconds"), [(RESET, 60), (NotFound("x"), 60), (BUSY, 5)])
def test_what_waiting_would_not_help_is_told_at_once(error: Exception, seconds: float) -> None:
    def ask() -> str:
        raise error

    with pytest.raises(type(error)) as caught:
        patiently(ask, time.monotonic() + seconds, lambda delay: pytest.fail("slept"))
    assert caught.value is error


# ---- Retrying --------------------------------------------------------------------------------------


def read(source: Retrying, length: int = 200_000, seconds: float = 20) -> bytes:
    buffer = bytearray(length)
    told = [0]
    source.read_into(0, memoryview(buffer), deadline=time.monotonic() + seconds, progress=told.append)
    assert told == sorted(told)
    return bytes(buffer)


CONTENT = bytes(range(256)) * 1000


def retrying(source: MemorySource) -> tuple[Retrying, list[float]]:
    """The source with retries, and how long those slept, by a clock that their sleep turns."""
    clock = Clock()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        clock.now += seconds
        slept.append(seconds)

    return Retrying(source, Backoff(clock), sleep), slept


def test_a_read_goes_on_after_failures() -> None:
    source = MemorySource(CONTENT)
    source.failures.extend([RESET, RESET, BUSY])
    wrapped, slept = retrying(source)
    assert read(wrapped) == CONTENT[:200_000]
    assert len(slept) == 3
    assert slept[-1] == 10


def test_what_has_arrived_is_not_asked_for_again() -> None:
    class Cut(MemorySource):
        """Breaks off after its first piece, once."""

        def read_into(
            self, offset: int, buffer: memoryview, *, deadline: float, progress: Callable[[int], None]
        ) -> None:
            first = not self.reads
            super().read_into(offset, buffer[: 65536 if first else None], deadline=deadline, progress=progress)
            if first:
                raise RESET

    source = Cut(CONTENT)
    wrapped, _ = retrying(source)
    assert read(wrapped) == CONTENT[:200_000]
    assert source.reads == [(0, 65536), (65536, 200_000 - 65536)]


def test_it_gives_up_when_the_next_attempt_would_be_too_late() -> None:
    source = MemorySource(CONTENT)
    source.failures.append(BUSY)
    wrapped, slept = retrying(source)
    with pytest.raises(SourceError) as caught:
        read(wrapped, seconds=5)
    assert caught.value is BUSY
    assert not slept
    with pytest.raises(SourceError, match="left alone"):
        read(wrapped, seconds=5)
    assert len(source.reads) == 1


@pytest.mark.parametrize("error", [NotFound("x"), AccessDenied("x")])
def test_what_trying_again_does_not_help_is_told_at_once(error: Exception) -> None:
    source = MemorySource(CONTENT)
    source.failures.append(error)
    wrapped, slept = retrying(source)
    with pytest.raises(type(error)):
        read(wrapped)
    assert not slept
