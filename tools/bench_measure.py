# SPDX-License-Identifier: Apache-2.0
"""A row of a bench: one thing done by several contestants, and the bars it has to clear.

Contestants take turns within each round, so that whatever else the machine does falls on
all of them, and medians count. Computation is judged by the processor time of the serving
processes, since that is what a busy machine changes least; what the network or several
cores decide is judged by the clock. A figure within the rival's own smallest and largest
counts as equal to it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

Judge = Literal["clock", "cpu"]
LOWER_IS_BETTER = frozenset({"ms", "ns", "MiB"})


@dataclass(frozen=True)
class Sample:
    """One measurement: the figure by the clock, in the row's unit, and what it cost the servers.

    `cpu` is processor seconds per GiB, or microseconds per request, as the row says; None if the
    serving processes cannot be told apart from others.
    """

    figure: float
    cpu: float | None = None


@dataclass(frozen=True)
class Bar:
    """What a contestant has to reach.

    Against a rival: its speed is at least `at_least` times the rival's, or its cost at most
    `at_most` times. Without one: the figure itself is at least, or at most, that.
    """

    ours: str
    rival: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    by: Judge = "clock"

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a bar is either at_least or at_most")


@dataclass(frozen=True)
class Verdict:
    """How a bar was met."""

    bar: Bar
    value: float  # the ratio, or the figure
    equal: bool  # within the rival's smallest and largest
    holds: bool

    def text(self, clock: str) -> str:
        bar = self.bar
        limit = f">= {bar.at_least:g}" if bar.at_least is not None else f"<= {bar.at_most:g}"
        what = f"{bar.ours} : {bar.rival}, by {'CPU time' if bar.by == 'cpu' else clock}" if bar.rival else bar.ours
        equal = " (within the rival's own range: equal)" if self.equal else ""
        return f"{self.value:8.2f}  {limit:<8} {'holds' if self.holds else 'FALLS SHORT':<11} {what}{equal}"


@dataclass
class Row:
    """All samples of one thing that was measured."""

    name: str
    unit: str
    cpu_unit: str = ""  # of the samples' cpu
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    clock: str = "the clock"  # what the figures are told by

    def median(self, name: str, by: Judge = "clock") -> float:
        return statistics.median(self._values(name, by))

    def best(self, names: list[str]) -> str:
        """The contestant with the best figure."""
        pick = min if self.unit in LOWER_IS_BETTER else max
        return pick(names, key=self.median)

    def judge(self, bar: Bar) -> Verdict:
        if bar.rival is None:
            value = self.median(bar.ours, bar.by)
            return Verdict(bar, value, equal=False, holds=_reaches(bar, value))
        ours, rival = self.median(bar.ours, bar.by), self.median(bar.rival, bar.by)
        lower_is_better = bar.by == "cpu" or self.unit in LOWER_IS_BETTER
        speed = rival / ours if lower_is_better else ours / rival
        rivals = self._values(bar.rival, bar.by)
        equal = speed < 1 and min(rivals) <= ours <= max(rivals)
        value = speed if bar.at_least is not None else 1 / speed
        return Verdict(bar, value, equal, _reaches(bar, 1.0 if equal else value))

    def print(self) -> None:
        print(f"\n{self.name} [{self.unit}]")
        for name in self.samples:
            values = self._values(name, "clock")
            line = f"  {name:<34} {self.median(name):>12,.1f}"
            line += f"  ({min(values):,.1f} .. {max(values):,.1f})" if len(values) > 1 else ""
            if self._known_cpu(name):
                line += f"   {self.median(name, 'cpu'):.3f} {self.cpu_unit}"
            print(line)
        for remark in self.remarks:
            print(f"  {remark}")
        for bar in self.bars:
            print(f"  {self.judge(bar).text(self.clock)}", flush=True)

    def record(self) -> dict[str, object]:
        contestants = {
            name: {
                "median": self.median(name),
                "cpu_median": self.median(name, "cpu") if self._known_cpu(name) else None,
                "samples": [sample.figure for sample in samples],
                "cpu_samples": [sample.cpu for sample in samples],
            }
            for name, samples in self.samples.items()
        }
        bars = [
            {**asdict(verdict.bar), "value": verdict.value, "equal": verdict.equal, "holds": verdict.holds}
            for verdict in map(self.judge, self.bars)
        ]
        return {
            "name": self.name,
            "unit": self.unit,
            "cpu_unit": self.cpu_unit,
            "contestants": contestants,
            "remarks": self.remarks,
            "bars": bars,
        }

    def _known_cpu(self, name: str) -> bool:
        return all(sample.cpu is not None for sample in self.samples[name])

    def _values(self, name: str, by: Judge) -> list[float]:
        samples = self.samples[name]
        if by == "clock":
            return [sample.figure for sample in samples]
        return [sample.cpu for sample in samples if sample.cpu is not None]


def _reaches(bar: Bar, value: float) -> bool:
    return value >= bar.at_least if bar.at_least is not None else value <= (bar.at_most or 0.0)


def contest(rounds: int, contestants: dict[str, Callable[[], Sample]]) -> dict[str, list[Sample]]:
    """Let each of them have one turn in every round."""
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, turn in contestants.items():
            samples[name].append(turn())
    return samples
