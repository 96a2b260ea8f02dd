#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""`guided.py LIBFUZZER_ARGUMENTS...`: a target of parsers.py under atheris, guided by its coverage.

The target is $OCIBLK_FUZZ_TARGET, since libFuzzer starts itself again with its own
arguments alone. Only tools/fuzz runs this: atheris is no dependency of the tests.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
# An editable install brings a finder of its own, whose modules atheris cannot instrument.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]

with atheris.instrument_imports(include=["formats", "blockdev.build", "json"]):
    from tests.fuzz import parsers

if __name__ == "__main__":
    atheris.Setup(sys.argv, parsers.TARGETS[os.environ["OCIBLK_FUZZ_TARGET"]])
    atheris.Fuzz()
