# SPDX-License-Identifier: Apache-2.0
"""Puts what a bench recorded into docs/performance.md, between its two markers.

Usage: python -m tools.bench_table [FILE] (docs/measured/bench.json). One line for each bar.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.bench_run import MEASURED, ROOT

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
HEAD = "| | ours | peer | ratio, by | bar | |\n|---|---|---|---|---|---|\n"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def figure(row: dict[str, Any], name: str) -> str:
    """A contestant's median, and its processor time where that is known."""
    contestant = row["contestants"][name]
    cpu = contestant["cpu_median"]
    return f"{number(contestant['median'])} {row['unit']}" + (
        f", {cpu:.2f} {row['cpu_unit']}" if cpu is not None else ""
    )


def line(row: dict[str, Any], bar: dict[str, Any]) -> str:
    limit = f"≥ {bar['at_least']:g}" if bar["at_least"] is not None else f"≤ {bar['at_most']:g}"
    rival = f"{bar['rival']}: {figure(row, bar['rival'])}" if bar["rival"] else ""
    verdict = ("equal" if bar["equal"] else "holds") if bar["holds"] else "**falls short**"
    by = "CPU" if bar["by"] == "cpu" or row["name"].startswith("in process") else "clock"
    value = f"{bar['value']:.2f}, {by}" if bar["rival"] else ""
    return f"| {row['name']} | {bar['ours']}: {figure(row, bar['ours'])} | {rival} | {value} | {limit} | {verdict} |\n"


def section(measured: dict[str, Any]) -> str:
    """All bars as one table, after a line that says where they were measured."""
    machine = measured["machine"]
    loads = [load[0] for row in measured["rows"] for load in row["load"]]
    settings = measured["settings"]
    bars = [(row, bar) for row in measured["rows"] for bar in row["bars"]]
    return (
        f"{machine['cpus']} cores ({machine['cpu']}), Linux {machine['kernel']}, medians of {settings['rounds']}, "
        f"revision {machine['revision']}; load {min(loads):.1f} to {max(loads):.1f}. "
        f"{sum(bar['holds'] for _, bar in bars)} of {len(bars)} bars hold.\n\n"
        + HEAD
        + "".join(line(row, bar) for row, bar in bars)
    )


def main() -> None:
    measured = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else MEASURED).read_text())
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + section(measured) + END + after)


main()
