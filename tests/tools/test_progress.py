# SPDX-License-Identifier: Apache-2.0
"""A full run of the tests that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.requires import ROOT

CUT_OFF = 77  # exit status of a run that ends in the middle of a test

CONFTEST = """
from pathlib import Path
from tests.progress import Progress

def pytest_configure(config):
    config.pluginmanager.register(Progress(Path({project!r})))
"""
TESTS = """
import os
from pathlib import Path

def note(name):
    with Path({project!r}, "ran").open("a") as ran:
        ran.write(name + " ")

def test_first():
    note("first")

def test_second():
    note("second")
    if Path({project!r}, "power-cut").exists():
        os._exit({cut_off})

def test_third():
    note("third")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three tests of their own, the second of which ends the run while the file power-cut exists."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "conftest.py").write_text(CONFTEST.format(project=str(tmp_path)))
    (tmp_path / "tests" / "test_three.py").write_text(TESTS.format(project=str(tmp_path), cut_off=CUT_OFF))
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tmp_path / "power-cut").touch()
    return tmp_path


def full_run(project: Path, *arguments: str) -> tuple[int, list[str]]:
    """Exit status, and the tests that ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    status = subprocess.run(command, cwd=project, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    ran = (project / "ran").read_text().split()
    (project / "ran").write_text("")
    return status, ran


def measured(project: Path) -> Path:
    return project / "docs" / "measured" / "tests-full.json"


def test_what_had_passed_is_not_run_again(project: Path):
    assert full_run(project) == (CUT_OFF, ["first", "second"])
    assert not measured(project).exists()
    (project / "power-cut").unlink()
    assert full_run(project, "--collect-only") == (0, [])  # which proves nothing, and forgets nothing
    assert full_run(project) == (0, ["second", "third"])
    assert json.loads(measured(project).read_text())["passed"] == 3
    assert full_run(project) == (0, ["first", "second", "third"])  # a finished run is followed by a new one


def test_other_sources_begin_anew(project: Path):
    assert full_run(project) == (CUT_OFF, ["first", "second"])
    (project / "power-cut").unlink()
    (project / "native").mkdir()
    (project / "native" / "new.c").touch()
    assert full_run(project) == (0, ["first", "second", "third"])


def test_a_changed_module_is_run_again_and_no_other(project: Path):
    (project / "tests" / "test_before.py").write_text("def test_before():\n    pass\n")
    assert full_run(project) == (CUT_OFF, ["first", "second"])
    (project / "power-cut").unlink()
    with (project / "tests" / "test_before.py").open("a") as module:
        module.write(f"\n\ndef test_added():\n    open({str(project / 'ran')!r}, 'a').write('added ')\n")
    assert full_run(project) == (0, ["added", "second", "third"])
    assert json.loads(measured(project).read_text())["passed"] == 5


def test_a_skipped_test_has_not_passed(project: Path):
    note = f"open({str(project / 'ran')!r}, 'a').write('tried ')"
    skipping = f"import pytest\n\ndef test_skipped():\n    {note}\n    pytest.skip()\n"
    (project / "tests" / "test_before.py").write_text(skipping)
    assert full_run(project) == (CUT_OFF, ["tried", "first", "second"])
    (project / "power-cut").unlink()
    assert full_run(project) == (0, ["tried", "second", "third"])
    record = json.loads(measured(project).read_text())
    assert (record["passed"], record["skipped"]) == (3, 1)
