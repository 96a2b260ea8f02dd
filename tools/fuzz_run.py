# SPDX-License-Identifier: Apache-2.0
"""tools/fuzz: builds the fuzz targets, runs them for a given CPU time, and keeps what they found.

A target is a C file tests/fuzz/fuzz_NAME.c (libFuzzer, ASan and UBSan) or a function in
tests/fuzz/parsers.py (atheris). Both take libFuzzer's flags. Kept inputs are in
tests/fuzz/corpus/NAME, whatever else was found in build/fuzz/found/NAME. A crash, a hang
or greed stops the target and leaves the input in build/fuzz/findings/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_coverage import LINES_MIN, PARSERS, covered

from tests.machine import machine

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "fuzz"
CORPUS = CASES / "corpus"
GUIDED = CASES / "guided.py"  # one program for all targets of parsers.py
BUILD = ROOT / "build" / "fuzz"
FOUND = BUILD / "found"
FINDINGS = BUILD / "findings"

MEMORY_MIB = 256  # resident: the bound promised for any input, sanitizer included
MALLOC_MIB = 1100  # at once: the states of the largest blob, of which what is absent is never touched
INPUT_SECONDS = 10  # likewise
SLICE_SECONDS = 60  # wall time after which CPU time is looked at
INPUT_MAX = 16 << 10  # bytes: the smallest sealed layer has 8 KiB
KEPT_MAX = 96 << 10  # bytes of one target's kept inputs: a MiB in all
KEPT_INPUT_MAX = 12 << 10

# A quarantine is memory too; leaks are looked for after each input that seems to leak.
SANITIZERS = {
    "ASAN_OPTIONS": "quarantine_size_mb=8:detect_leaks=1:malloc_context_size=10",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@dataclass(frozen=True)
class Target:
    """Something that takes an input. `program` runs it under libFuzzer's flags."""

    name: str
    program: Path

    @property
    def work(self) -> Path:
        return FOUND / self.name

    @property
    def kept(self) -> Path:
        return CORPUS / self.name

    @property
    def native(self) -> bool:
        return self.program != GUIDED


def targets() -> list[Target]:
    """All there are, C first."""
    native = [path.stem.removeprefix("fuzz_") for path in sorted(CASES.glob("fuzz_*.c"))]
    python = [name for name in PARSERS if name not in native]
    return [
        *(Target(name, BUILD / "libfuzzer" / f"fuzz_{name}") for name in native),
        *(Target(name, GUIDED) for name in python),
    ]


def build(kind: str, sanitize: str) -> Path:
    """One build of the C targets with clang; its folder."""
    folder = BUILD / kind
    log = BUILD / f"{kind}.log"
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", ROOT / "native", "-B", folder, "-G", "Ninja", "-DCMAKE_C_COMPILER=clang"]
    with log.open("w") as output:
        for command in ([*configure, f"-DSANITIZE={sanitize}"], ["cmake", "--build", folder]):
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode:
                sys.exit(f"fuzz: the targets ({kind}) did not build; whole log: {log}\n{log.read_text()[-3000:]}")
    return folder


def run(target: Target, *flags: str | Path) -> tuple[int, str, float]:
    """One libFuzzer process: its exit status, output and CPU seconds."""
    log = BUILD / f"{target.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [target.program, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | SANITIZERS | {"OCIBLK_FUZZ_TARGET": target.name},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, log.read_text(errors="replace"), usage.ru_utime + usage.ru_stime


def fuzz(target: Target, seconds: float) -> bool:
    """Look for findings, for what is left of `seconds`; says and records how it went. False if there was one."""
    for folder in (target.work, target.kept):
        folder.mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(exist_ok=True)
    limits = (
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-malloc_limit_mb={MALLOC_MIB}",
        f"-timeout={INPUT_SECONDS}",
        f"-max_len={INPUT_MAX}",
    )
    digest = _digest(target)
    before = _recorded(target)
    known = before if before.get("parser") == digest and not before.get("findings") else {}
    cpu, runs, peak = (float(known.get(name, 0)) for name in ("cpu_seconds", "inputs", "peak_mib"))
    status = 0
    output = ""
    while cpu < seconds and not status:
        time = f"-max_total_time={max(1, round(min(SLICE_SECONDS, seconds - cpu)))}"
        place = f"-artifact_prefix={FINDINGS}/{target.name}-"
        status, output, used = run(target, target.work, target.kept, time, place, *limits, "-print_final_stats=1")
        cpu += used
        runs += _figure(output, "number_of_executed_units")
        peak = max(peak, _figure(output, "peak_rss_mb"))
        figures = {"cpu_seconds": round(cpu), "inputs": int(runs), "peak_mib": peak, "findings": int(status != 0)}
        _record(target, {"parser": digest, **figures})
    print(f"fuzz: {target.name}: {runs:,.0f} inputs in {cpu:.0f} CPU seconds, peak {peak:.0f} MiB", flush=True)
    if status:
        print(f"{output[-6000:]}\nfuzz: {target.name}: FINDING: the input is in {FINDINGS}")
    return not status


def _digest(target: Target) -> str:
    """Of what is tried: seconds spent on it before count as long as it stays the same."""
    case = [CASES / f"fuzz_{target.name}.c"] if target.native else []
    files = [*case, *(ROOT / parser for parser in PARSERS[target.name])]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _figure(output: str, name: str) -> float:
    found = re.search(rf"stat::{name}:\s+(\d+)", output)
    return float(found[1]) if found else 0.0


def _record(target: Target, figures: Mapping[str, object]) -> None:
    """Into docs/measured/, beside what stands there already."""
    text = json.dumps({"v": 1, **_recorded(target), **figures, "machine": machine()}, indent=2)
    _record_of(target).write_text(text + "\n")


def _record_of(target: Target) -> Path:
    return ROOT / "docs" / "measured" / f"fuzz-{target.name}.json"


def _recorded(target: Target) -> dict[str, Any]:
    path = _record_of(target)
    recorded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return recorded


def replay(target: Target) -> bool:
    """Every kept input once."""
    files = sorted(target.kept.iterdir())
    status, output, _ = run(target, *files)
    print(f"replay: {target.name}: {len(files)} inputs{': FAILED' if status else ''}", flush=True)
    if status:
        print(output[-6000:])
    return not status


def keep(target: Target) -> None:
    """The smallest set of known inputs that reaches what all of them reach, within KEPT_MAX."""
    fresh = BUILD / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    target.kept.mkdir(parents=True, exist_ok=True)
    edges = ("-use_counters=0",) if target.native else ()  # atheris has counters only
    run(target, "-merge=1", *edges, f"-max_len={KEPT_INPUT_MAX}", fresh, target.kept, target.work)
    named = {path for path in target.kept.iterdir() if not re.fullmatch(r"[0-9a-f]{40}", path.name)}
    for path in set(target.kept.iterdir()) - named:
        path.unlink()
    room = KEPT_MAX
    for path in sorted(fresh.iterdir(), key=lambda path: path.stat().st_size):
        if path.stat().st_size <= room:
            room -= path.stat().st_size
            shutil.copy(path, target.kept)
    count = len(list(target.kept.iterdir()))
    print(f"keep: {target.name}: {count} inputs, {KEPT_MAX - room} bytes", flush=True)


def coverage(chosen: Sequence[Target]) -> bool:
    """Line coverage of each parser by the kept inputs, printed and recorded; False if one is below LINES_MIN."""
    folder = build("coverage", "coverage")
    good = True
    for target in chosen:
        lines = covered(target.name, target.kept, folder if target.native else None)
        for parser, (reached, total) in lines.items():
            share = 100 * reached / total
            good = good and share >= LINES_MIN
            print(f"coverage: {target.name}: {parser}: {share:.1f} % of {total} lines", flush=True)
        _record(target, {"lines_percent": {parser: round(100 * r / t, 1) for parser, (r, t) in lines.items()}})
    print(f"coverage: {'every' if good else 'NOT every'} parser has {LINES_MIN} %")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="CPU seconds of each target (60)")
    for mode in ("replay", "coverage", "keep", "list"):
        parser.add_argument(f"--{mode}", action="store_const", const=mode, dest="mode")
    arguments = parser.parse_args()
    known = {target.name: target for target in targets()}
    if unknown := set(arguments.targets) - set(known):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    chosen = [known[name] for name in arguments.targets or known]
    if arguments.mode == "list":
        print("\n".join(f"{target.name}: {', '.join(PARSERS[target.name])}" for target in chosen))
        return 0
    if arguments.mode == "coverage":
        return int(not coverage(chosen))
    build("libfuzzer", "fuzz")
    if arguments.mode == "keep":
        for target in chosen:
            keep(target)
        return 0
    good = [replay(target) if arguments.mode else fuzz(target, arguments.seconds) for target in chosen]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
