# SPDX-License-Identifier: Apache-2.0
"""Rows on convert: an ordinary image of real files, beside unpacking it and mkfs.erofs.

The image has the bench's files in gzip'd layers, as builders push them. The peer unpacks all
layers into one tree and makes one file system of that, with its own lz4. Sizes are judged layer by
layer, as a stack of layers has to be stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from formats import layout, oci
from tools.bench_content import MIB, files
from tools.bench_ground import COMMAND, TINY, Ground
from tools.bench_measure import Bar, Judge, Row, Sample, contest
from tools.bench_programs import BUILD
from tools.bench_servers import Ociblk, cpu_seconds
from tools.bench_warm import CPU_PER_BYTES, GIB

LAYERS = 4
TAG = "1"
OURS, PEER = "ociblk convert", "gzip -dc | tar x, mkfs.erofs -zlz4"
RSS_MAX = 256  # MiB, whatever the image


@dataclass(frozen=True)
class Image:
    """An ordinary image, as a layout."""

    folder: Path
    plain: int  # bytes of its archives
    layers: list[Path]

    @property
    def name(self) -> str:
        return f"oci:{self.folder}:{TAG}"


def make_image(ground: Ground) -> Image:
    """Kept for later benches, as the disk is."""
    size = ground.settings.files
    home = ground.folder / "image" if ground.settings == TINY else BUILD / f"image-{size // MIB}"
    if not home.exists():
        new = home.with_name(f"{home.name}.{os.getpid()}")
        _write_image(new, size)
        new.rename(home)
    made = json.loads((home / "made").read_text())
    return Image(home, made["plain"], [home / layout.blob_path(digest) for digest in made["layers"]])


def _write_image(folder: Path, size: int) -> None:
    (folder / "blobs" / "sha256").mkdir(parents=True)
    found = files()
    plain, layers, diff_ids = 0, [], []
    for _ in range(LAYERS):
        tar = folder / "layer.tar"
        with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
            while archive.offset < size // LAYERS and (path := next(found, None)):
                archive.add(path, recursive=False)
        plain += tar.stat().st_size
        diff_ids.append(_digest(tar))
        subprocess.run(["gzip", "-n", tar], check=True)
        packed = tar.with_suffix(".tar.gz")
        layers.append(oci.Descriptor(f"{oci.OCI_LAYER}+gzip", _digest(packed), packed.stat().st_size))
        packed.rename(folder / layout.blob_path(layers[-1].digest))
    config = _put(folder, oci.OCI_CONFIG, oci.build_config(oci.Platform.of_machine(os.uname().machine), diff_ids))
    manifest = _put(folder, oci.OCI_MANIFEST, oci.Manifest(config, tuple(layers)).build())
    named = oci.Descriptor(manifest.media_type, manifest.digest, manifest.size, {layout.REF_NAME: TAG})
    (folder / layout.INDEX).write_bytes(oci.Index((named,)).build())
    (folder / layout.MARKER).write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    (folder / "made").write_text(json.dumps({"plain": plain, "layers": [layer.digest for layer in layers]}))


def _put(folder: Path, media_type: str, body: bytes) -> oci.Descriptor:
    digest = oci.digest_of(body)
    (folder / layout.blob_path(digest)).write_bytes(body)
    return oci.Descriptor(media_type, digest, len(body))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


# ---- what is measured -----------------------------------------------------------------------


@dataclass
class _Run:
    seconds: float
    cpu: float
    peak: float  # MiB of resident memory, of the largest process
    sizes: list[int]  # of the layers


def _timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[_Run, str]:
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return _Run(time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, []), said


def _ours(ground: Ground, image: Image, *options: str) -> _Run:
    """From an empty root, with what its owner does to keep the layers."""
    target = ground.folder / "converted"
    root = Ociblk(COMMAND, ground.folder / "converting")
    try:
        command = [COMMAND, "convert", image.name, f"oci:{target}:{TAG}", "--json", *options]
        run, said = _timed(command, root.environment)
        run.cpu += cpu_seconds(root.owner())
        run.sizes = [layer["size"] for layer in json.loads(said)["images"][0]["layers"]]
        return run
    finally:
        root.wipe()
        shutil.rmtree(target, ignore_errors=True)


def _unpacked(ground: Ground, layers: list[Path]) -> _Run:
    """All layers in one tree, and a file system of it."""
    tree, made = ground.folder / "tree", ground.folder / "tree.erofs"
    tree.mkdir()
    unpack = "; ".join(f"gzip -dc <'{layer}' | tar x -C '{tree}'" for layer in layers)
    script = f"set -eo pipefail; {unpack}; mkfs.erofs --quiet -zlz4 '{made}' '{tree}'"
    try:
        run, _ = _timed(["bash", "-c", script])
        run.sizes = [made.stat().st_size]
        return run
    finally:
        shutil.rmtree(tree)
        made.unlink(missing_ok=True)


def convert(ground: Ground) -> Iterator[Row]:
    image = make_image(ground)
    runs: dict[str, list[_Run]] = {OURS: [], PEER: []}

    def turn(name: str) -> Sample:
        run = _ours(ground, image) if name == OURS else _unpacked(ground, image.layers)
        runs[name].append(run)
        return Sample(image.plain / run.seconds / 1e6, run.cpu * GIB / image.plain)

    judges: tuple[Judge, ...] = ("clock", "cpu")
    yield Row(
        f"convert of {image.plain // MIB} MiB in {LAYERS} layers",
        "MB/s",
        CPU_PER_BYTES,
        contest(ground.settings.rounds, {name: lambda name=name: turn(name) for name in runs}),  # type: ignore[misc]
        [Bar(OURS, PEER, at_least=1.0, by=judge) for judge in judges],
        ["ours with checking what it reads, digests, the layout it writes, and the owner that keeps the layers"],
    )
    yield Row(
        f"convert of {image.plain // MIB} MiB: peak of resident memory",
        "MiB",
        samples={OURS: [Sample(run.peak) for run in runs[OURS]]},
        bars=[Bar(OURS, at_most=RSS_MAX)],
    )
    alone = sum(_unpacked(ground, [layer]).sizes[0] for layer in image.layers)
    yield Row(
        f"layers of {image.plain // MIB} MiB",
        "MiB",
        samples={
            OURS: [Sample(sum(runs[OURS][0].sizes) / MIB)],
            "mkfs.erofs -zlz4 of each layer's tree": [Sample(alone / MIB)],
        },
        bars=[Bar(OURS, "mkfs.erofs -zlz4 of each layer's tree", at_most=1.05)],
        remarks=["whole files: ours have the metadata of the whole tree in each layer, and the digests"],
    )
