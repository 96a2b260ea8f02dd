# SPDX-License-Identifier: Apache-2.0
"""How the layers that commit and merge make are to be stored: options, and what they stand for."""

from __future__ import annotations

import argparse

from blockdev.build.commit import CommitOptions
from blockdev.build.disk import LayerOptions, all_cores
from blockdev.build.layerfile import Wrapping


def commit_options(args: argparse.Namespace) -> CommitOptions:
    """What add_layer_options() took."""
    jobs = all_cores() if args.jobs is None else args.jobs
    layer = LayerOptions(Wrapping(args.codec, args.block_size, args.tar), args.uuid, jobs=jobs)
    return CommitOptions(layer, args.parent_uuid, args.message)
