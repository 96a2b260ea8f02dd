# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (-p tests.tsan): the tests use the engine as built for ThreadSanitizer.

tools/tsan sets the sanitizer up and names that build in $OCIBLK_TSAN_ENGINE. Programs the
tests start run without the sanitizer.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import blockdev

PRELOAD = "LD_PRELOAD"
ENGINE = "OCIBLK_TSAN_ENGINE"
NAME = "blockdev._native"


def load() -> str:
    """Put the sanitized engine where blockdev.engine will look; the file it came from."""
    path = os.environ[ENGINE]
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module in {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    setattr(blockdev, NAME.rpartition(".")[2], module)
    return path


os.environ.pop(PRELOAD, None)
loaded = load()


def pytest_report_header() -> str:
    return f"engine under ThreadSanitizer: {loaded}"
