# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/performance.md, from what a bench recorded.

Usage: python -m tools.bench_table [FILE] (docs/measured/bench.json). One line for each bar.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.bench_run import MEASURED


def figure(row: dict[str, Any], name: str) -> str:
    """A contestant's median, and its processor time where that is known."""
    contestant = row["contestants"][name]
    median = contestant["median"]
    text = f"{median:,.0f}" if median >= 100 else f"{median:.1f}"
    cpu = contestant["cpu_median"]
    return f"{text} {row['unit']}" + (f" ({cpu:.2f} {row['cpu_unit']})" if cpu is not None else "")


def line(row: dict[str, Any], bar: dict[str, Any]) -> str:
    limit = f"≥ {bar['at_least']:g}" if bar["at_least"] is not None else f"≤ {bar['at_most']:g}"
    rival = f"{bar['rival']}: {figure(row, bar['rival'])}" if bar["rival"] else ""
    verdict = ("equal" if bar["equal"] else "holds") if bar["holds"] else "**falls short**"
    by = " CPU" if bar["by"] == "cpu" else ""
    value = f"{bar['value']:.2f}" if bar["rival"] else figure(row, bar["ours"])
    return f"| {bar['ours']}: {figure(row, bar['ours'])} | {rival} | {value}{by} | {limit} | {verdict} |"


def main() -> None:
    measured = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else MEASURED).read_text())
    for row in measured["rows"]:
        print(f"\n{row['name']}\n\n| ours | peer | ratio | bar | |\n|---|---|---|---|---|")
        for bar in row["bars"]:
            print(line(row, bar))
        for remark in row["remarks"]:
            print(f"\n{remark}")


main()
