# SPDX-License-Identifier: Apache-2.0
"""Who waits for what an owner does: told of it, and looked after, since nobody works for one who has gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

_LOOK_EVERY = 0.2  # seconds


class Caller(NamedTuple):
    """tell(line): what its user should know now; gone(): whether he has hung up."""

    tell: Callable[[str], None]
    gone: Callable[[], bool]

    def look(self) -> None:
        """ConnectionError if he has gone."""
        if self.gone():
            raise ConnectionAbortedError

    def sleep(self, seconds: float) -> None:
        """As time.sleep(), and look() meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.look()
            time.sleep(min(left, _LOOK_EVERY))
