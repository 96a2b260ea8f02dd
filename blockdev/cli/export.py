# SPDX-License-Identifier: Apache-2.0
"""ociblk export: an image as one raw disk, in a file or on stdout.

A regular file appears (or is replaced) only once all of it has been written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockdev.cli import add_image_options, stdio, text
from blockdev.cli.ask import ask_owner
from blockdev.config import parse_path
from blockdev.errors import UsageError, from_os
from blockdev.origin import Origin, locate
from blockdev.replacement import check_apart, replacing

if TYPE_CHECKING:
    from blockdev.build.sink import Sink

STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=f"where to; {STDOUT} is stdout")
    add_image_options(parser)


def run(args: argparse.Namespace) -> None:
    """Write the disk; of a local image without an owner."""
    with locate(args.image) as origin, _output(args.output, origin) as sink:
        show = text.progress("written")
        if origin.local:
            size = _write(origin, sink, show)
        else:
            extra = {"output": sink.name, "made": sink.made}
            written = ask_owner(args, "export", origin, [sink.fd], extra=extra, show=show)
            if written["unread"]:
                raise BrokenPipeError
            size = written["size"]
        sink.finish()
    if args.json and args.output != STDOUT:
        text.print_json({"image": args.image, "output": args.output, "size": size})


def _write(origin: Origin, sink: Sink, show: text.Show) -> int:
    from blockdev.build.export import export_image
    from blockdev.engine import Engine
    from blockdev.stack import open_local

    with Engine() as engine, open_local(engine, origin) as stack:
        export_image(stack.image, sink, show)
        return stack.image.size


@contextlib.contextmanager
def _output(name: str, origin: Origin) -> Iterator[Sink]:
    """What -o names; what is written to a regular file counts only if the block ends well."""
    from blockdev.build.sink import Sink

    if name == STDOUT:
        stdout = stdio.content_stream("stdout", "exporting")
        check_apart(stdout, origin.files)
        yield Sink(stdout, "stdout", made=False)
        return
    path = parse_path(name)
    check_apart(path, origin.files)
    if path.is_dir():
        raise UsageError(f"exporting failed: {name}: it is a directory")
    try:
        made = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        made = True
    except OSError as error:
        raise from_os("exporting failed", error, name) from None
    with replacing(path) if made else _device(name) as fd:
        yield Sink(fd, name, made)


@contextlib.contextmanager
def _device(name: str) -> Iterator[int]:
    try:
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os("exporting failed", error, name) from None
    try:
        yield fd
    finally:
        os.close(fd)
