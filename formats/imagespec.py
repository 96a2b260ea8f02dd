# SPDX-License-Identifier: Apache-2.0
"""config.v1.json: the image description that overlaybd's snapshotter writes.

Values only: paths are kept as written and nothing is opened. Keys that mean nothing to
a reader are ignored; a known key of the wrong JSON type is a FormatError. docs/formats/config.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

from formats.errors import FormatError

CONFIG_SIZE_MAX = 4 << 20  # 255 lowers of three 4 KiB paths each fit
_LOCAL_NAMES = ("overlaybd.commit", ".commit", "overlaybd.sealed")
_SIZE_LIMIT = 1 << 63

_T = TypeVar("_T", str, int, bool)


@dataclass(frozen=True)
class Lower:
    """One read-only layer. Empty strings: not given. The last three describe TurboOCI's original layer."""

    file: str = ""
    dir: str = ""
    digest: str = ""
    size: int = 0
    target_file: str = ""
    target_digest: str = ""
    gzip_index: str = ""

    def candidates(self) -> tuple[str, ...]:
        """Local paths to try in order; the first that exists is the layer, and if none does, the registry has it."""
        in_dir = tuple(f"{self.dir}/{name}" for name in _LOCAL_NAMES) if self.dir else ()
        return (self.file, *in_dir) if self.file else in_dir


@dataclass(frozen=True)
class Upper:
    """The writable layer on top. The last two are set in TurboOCI conversions only."""

    data: str
    index: str
    target: str = ""
    gzip_index: str = ""


@dataclass(frozen=True)
class ImageConfig:
    """A parsed config. `lowers` are in the file's order, bottom first."""

    lowers: tuple[Lower, ...]
    repo_blob_url: str = ""
    upper: Upper | None = None
    result_file: str = ""
    acceleration_layer: bool = False
    record_trace_path: str = ""

    @property
    def block_lowers(self) -> tuple[Lower, ...]:
        """The lowers that hold blocks: all but the trace that an acceleration layer carries."""
        return self.lowers[:-1] if self.acceleration_layer else self.lowers

    def blob_url(self, lower: Lower) -> str:
        """Where the registry has a lower. FormatError if the config does not say."""
        if not self.repo_blob_url or not lower.digest:
            raise FormatError("a lower has no local file, and no repoBlobUrl or digest")
        return f"{self.repo_blob_url.rstrip('/')}/{lower.digest}"

    def build(self) -> bytes:
        """Compact JSON; what is not given is left out."""
        document: dict[str, Any] = {"repoBlobUrl": self.repo_blob_url}
        document["lowers"] = [_given(lower, _LOWER_KEYS) for lower in self.lowers]
        if self.upper:
            document["upper"] = _given(self.upper, _UPPER_KEYS)
        return json.dumps(document | _given(self, _IMAGE_KEYS), separators=(",", ":")).encode()


_LOWER_KEYS = {
    "file": "file",
    "dir": "dir",
    "digest": "digest",
    "size": "size",
    "target_file": "targetFile",
    "target_digest": "targetDigest",
    "gzip_index": "gzipIndex",
}
_UPPER_KEYS = {"data": "data", "index": "index", "target": "target", "gzip_index": "gzipIndex"}
_IMAGE_KEYS = {
    "result_file": "resultFile",
    "acceleration_layer": "accelerationLayer",
    "record_trace_path": "recordTracePath",
}


def parse(document: bytes) -> ImageConfig:
    """FormatError if it is not JSON, lacks `lowers`, or has a value of the wrong type."""
    if len(document) > CONFIG_SIZE_MAX:
        raise FormatError(f"config of {len(document)} bytes, at most {CONFIG_SIZE_MAX}")
    try:
        root = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"config is not JSON: {error}") from error
    top = _object(root, "config")
    lowers = top.get("lowers")
    if not isinstance(lowers, list):
        raise FormatError("lowers: a list is required")
    config = ImageConfig(
        lowers=tuple(_lower(lower, f"lowers[{place}]") for place, lower in enumerate(lowers)),
        repo_blob_url=_get(top, "repoBlobUrl", ""),
        upper=_upper(top),
        result_file=_get(top, "resultFile", ""),
        acceleration_layer=_get(top, "accelerationLayer", False),
        record_trace_path=_get(top, "recordTracePath", ""),
    )
    _object(top.get("download", {}), "download")
    if config.acceleration_layer and (config.record_trace_path or not lowers):
        raise FormatError("accelerationLayer: needs a last lower, and excludes recordTracePath")
    return config


def _lower(value: object, place: str) -> Lower:
    lower = _object(value, place)
    return Lower(
        file=_get(lower, "file", "", place),
        dir=_get(lower, "dir", "", place),
        digest=_get(lower, "digest", "", place),
        size=_get(lower, "size", 0, place),
        target_file=_get(lower, "targetFile", "", place),
        target_digest=_get(lower, "targetDigest", "", place),
        gzip_index=_get(lower, "gzipIndex", "", place),
    )


def _upper(top: dict[str, Any]) -> Upper | None:
    """None unless both files are named: then the device is read-only."""
    place = "upper"
    upper = _object(top.get(place, {}), place)
    fields = Upper(
        data=_get(upper, "data", "", place),
        index=_get(upper, "index", "", place),
        target=_get(upper, "target", "", place),
        gzip_index=_get(upper, "gzipIndex", "", place),
    )
    return fields if fields.data and fields.index else None


def _object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{place}: not an object")
    return value


def _get(values: dict[str, Any], key: str, default: _T, place: str = "") -> _T:
    value = values.get(key, default)
    name = f"{place}.{key}" if place else key
    if type(value) is not type(default):
        raise FormatError(f"{name}: not {_TYPE_NAMES[type(default)]}")
    if isinstance(value, str) and not _is_path_text(value):
        raise FormatError(f"{name}: holds what no path can")
    if isinstance(value, int) and not 0 <= value < _SIZE_LIMIT:
        raise FormatError(f"{name}: {value} is no size")
    return value


_TYPE_NAMES = {str: "a string", int: "an integer", bool: "a boolean"}


def _is_path_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False


def _given(values: object, keys: dict[str, str]) -> dict[str, Any]:
    return {key: getattr(values, field) for field, key in keys.items() if getattr(values, field)}
