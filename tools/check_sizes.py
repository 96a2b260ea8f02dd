# SPDX-License-Identifier: Apache-2.0
"""Prints how large the C core and its border are, and fails past their ceilings.

Two ceilings hold: lines of C, and functions in ob.h (docs/decisions/0009). File lengths
are advice: a file past its measure is named, and a reviewer asks whether it is still one
noun.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
C_LINES_MAX = 6000  # lines of code: the core must stay readable in a day; tests do not count
BORDER_FUNCTIONS_MAX = 48  # each one is a promise kept on both sides
MEASURES = {".py": 400, ".c": 600, ".h": 600}  # lines of one file, soft


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def lines_of_code(path: Path) -> int:
    """Those with anything but blanks and comments in them."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.DOTALL)
    return sum(1 for line in text.splitlines() if line.strip())


def border_functions(header: Path) -> list[str]:
    """Names of the functions ob.h declares."""
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    return re.findall(r"\b(ob_\w+)\s*\([^)]*\)\s*;", text)


def main() -> int:
    core = sorted(path for path in (ROOT / "native").iterdir() if path.suffix in {".c", ".h"})
    total = sum(lines_of_code(path) for path in core)
    written = sum(lines(path) for path in core)
    functions = border_functions(ROOT / "native" / "ob.h")
    print(f"check: C core: {total} lines of code of at most {C_LINES_MAX}; {written} with comments and blanks")
    print(f"check: ob.h: {len(functions)} functions of at most {BORDER_FUNCTIONS_MAX}")
    python = [path for room in ("blockdev", "formats", "tests", "tools") for path in (ROOT / room).rglob("*.py")]
    for path in sorted(core + python):
        if lines(path) > MEASURES[path.suffix]:
            print(f"check: advice: {path.relative_to(ROOT)} has {lines(path)} lines (measure: {MEASURES[path.suffix]})")
    return int(total > C_LINES_MAX or len(functions) > BORDER_FUNCTIONS_MAX)


if __name__ == "__main__":
    sys.exit(main())
