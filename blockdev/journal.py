# SPDX-License-Identifier: Apache-2.0
"""Where an owner's log lines go: stderr in the foreground, a bounded file otherwise.

One logfmt line an event. Only our own loggers are written: a library's debug lines may
carry signed URLs.
"""

from __future__ import annotations

import json
import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path
from time import gmtime, strftime

from blockdev.errors import from_os
from blockdev.ownfile import open_own

_FILE_MAX = 1 << 20  # bytes; weeks of an owner that has nothing to complain of
_KEPT = 1  # older files beside the current one


class _Logfmt(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = f"{strftime('%Y-%m-%dT%H:%M:%S', gmtime(record.created))}.{int(record.msecs):03}Z"
        room = record.name.removeprefix("blockdev.")
        message = json.dumps(record.getMessage(), ensure_ascii=False)
        line = f"time={when} level={record.levelname.lower()} room={room} thread={record.threadName} msg={message}"
        if record.exc_info:
            line += f" trace={json.dumps(self.formatException(record.exc_info), ensure_ascii=False)}"
        return line


def write_log(path: Path | None, *, debug: bool) -> None:
    """Send this process's log to a file at path (made private, rotated), or to stderr. Refusals are from_os()'s."""
    handler: logging.Handler = logging.StreamHandler()
    if path:
        os.close(_open(path))
        # Half a surrogate pair, which JSON can carry, has no UTF-8.
        handler = RotatingFileHandler(
            path, maxBytes=_FILE_MAX, backupCount=_KEPT, encoding="utf-8", errors="backslashreplace"
        )
    handler.setFormatter(_Logfmt())
    logger = logging.getLogger("blockdev")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


def catch_crashes(path: Path) -> None:
    """Have what would go to stdout and stderr (a failed C assertion) written to the file too."""
    fd = _open(path)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _open(path: Path) -> int:
    try:
        return open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        raise from_os("writing the log failed", error, str(path)) from None
