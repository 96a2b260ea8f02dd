# SPDX-License-Identifier: Apache-2.0
"""Measures every row and says which bars hold; tools/bench starts it."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from tests.machine import machine
from tools import bench_cold as cold
from tools import bench_convert
from tools import bench_warm as warm
from tools.bench_ground import FULL, ROOT, SMALL, TINY, Ground
from tools.bench_measure import Row
from tools.bench_progress import Kept, sources_digest

ROWS: dict[str, Callable[[Ground], Iterator[Row]]] = {
    "process": warm.process,
    "nbd-sequential": warm.nbd_sequential,
    "nbd-random-1": warm.nbd_random_1,
    "nbd-random-16": warm.nbd_random_16,
    "fuse": warm.fuse_file,
    "mount": warm.fuse_mount,
    "import": warm.import_disk,
    "convert": bench_convert.convert,
    "miss-1": cold.miss_1,
    "miss-16": cold.miss_16,
    "link-20ms": cold.link_20ms,
    "link-100ms": cold.link_100ms,
    "pull": cold.pull,
    "first-read": cold.first_read,
}
INTERRUPTED = 130  # exit status, as shells have it
MEASURED = ROOT / "docs" / "measured" / "bench.json"


def chosen(only: list[str]) -> list[str]:
    """The rows whose names begin with one of these words; all, if there are none."""
    for word in only:
        if not any(name.startswith(word) for name in ROWS):
            raise SystemExit(f"tools/bench: no row begins with {word}; there are: {' '.join(ROWS)}")
    return [name for name in ROWS if not only or any(name.startswith(word) for word in only)]


def measure(ground: Ground, name: str) -> list[dict[str, object]] | None:
    """A row's records; None, with the reason printed, if it could not be measured."""
    before = machine()["load"]
    rows = []
    try:
        for row in ROWS[name](ground):
            row.print()
            rows.append(row)
    except (subprocess.CalledProcessError, OSError, RuntimeError):
        traceback.print_exc()
        print(f"\n{name}: not measured", flush=True)
        return None
    return [{**row.record(), "row": name, "load": [before, machine()["load"]]} for row in rows]


def write(target: Path, records: list[dict[str, object]], circumstances: dict[str, object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"v": 2, **circumstances, "rows": records}, indent=2) + "\n")


def say_bars(records: list[dict[str, object]]) -> None:
    bars = [bar for record in records for bar in record["bars"]]  # type: ignore[attr-defined]
    print(f"\n{sum(bar['holds'] for bar in bars)} of {len(bars)} bars hold")
    for record in records:
        for bar in record["bars"]:  # type: ignore[attr-defined]
            if not bar["holds"]:
                limit = bar["at_least"] if bar["at_least"] is not None else bar["at_most"]
                print(f"  falls short: {record['name']}: {bar['ours']}: {bar['value']:.2f}, bar {limit:g}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench", description="Figures of ours beside its peers.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the large disk, more and longer rounds; resumable")
    size.add_argument("--tiny", action="store_true", help="shows that the bench works; its figures mean nothing")
    parser.add_argument(
        "--only", action="append", default=[], metavar="ROW", help="may be given again: " + ", ".join(ROWS)
    )
    parser.add_argument("--again", action="store_true", help="measure also what an earlier run has finished")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="keep finished rows there (default with --full: build/bench)"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help=f"record figures (default with all of --full: {MEASURED})"
    )
    return parser.parse_args()


class Leaving:
    """SIGTERM ends the bench after the row in hand, with everything it started."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _signal: int, _frame: object) -> None:
        self.asked = True


def main() -> int:
    arguments = options()
    leaving = Leaving()
    settings = FULL if arguments.full else TINY if arguments.tiny else SMALL
    digest = sources_digest(ROOT)
    kept, records, missing = None, [], []
    keep = arguments.keep or (ROOT / "build" / "bench" / "rows" if arguments.full else None)
    if keep:
        kept = Kept(keep, f"{digest[:16]}-{settings.files}")
    here = machine()
    print(f"kernel {here['kernel']}, {here['cpus']} x {here['cpu']}, load {here['load']}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ociblk-bench.")))
        ground = Ground(settings, folder, stack)
        for name in chosen(arguments.only):
            if leaving.asked:
                print("\ntools/bench: told to end; finished rows of a --full run are kept")
                return INTERRUPTED
            rows = kept.rows(name) if kept and not arguments.again else None
            if rows is not None:
                print(f"\n{name}: kept from an earlier run", flush=True)
            else:
                assert ground.content  # if it cannot be made, there is nothing to measure
                rows = measure(ground, name)
                if rows is not None:
                    if kept:
                        kept.keep(name, rows)
                    print(f"{name}: measured", flush=True)
            records += rows or []
            missing += [] if rows is not None else [name]
    say_bars(records)
    target = arguments.json or (MEASURED if arguments.full and not arguments.only and not missing else None)
    if target:
        write(target, records, {"machine": here, "sources": digest, "settings": asdict(settings), "missing": missing})
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
