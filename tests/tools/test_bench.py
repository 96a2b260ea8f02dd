# SPDX-License-Identifier: Apache-2.0
"""The bench judges its rows as it says, and goes on after a break."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.requires import ROOT, requires_command, requires_root
from tools.bench_measure import Bar, Row, Sample, contest
from tools.bench_progress import Kept

ENDINGS = {0: "it was done before it was told to end", 130: "it was told to end"}
FIRST, SECOND = "nbd-sequential", "first-read"


def row(unit: str, ours: list[float], rival: list[float]) -> Row:
    return Row("a row", unit, samples={"ours": [*map(Sample, ours)], "rival": [*map(Sample, rival)]})


@pytest.mark.parametrize(
    ("unit", "ours", "rival", "bar", "value", "holds"),
    [
        ("MB/s", [50, 60, 70], [100, 110, 90], Bar("ours", "rival", at_least=0.65), 0.6, False),
        ("MB/s", [50, 70, 70], [100, 110, 90], Bar("ours", "rival", at_least=0.65), 0.7, True),
        ("MB/s", [95, 95, 95], [100, 110, 90], Bar("ours", "rival", at_least=1.0), 0.95, True),  # within its range
        (
            "MB/s",
            [95, 95, 95],
            [100, 110, 90],
            Bar("ours", "rival", at_least=3.0),
            0.95,
            False,
        ),  # equal is not three times
        ("ms", [13, 12, 14], [10, 10, 10], Bar("ours", "rival", at_most=1.3), 1.3, True),
        ("ms", [14, 14, 14], [10, 10, 10], Bar("ours", "rival", at_most=1.3), 1.4, False),
        ("ms", [14, 14, 14], [10, 10, 15], Bar("ours", "rival", at_most=1.3), 1.4, True),
        ("ms", [5], [10], Bar("ours", "rival", at_least=1.0), 2.0, True),
        ("%", [84.0], [97.0], Bar("ours", at_least=85), 84.0, False),
        ("MiB", [256.5], [0.0], Bar("ours", at_most=256), 256.5, False),
    ],
)
def test_a_bar_is_judged_by_medians(
    unit: str, ours: list[float], rival: list[float], bar: Bar, value: float, holds: bool
):
    verdict = row(unit, ours, rival).judge(bar)
    assert verdict.value == pytest.approx(value)
    assert verdict.holds is holds


def test_processor_time_is_a_cost_whatever_the_figures_unit():
    measured = Row("a row", "MB/s", samples={"ours": [Sample(1.0, 0.5)], "rival": [Sample(9.0, 1.5)]})
    assert measured.judge(Bar("ours", "rival", at_least=3.0, by="cpu")).holds
    assert not measured.judge(Bar("ours", "rival", at_least=3.0)).holds


def test_contestants_take_turns():
    order: list[str] = []

    def turn(name: str) -> Sample:
        order.append(name)
        return Sample(0.0)

    contest(2, {"a": lambda: turn("a"), "b": lambda: turn("b")})
    assert order == ["a", "b", "a", "b"]


def test_rows_of_other_sources_are_not_kept(tmp_path: Path):
    Kept(tmp_path / "rows", "one").keep("a", [{"name": "a"}])
    assert Kept(tmp_path / "rows", "one").rows("a") == [{"name": "a"}]
    assert Kept(tmp_path / "rows", "two").rows("a") is None
    assert Kept(tmp_path / "rows", "one").rows("a") is None


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path):
    requires_root()
    requires_command("nbdkit", "qemu-nbd", "nbdcopy", "docker-registry", "mkfs.ext4")
    report = tmp_path / "bench.json"
    command = [sys.executable, ROOT / "tools" / "bench_run.py", "--tiny", "--keep", tmp_path / "rows", "--json", report]
    command += ["--only", FIRST, "--only", SECOND]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as cut_off:
        assert cut_off.stdout is not None
        for line in cut_off.stdout:
            if line.startswith(f"{FIRST}: measured"):
                cut_off.send_signal(signal.SIGTERM)
                break
        cut_off.communicate()
    assert cut_off.returncode in ENDINGS
    finished = {path.stem for path in (tmp_path / "rows").glob("*/*.json")}
    assert FIRST in finished

    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in (FIRST, SECOND):
        assert f"{name}: {'kept from an earlier run' if name in finished else 'measured'}" in output
    recorded = json.loads(report.read_text())
    assert {entry["row"] for entry in recorded["rows"]} == {FIRST, SECOND}
    assert recorded["missing"] == []
