# SPDX-License-Identifier: Apache-2.0
"""Lets a full run that was cut off go on where it stopped.

A full run takes hours. Every test that passed is noted in build/full/ under a digest of
the sources, with a digest of its own module; the next full run of the same leaves it out.
Thus a change of one test module repeats that module's tests, any other change all tests.
When all have passed, the notes are removed and docs/measured/tests-full.json says so.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest

from tests.machine import machine

SOURCES = ("blockdev", "formats", "native", "tests")


def sources_digest(root: Path) -> str:
    """Of all that any test may use: everything but the test modules."""
    digest = hashlib.sha256()
    for room in SOURCES:
        for path in sorted((root / room).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and not path.match("test_*.py"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Progress:
    """A pytest plugin; registered for full runs alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes = root / "build" / "full" / f"{sources_digest(root)}.passed"
        self.started = time.time()
        self.modules: dict[str, str] = {}  # node id → digest of the module that has the test
        self.earlier: set[str] = set()
        self.unproved: set[str] = set()  # failed, or skipped
        self.passed: set[str] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in {item.path for item in items}}
        self.modules = {item.nodeid: digests[item.path] for item in items}
        if not self.notes.exists():
            return
        noted = set(self.notes.read_text().splitlines())
        self.earlier = {item.nodeid for item in items if self._note(item.nodeid) in noted}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.earlier])
        items[:] = [item for item in items if item.nodeid not in self.earlier]

    def _note(self, nodeid: str) -> str:
        return f"{self.modules[nodeid]} {nodeid}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.unproved.add(report.nodeid)
        if report.when == "teardown" and report.nodeid not in self.unproved:
            self.passed.add(report.nodeid)
            self.notes.parent.mkdir(parents=True, exist_ok=True)
            with self.notes.open("a") as notes:
                notes.write(f"{self._note(report.nodeid)}\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.earlier:
            session.exitstatus = pytest.ExitCode.OK
        elif exitstatus != pytest.ExitCode.OK:
            return
        # Only a run of everything says that everything passed.
        if session.config.args_source is not pytest.Config.ArgsSource.TESTPATHS or session.config.option.keyword:
            return
        if session.config.option.collectonly:
            return
        measured = self.root / "docs" / "measured" / "tests-full.json"
        measured.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "v": 1,
            "passed": len(self.earlier | self.passed),
            "skipped": len(self.unproved),
            "last_run_seconds": round(time.time() - self.started),
            "sources": self.notes.stem,
            "machine": machine(),
        }
        measured.write_text(json.dumps(record, indent=2) + "\n")
        self.notes.unlink(missing_ok=True)  # absent where all were skipped

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.earlier:
            terminalreporter.write_line(f"full run continued: {len(self.earlier)} tests had passed before")
