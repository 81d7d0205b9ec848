# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis load``"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ._output import print_json


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("queue", metavar="QUEUE", type=int, help="a virtio-blk request queue")
    parser.add_argument("--count", type=int, default=1000, help="requests (default: %(default)s)")
    parser.add_argument("--cpu", type=int, help="submit from here (default: the queue's first CPU)")


def run(args: argparse.Namespace) -> int:
    from ..guest import load
    from ..machine.machine import Machine

    with Machine.attach(args.name) as machine:
        print_json(asdict(load.run(machine.ssh, args.queue, args.count, cpu=args.cpu)))
    return 0
