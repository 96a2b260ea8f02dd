# SPDX-License-Identifier: Apache-2.0
"""ociblk version."""

from __future__ import annotations

import argparse
import json
from importlib import metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(args: argparse.Namespace) -> None:
    """Print the version of the installed package."""
    version = metadata.version("ociblk")
    print(json.dumps({"v": 1, "version": version}) if args.json else f"ociblk {version}")
