# SPDX-License-Identifier: Apache-2.0
"""A blob that several users share: whose source is asked, and whose patience counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev.config import Policy
from blockdev.engine import Blob
from blockdev.errors import AccessDenied, NotFound, SourceError
from blockdev.layer import CRC_ONLY, SHA256
from blockdev.registry.credentials import LoginUnknown
from formats.digests import UNIT, Place
from tests.claimants import GOOD, SIZE, TABLE, WAIT, Bench
from tests.commands import until
from tests.fakes.memory_source import MemorySource


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.close()


# ---- several sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [None, TABLE])
def test_a_second_that_has_not_got_it_harms_nobody(bench: Bench, undo: ExitStack, table: Place | None) -> None:
    blob = bench.open(undo, bench.good, table, policy=Policy("eio", 5.0)).blob
    other = MemorySource(GOOD, "other")
    other.failures.extend([NotFound("reading a blob failed: other: 404")] * 1000)
    assert bench.open(undo, other, table).blob is blob
    assert blob.read_at(0, SIZE) == GOOD
    assert len(other.reads) <= 1
    assert bench.supply.failure(1)[1] == ""


@pytest.mark.parametrize("table", [None, TABLE])
def test_the_first_that_fails_is_left_for_the_second(bench: Bench, undo: ExitStack, table: Place | None) -> None:
    blob = bench.open(undo, bench.good, table, policy=Policy("eio", 5.0)).blob
    assert blob.read_at(0, 10) == GOOD[:10]
    bench.good.well = False
    other = MemorySource(GOOD, "other")
    bench.open(undo, other, table)
    assert blob.read_at(2 * UNIT, 10) == GOOD[2 * UNIT :][:10]
    other.well, bench.good.well = False, True
    assert blob.read_at(0, SIZE) == GOOD


def test_when_the_one_that_works_leaves_the_other_fails_by_its_policy(bench: Bench, undo: ExitStack) -> None:
    with ExitStack() as first:
        blob = bench.open(first, bench.good).blob
        other = MemorySource(GOOD, "other")
        other.failures.extend([NotFound("reading a blob failed: other: 404")] * 1000)
        bench.open(undo, other)
        assert blob.read_at(0, 10) == GOOD[:10]
    with pytest.raises(SourceError):
        blob.read_at(2 * UNIT, 10)
    assert "404" in bench.supply.failure(1)[1]


def test_a_source_that_ends_with_its_user_harms_nobody(
    bench: Bench, undo: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    other = MemorySource(GOOD, bench.good.host)
    with ExitStack() as first:
        blob = bench.open(first, bench.good).blob
        bench.open(undo, other)
        bench.good.gate.clear()
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(blob.read_at(0, 10)))
        reader.start()
        assert until(lambda: bool(bench.good.reads))
    bench.good.failures.append(SourceError("reading a blob failed: good: it is being closed"))
    bench.good.gate.set()
    reader.join(WAIT)
    assert found == [GOOD[:10]]
    assert len(other.reads) == 1
    assert not caplog.records


def down(bench: Bench, undo: ExitStack) -> Blob:
    """A blob whose source has been given up."""
    bench.good.well = False
    blob = bench.open(undo, bench.good, policy=Policy("eio", 0.1)).blob
    with pytest.raises(SourceError):
        blob.read_at(0, 10)
    assert until(lambda: blob.stat().down)
    return blob


def test_who_joins_with_a_source_that_is_well_is_served_at_once(bench: Bench, undo: ExitStack) -> None:
    blob = down(bench, undo)
    other = MemorySource(GOOD, "other")
    assert bench.open(undo, other, policy=Policy("eio", 0.1)).blob is blob
    assert not blob.stat().down
    assert blob.read_at(0, 10) == GOOD[:10]
    assert until(lambda: not bench.supply.failure(1)[1])


def test_who_joins_with_a_host_that_has_just_failed_does_not_make_others_wait_for_it(
    bench: Bench, undo: ExitStack
) -> None:
    blob = down(bench, undo)
    bench.supply.backoff.told(bench.good.host, WAIT)
    bench.open(undo, MemorySource(GOOD, bench.good.host), policy=Policy("eio", 0.1))
    assert blob.stat().down


def test_one_that_was_denied_does_not_speak_for_who_joins(bench: Bench, undo: ExitStack) -> None:
    bench.good.failures.extend([AccessDenied("reading a blob failed: good: 401")] * 1000)
    blob = bench.open(undo, bench.good).blob
    with pytest.raises(SourceError):
        blob.read_at(0, 10)
    named = bench.open(undo, MemorySource(GOOD, bench.good.host))
    assert named.blob.read_at(0, 10) == GOOD[:10]
    assert until(lambda: bench.supply.why([named]) is None)


def test_one_whose_credentials_cannot_be_had_does_not_speak_for_others_of_the_host(
    bench: Bench, undo: ExitStack
) -> None:
    error = LoginUnknown("asking docker-credential-x for credentials failed", host="docker-credential-x")
    bench.good.failures.extend([error] * 1000)
    blob = bench.open(undo, bench.good).blob
    bench.open(undo, MemorySource(GOOD, bench.good.host))
    assert blob.read_at(0, 10) == GOOD[:10]
    assert not bench.supply.backoff.waiting(bench.good.host)


# ---- policies -------------------------------------------------------------------------------------------


def test_the_most_patient_one_rules_while_it_is_here(
    bench: Bench, undo: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruling: list[str] = []
    blob = bench.open(undo, bench.good, policy=Policy("eio", 30.0)).blob
    monkeypatch.setattr(blob, "set_policy", lambda policy: ruling.append(str(policy)))
    with ExitStack() as mounted:
        bench.open(mounted, bench.good, policy=Policy("hang"))
        with ExitStack() as inspecting:
            bench.open(inspecting, bench.good, policy=Policy("eio", 90.0))
            bench.open(inspecting, bench.good, policy=Policy("retry", 1.0))
            assert ruling[-1] == "hang"
        assert ruling[-1] == "hang"
    assert ruling[-1] == "eio:30s"
    with ExitStack() as verifying:
        bench.open(verifying, bench.good, policy=Policy("retry", 1.0))
        assert ruling[-1] == "retry:1s"
    assert ruling[-1] == "eio:30s"
    assert bench.open(undo, bench.good).checked == CRC_ONLY
    assert bench.open(undo, bench.good, TABLE).checked == SHA256


def test_what_the_less_patient_one_gave_up_is_tried_again(bench: Bench, undo: ExitStack) -> None:
    with ExitStack() as first:
        blob = bench.open(first, bench.good, policy=Policy("eio", 0.1)).blob
        bench.good.well = False
        with pytest.raises(SourceError):
            blob.read_at(0, 10)
        assert until(lambda: blob.stat().down)
        bench.open(undo, bench.good, policy=Policy("hang"))
        assert not blob.stat().down
    found: list[bytes] = []
    reading = threading.Thread(target=lambda: found.append(blob.read_at(0, 10)))
    reading.start()
    asked = len(bench.good.reads)
    assert until(lambda: len(bench.good.reads) > asked)
    bench.good.well = True
    reading.join(WAIT)
    assert found == [GOOD[:10]]
