# SPDX-License-Identifier: Apache-2.0
"""Where C begins: the only module that imports it.

A negative return becomes one exception (check), a C object is closed once (Handle).
"""

from __future__ import annotations

import errno
import os
from types import TracebackType
from typing import Any, Self

from blockdev._native import ffi, lib
from blockdev.errors import BlockdevError, CorruptImage, EngineError, SourceError

__all__ = ["EXTENT_SIZE", "LAYERS_MAX", "EngineStopped", "Handle", "check", "ffi", "lib"]

ABI_VERSION = 8
EXTENT_SIZE: int = lib.OB_EXTENT_SIZE
LAYERS_MAX: int = lib.OB_LAYERS_MAX

if lib.ob_abi_version() != ABI_VERSION:
    raise ImportError(f"blockdev._native has ABI {lib.ob_abi_version()}, this package needs {ABI_VERSION}: rebuild it")


class EngineStopped(EngineError):
    """The engine is stopping, or what was to be fetched is of a blob that was closed: nothing waits any more."""


_ERROR_CLASS: dict[int, type[BlockdevError]] = {
    errno.ESHUTDOWN: EngineStopped,
    errno.EBADMSG: CorruptImage,
    errno.EIO: SourceError,
}


def check(status: int) -> int:
    """A count or 0 as it is; a negative status as the exception it stands for."""
    if status >= 0:
        return status
    text = ffi.string(lib.ob_last_error()).decode(errors="replace")
    raise _ERROR_CLASS.get(-status, EngineError)(text or f"engine: {os.strerror(-status)}")


class Handle:
    """A C object that is closed once."""

    def __init__(self, pointer: Any, close: Any) -> None:
        self._pointer = pointer
        self._close = close

    def close(self) -> None:
        """Give the object back. What was made from it goes on living."""
        pointer, self._pointer = self._pointer, None
        if pointer is not None:
            self._close(pointer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _handle(self) -> Any:
        if self._pointer is None:
            raise EngineError(f"{type(self).__name__}: used after close")
        return self._pointer
