# SPDX-License-Identifier: Apache-2.0
"""The ociblk command line: finds the command, runs it, and turns errors into exit codes.

main() is the only place that does the last: a BlockdevError is its one line on stderr
and its exit code, and so is an OSError that names a file; anything else is a defect (8),
shown as a traceback only when OCIBLK_DEBUG=1. stdout carries results and nothing else.

A command is a module of this package with add_arguments(parser) and run(args).
Only the module of the command at hand is imported, to keep --help quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from blockdev.cli import stdio
from blockdev.cli.parser import Command, Parser
from blockdev.config import DEFAULT_POLICY, default_root, parse_jobs, parse_path, parse_policy, parse_size
from blockdev.errors import BlockdevError, EngineError, from_os

# name: module, one line of help
_COMMANDS = {
    "serve": ("serve", "serve an image over NBD, in the foreground"),
    "mount": ("mount", "mount the file system of an image"),
    "umount": ("umount", "unmount what mount mounted"),
    "pull": ("pull", "fetch an image before it is used"),
    "ps": ("ps", "what is mounted and exported"),
    "inspect": ("inspect", "what an image or layer file is made of"),
    "verify": ("verify", "read everything and check every checksum"),
    "export": ("export", "write an image as one raw disk"),
    "ls": ("ls", "list what is in an image, without a mount"),
    "cat": ("cat", "write files of an image to stdout, without a mount"),
    "fsck": ("fsck", "check what is in the cache, and repair it"),
    "cache": ("cache", "look at the cache, or empty it"),
    "daemon": ("daemon", "own the root in the foreground, or stop its owner"),
    "create": ("create", "make the files of an empty writable layer"),
    "commit": ("commit", "make a layer file of a writable layer"),
    "seal": ("seal", "make a writable layer read-only where it is"),
    "resize": ("resize", "change the size of a writable layer's disk"),
    "compact": ("compact", "take the garbage out of a writable layer"),
    "merge": ("merge", "make one layer file of all layers of an image"),
    "import": ("import_", "make a layer file of a raw disk"),
    "push": ("push", "push layer files to a registry as an image"),
    "convert": ("convert", "convert an ordinary image to a block image"),
    "version": ("version", "print the version"),
}
_NULL_UUID = "00000000-0000-0000-0000-000000000000"
_LEAVING = (signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BROKEN_PIPE = 141  # 128 + SIGPIPE: our reader left, which is its right


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code; errors are printed, never raised."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stdio.settle()
    for number in _LEAVING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _leave)  # in order: what was half written is removed
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BlockdevError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        return _BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            return _fail(_unexpected(error))
        return _fail(from_os("using a file failed", error))
    except Exception as error:  # noqa: BLE001 - here an error becomes an exit code
        return _fail(_unexpected(error))
    finally:
        stdio.clear_progress()
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        args = _parse(arguments)
        _print_warnings()
        args.run(args)
    except SystemExit as leaving:  # --help, or a signal
        return int(leaving.code or 0)
    return 0


def _print_warnings() -> None:
    """What this process would log, a command says as any other notice: it has no log."""
    import logging

    class Notices(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stdio.say(record.getMessage())

    logging.lastResort = Notices(logging.WARNING)


def _leave(number: int, _frame: object) -> NoReturn:
    """Once: timeout(1) sends it twice, and what is undone at the first would be cut short by the second."""
    for other in _LEAVING:
        if signal.getsignal(other) is _leave:
            signal.signal(other, lambda *_: None)
    sys.exit(128 + number)


def mount_helper() -> int:
    """mount.ociblk IMAGE DIR [-sfnv] [-o OPTIONS], as mount(8) and fstab call it for type ociblk.

    An option ociblk.NAME[=VALUE] is our --NAME, and --upper is two: upper-data and upper-index. "rw", which mount(8)
    adds by itself, is dropped.
    """
    known = {"-s": 0, "-f": 0, "-n": 0, "-v": 0, "-N": 1, "-t": 1}  # mount(8)'s own, and how many words follow
    words, kept = iter(sys.argv[1:]), ["mount"]
    for word in words:
        if word == "-f":  # --fake: all but the mounting
            return 0
        if word == "-o":
            options = [option for option in next(words, "").split(",") if option != "rw"]
            ours = [option.removeprefix("ociblk.") for option in options if option.startswith("ociblk.")]
            rest = ",".join(option for option in options if not option.startswith("ociblk."))
            upper = sorted(option for option in ours if option.startswith("upper-"))  # data, then index
            if upper:
                kept += ["--upper", *(option.partition("=")[2] for option in upper)]
            kept += [f"--{option}" for option in ours if not option.startswith("upper-")] + ["-o", rest]
        elif word not in known:
            kept.append(word)
        elif known[word]:
            next(words, None)
    return main(kept)


def _fail(error: BlockdevError) -> int:
    with contextlib.suppress(OSError, BlockdevError):  # the first error counts
        sys.stdout.flush()
    if os.environ.get("OCIBLK_DEBUG") == "1":
        stdio.tell(traceback.format_exc())
    stdio.say(str(error))
    return error.exit_code


def _unexpected(error: Exception) -> EngineError:
    return EngineError(f"unexpected failure: {type(error).__name__}: {error}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    common = _common_options()
    parser = Parser(prog="ociblk", description="Container images as block devices.", parents=[common])
    if arguments[:1] == ["--version"]:  # what people try first
        arguments = ["version", *arguments[1:]]
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command", parser_class=Command)
    for name, (module_name, summary) in _COMMANDS.items():
        text = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=text, parents=[common])
        if name in arguments:
            module = importlib.import_module(f"blockdev.cli.{module_name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    args.root = getattr(args, "root", None) or default_root(os.environ, os.geteuid())
    args.json = getattr(args, "json", False)
    args.debug = getattr(args, "debug", False) or os.environ.get("OCIBLK_DEBUG") == "1"
    if args.debug:
        os.environ["OCIBLK_DEBUG"] = "1"  # an owner that we start inherits it
    return args


def _common_options() -> Command:
    """Options that may stand before or after the command; absent ones set nothing."""
    common = Command(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--root", metavar="DIR", type=parse_path, help="for cache and owner (default: $OCIBLK_ROOT)")
    common.add_argument("--json", action="store_true", help="print results as JSON")
    common.add_argument("--debug", action="store_true", help="log more; show tracebacks")
    return common


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """How to reach a registry, and what to do when it fails: for commands that take an IMAGE."""
    add_registry_options(parser)
    parser.add_argument(
        "--on-error",
        metavar="POLICY",
        type=parse_policy,
        default=parse_policy(DEFAULT_POLICY),
        help="reads while the registry fails: eio:D, retry:D or hang (default %(default)s)",
    )


def add_upper_options(parser: argparse.ArgumentParser) -> None:
    """IMAGE, and a writable layer over it: for commands that can serve one."""
    parser.add_argument("image", metavar="IMAGE", help="with --upper also: scratch, for no image at all")
    parser.add_argument("--upper", metavar=("DATA", "INDEX"), nargs=2, default=(), help="writable layer to lay over it")
    parser.add_argument("--rw", action="store_true", help="writes go to the writable layer, that of --upper or its own")


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """How the layer that a command makes of others is stored, and what its head says."""
    parser.add_argument("-o", "--output", metavar="LAYER", type=parse_path, required=True)
    parser.add_argument("-m", "--message", metavar="TEXT", default="", help="kept in the head, at most 256 bytes")
    parser.add_argument("--codec", choices=["none", "lz4", "zstd"], default="lz4", help="(default %(default)s)")
    parser.add_argument("--block-size", metavar="N", type=parse_size, default=4096, help="bytes (default %(default)s)")
    parser.add_argument("--jobs", metavar="N", type=parse_jobs, help="threads that compress (default: one a core)")
    parser.add_argument("--tar", action="store_true", help="wrap the layer in a tar, as registries have it")
    parser.add_argument("--uuid", metavar="U", default=_NULL_UUID, help="of the layer (default: all zeros)")
    parser.add_argument("--parent-uuid", metavar="P", help="of the layer below it (default: as it was)")


def add_registry_options(parser: argparse.ArgumentParser) -> None:
    """How to reach a registry."""
    parser.add_argument("--plain-http", action="store_true", help="speak HTTP to the registry")
    parser.add_argument("--ca", metavar="FILE", type=parse_path, help="trust the certificates in FILE too")
