# SPDX-License-Identifier: Apache-2.0
"""Which lines of the parsers the kept inputs of a fuzz target reach.

C: clang's source coverage of replay.c over the corpus. Python: coverage.py over the same
call. What a file has besides its parser (a builder, a writer) is left out by the names
of its functions, so that nothing but untrusted input counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES_MIN = 85  # per cent of a parser's lines, below which an input is missing

# Target -> the parsers it judges -> what of them is left out, as no input reaches it: what writes or
# compresses, what waits for other threads, what gives memory back when a second has passed. A name
# that ends in a dot is a class.
PARSERS: dict[str, dict[str, tuple[str, ...]]] = {
    "index": {"native/index.c": ()},
    "upper": {"native/upper.c": ()},
    "zfile": {
        "native/zfile.c": (),
        "native/codec.c": (
            *("ob_zfile_compress", "ob_zfile_bound", "encode", "block_size_good"),
            *("codec_scratch", "scratch_free"),
        ),
    },
    "presence": {
        "native/cache.c": (
            *("ob_blob_open_local", "blob_ref", "blob_size", "blob_engine"),
            *("ob_blob_read", "blob_read", "blob_attempt", "blob_miss"),
        )
    },
    "nbd": {"native/nbd.c": (), "native/nbdwire.h": ()},
    "fuse": {"native/fuse.c": ("ob_fuse_get_stat", "fuse_gone", "fuse_trim", "slot_trim"), "native/fuse_serve.c": ()},
    "http": {"native/http.c": ("connections_close",)},
    "layer": {
        "formats/tar.py": ("wrap_head", "wrap_tail", "member_head", "_size_record", "_padded_octal", "_header_block"),
        "formats/zfile.py": ("Head.build", "provisional_head", "final_heads", "build", "_encode"),
        "formats/lsmt.py": (
            *("CommitWriter.", "commit", "_joinable", "pack_segment", "pack", "Head.build"),
            *("open_log", "read_log"),  # of the target log
        ),
        "formats/superblock.py": (),
    },
    "log": {"formats/pair.py": ("PairWriter.",)},
    "head": {"formats/presence.py": ()},
    "table": {"formats/digests.py": ("TableWriter.", "find")},
    "archive": {
        "formats/archive.py": (),
        "formats/sparse.py": (),
        "formats/tarheader.py": ("rounded",),
        "blockdev/build/plain.py": (),
        "blockdev/build/tree.py": (),
    },
    "document": {"formats/oci.py": (), "formats/layout.py": (), "formats/imagespec.py": ()},
    "handshake": {"formats/nbdwire.py": ()},
    "erofs": {
        "formats/erofs_reader.py": (),
        "formats/erofs_disk.py": (
            *("Superblock.build", "check_node", "check_name", "build_inode", "encoded_device"),
            *("directory_extent", "directory_blocks", "_directory_block", "build_xattr", "xattr_area", "xattr_count"),
        ),
    },
}

Lines = dict[str, tuple[int, int]]


def covered(target: str, kept: Path, native: Path | None) -> Lines:
    """Parser -> lines reached, lines there are. `native` is the coverage build of a C target."""
    return _native(target, kept, native) if native else _python(target, kept)


def _native(target: str, kept: Path, build: Path) -> Lines:
    program, raw = build / f"fuzz_{target}", build / f"{target}.profraw"
    merged = raw.with_suffix(".profdata")
    subprocess.run([program, kept], env=os.environ | {"LLVM_PROFILE_FILE": str(raw)}, check=True, capture_output=True)
    subprocess.run(["llvm-profdata", "merge", "-o", merged, raw], check=True)
    out: Lines = {}
    for parser, excluded in PARSERS[target].items():
        report = ["llvm-cov", "report", "-show-functions", f"-instr-profile={merged}", program, ROOT / parser]
        table = subprocess.run(report, check=True, capture_output=True, text=True).stdout
        lines: Lines = {}  # a function of a header is there once for each file that includes it
        for row in (line.split() for line in table.splitlines()):
            # Name, regions, missed, share, lines, missed, share, ...
            if len(row) < 7 or not row[1].isdigit() or row[0] == "TOTAL":
                continue
            name, total = row[0].rpartition(":")[2], int(row[4])
            if name not in excluded:
                lines[name] = max(lines.get(name, (0, 0)), (total - int(row[5]), total))
        out[parser] = (sum(reached for reached, _ in lines.values()), sum(total for _, total in lines.values()))
    return out


def _python(target: str, kept: Path) -> Lines:
    data = ROOT / "build" / "fuzz" / f"{target}.coverage"
    measure = [sys.executable, "-m", "coverage"]
    files = ",".join(PARSERS[target])
    run = ["run", f"--data-file={data}", f"--include={files}", "-m", "tests.fuzz.parsers", target, str(kept)]
    subprocess.run([*measure, *run], cwd=ROOT, check=True, capture_output=True)
    report = ["json", f"--data-file={data}", "-o", "-", "--quiet"]
    printed = subprocess.run([*measure, *report], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files_of = json.loads(printed)["files"]
    return {parser: _reached(files_of[parser], set(excluded)) for parser, excluded in PARSERS[target].items()}


def _reached(report: dict[str, object], excluded: set[str]) -> tuple[int, int]:
    functions: dict[str, dict[str, list[int]]] = report["functions"]  # type: ignore[assignment]
    counted = [
        lines
        for name, lines in functions.items()
        if name not in excluded and f"{name.partition('.')[0]}." not in excluded
    ]
    reached = sum(len(lines["executed_lines"]) for lines in counted)
    return reached, reached + sum(len(lines["missing_lines"]) for lines in counted)
