# SPDX-License-Identifier: Apache-2.0
"""python -m blockdev is the ociblk command: how an owner is started with this interpreter."""

from __future__ import annotations

import sys

from blockdev.cli import main

if __name__ == "__main__":
    sys.exit(main())
