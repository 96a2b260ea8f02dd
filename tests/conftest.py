# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: its own scratch space, the leak check, --full.

A session works in /tmp/ociblk-test/PID/, which it locks. Sessions whose lock is free
are dead, and are swept before this one starts. A mount, a loop device or a process
that is still there at the end fails the session, by the name of the test it came from.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import leaks, requires
from tests.machine import machine
from tests.progress import Progress

pytest_plugins = ("tests.commands", "tests.registries")

LEAVE_WAIT = 20.0  # seconds for what was told to stop: an idle owner alone takes 10 to leave

_run = pytest.StashKey[Path]()
_failed = pytest.StashKey[bool]()
_first_seen = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the large counts; same as OCIBLK_FULL=1")


# The same examples in each usual run; new ones in a full run. No deadline: a busy machine is no defect.
settings.register_profile("ociblk", derandomize=not requires.FULL, deadline=None)
settings.load_profile("ociblk")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full"):
        os.environ["OCIBLK_FULL"] = "1"
        requires.FULL = True
    if requires.FULL and "OCIBLK_TSAN_ENGINE" not in os.environ:  # what passes there has not yet passed as installed
        config.pluginmanager.register(Progress(requires.ROOT))
    # Deaf to it, as a shell's background jobs are, we would start programs that are deaf to it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup's: a handler is as deaf, and exec drops it
        signal.signal(signal.SIGHUP, lambda number, frame: None)
    run = leaks.RUNS / str(os.getpid())
    leaks.RUNS.mkdir(exist_ok=True)
    runs = os.open(leaks.RUNS, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(runs, fcntl.LOCK_EX)  # nobody sweeps between mkdir and lock
    _sweep_dead_runs()
    run.mkdir()
    _lock(run)
    os.close(runs)
    config.stash[_run] = run
    config.stash[_first_seen] = {}
    os.environ[leaks.RUN_VARIABLE] = str(run)
    if config.option.basetemp is None:
        config.option.basetemp = str(run / "t")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_failed] = exitstatus != 0


def pytest_unconfigure(config: pytest.Config) -> None:
    # A failed run keeps its files for whoever looks into it; the next run removes them.
    if _run in config.stash and not config.stash.get(_failed, True):
        shutil.rmtree(config.stash[_run], ignore_errors=True)


def _lock(run: Path) -> bool:
    """Lock a run's directory until this process ends; False if its own process lives, or has just removed it."""
    try:
        fd = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    return True


def _sweep_dead_runs() -> None:
    for run in leaks.RUNS.iterdir():
        if _lock(run):
            for swept in leaks.sweep(run):
                print(f"swept what an earlier run left: {swept}", file=sys.stderr)
            shutil.rmtree(run, ignore_errors=True)  # another run may be sweeping it, too


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind(pytestconfig: pytest.Config) -> Iterator[None]:
    """The first fixture to be made, so the last to end: by then all must be gone."""
    yield
    run, first_seen = pytestconfig.stash[_run], pytestconfig.stash[_first_seen]
    deadline = time.monotonic() + LEAVE_WAIT
    while (left := leaks.describe(run)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        leaks.sweep(run)
        lines = [f"  {what} (first seen after {first_seen.get(what, 'the last test')})" for what in left]
        pytest.fail("left behind:\n" + "\n".join(lines), pytrace=False)


@pytest.fixture(autouse=True)
def _note_leftovers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remember after which test each thing was first seen, to name it if it stays."""
    yield
    for what in leaks.describe(request.config.stash[_run]):
        request.config.stash[_first_seen].setdefault(what, request.node.nodeid)


@pytest.fixture(scope="session")
def ociblk() -> str:
    """Path of the installed command that goes with this interpreter."""
    command = Path(sysconfig.get_path("scripts")) / "ociblk"
    assert command.exists(), f"{command} is not installed; run tools/setup"
    return str(command)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The reference fixtures' folder; skips where it is absent."""
    return requires.requires_fixtures()


@pytest.fixture
def record_measured() -> Callable[[str, dict[str, object]], None]:
    """record(name, figures): under --full, leave figures in docs/measured/NAME.json."""

    def record(name: str, figures: dict[str, object]) -> None:
        if requires.FULL:
            folder = requires.ROOT / "docs" / "measured"
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"v": 1, **figures, "machine": machine()}, indent=2)
            (folder / f"{name}.json").write_text(text + "\n")

    return record
