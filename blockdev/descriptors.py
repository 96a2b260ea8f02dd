# SPDX-License-Identifier: Apache-2.0
"""How many descriptors this process may have, and who may not take the last of them.

A client costs descriptors whenever it likes; a layer, a cached blob or a log needs one when its
time comes. So accept() is told what to leave free.
"""

from __future__ import annotations

import resource

KEPT_FROM_CLIENTS = 96  # of exports: an image of some layers opens yet, and commands are answered
KEPT_FROM_CALLERS = 32  # of the control socket: `ps` and `daemon --stop` open some, the devices' ends none
_SHARE = 4  # at least so many times what is kept may be had: else less is kept


def raise_limit() -> None:
    """As many as we may have: a layer takes two, a connection three."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def scarce(fd: int, kept: int) -> bool:
    """Whether a descriptor that was just made leaves less than `kept` free: the kernel gives the lowest there is."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit != resource.RLIM_INFINITY and fd >= limit - min(kept, limit // _SHARE)
