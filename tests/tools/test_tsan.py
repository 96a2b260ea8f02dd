# SPDX-License-Identifier: Apache-2.0
"""tools/tsan would notice: a race planted in a C library that Python threads call is reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.requires import ROOT, requires_command

# Both callers are inside before either counts; what they meet by orders nothing.
LIBRARY = """
#include <pthread.h>
#include <sched.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long counter, inside;
void count(void)
{
	__atomic_fetch_add(&inside, 1, __ATOMIC_RELAXED);
	while (__atomic_load_n(&inside, __ATOMIC_RELAXED) < 2)
		sched_yield();
	%s
	counter++;
	%s
}
"""
CALLER = """
import ctypes, sys, threading
library = ctypes.CDLL(sys.argv[1])      # gives up the GIL around each call
threads = [threading.Thread(target=library.count) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize(
    ("before", "after", "racy"), [("", "", True), ("pthread_mutex_lock(&lock);", "pthread_mutex_unlock(&lock);", False)]
)
def test_a_planted_race_is_reported_and_only_that(tmp_path: Path, before: str, after: str, racy: bool) -> None:
    requires_command("gcc")
    source, library = tmp_path / "planted.c", tmp_path / "planted.so"
    source.write_text(LIBRARY % (before, after))
    subprocess.run(["gcc", "-g", "-O1", "-shared", "-fPIC", "-fsanitize=thread", source, "-o", library], check=True)
    ran = subprocess.run(
        [ROOT / "tools" / "tsan", "--run", sys.executable, "-c", CALLER, library],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode != 0) == racy, ran.stderr
    assert ("data race" in ran.stderr and "planted.c" in ran.stderr) == racy
