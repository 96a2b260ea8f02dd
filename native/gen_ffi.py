# SPDX-License-Identifier: Apache-2.0
"""Build step: ob.h -> C source of the cffi module (API mode, stable ABI).

Usage: gen_ffi.py OB_H OUTPUT_C. Preprocessor lines are dropped; everything else in
ob.h is a plain declaration, which is what cffi reads.
"""

import sys
from pathlib import Path

from cffi import FFI


def main(header: str, output: str) -> None:
    lines = Path(header).read_text().splitlines()
    ffi = FFI()
    ffi.cdef("\n".join(line for line in lines if not line.startswith("#")))
    ffi.set_source("blockdev._native", '#include "ob.h"', py_limited_api=True)
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
