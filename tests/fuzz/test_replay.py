# SPDX-License-Identifier: Apache-2.0
"""Every kept input of every target of formats/ again. Those of the C targets are ctest's (replay.c)."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from tests.fuzz.parsers import TARGETS
from tests.requires import ROOT

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
MEMORY_MAX = 64 << 20  # for inputs of a few KiB; tools/fuzz holds any input under 256 MiB
CORPUS_BYTES_MAX = 1 << 20
CORPUS_FILES_MAX = 800


def kept(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs_are_values_or_format_errors(target: str) -> None:
    assert kept(target), "no input is kept"
    for path in kept(target):
        tracemalloc.start()
        try:
            TARGETS[target](path.read_bytes())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < MEMORY_MAX, path


def test_every_target_has_its_corpus_and_all_of_them_are_small() -> None:
    native = {path.stem.removeprefix("fuzz_") for path in (ROOT / "tests" / "fuzz").glob("fuzz_*.c")}
    assert {path.name for path in CORPUS.iterdir()} == native | set(TARGETS)
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) <= CORPUS_FILES_MAX
    assert sum(path.stat().st_size for path in files) <= CORPUS_BYTES_MAX
