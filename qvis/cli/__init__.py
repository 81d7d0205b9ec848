# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: one module a verb, each only parses, calls the API and prints.

Exit status: 0 done; 1 a fault in qvis itself; 2 bad usage; 121 build, 122 host, 123 boot,
124 machine lost, 125 guest (see :mod:`qvis.errors`); 130 interrupted. ``qvis exec`` and
``qvis ssh`` pass on the status of what they ran.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn, Protocol

from ..errors import InfraError, QvisError, UsageError

__all__ = ["main"]

VERBS = {
    "up": "build what is missing, boot a guest and leave it running",
    "ls": "list the machines",
    "down": "end machines",
    "ssh": "log in to a machine",
    "exec": "run a command in a machine and pass its exit status on",
    "console": "connect to a machine's serial console",
    "logs": "show what a machine's console and its process printed",
    "qmp": "send a QMP command, or follow QMP events",
    "irq": "show and move a guest's interrupts",
    "load": "make a chosen virtio-blk queue interrupt",
    "trace": "record what a guest does to devices, and look at what was recorded",
    "compare": "measure what operations cost on each transport",
    "sweep": "what interrupts cost over a grid of emulated machines",
    "gate": "hold a guest's touches of devices against a file of exact counts",
    "calibrate": "fit the emulated machine's costs to traces of a real one",
    "build": "build QEMU, Linux and the initramfs",
    "patches": "apply, check, refresh or list the patch series",
    "footprint": "count what PCI and MMIO cost: code, memory, time, attack surface",
    "verify": "check the VIS protocol through all interleavings",
    "doctor": "check everything that a run needs",
}


class Verb(Protocol):
    """What a module of this package provides."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit status."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, like every other error."""
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(arguments: list[str] | None = None) -> int:
    """Run one verb. Errors become one line on stderr and a documented exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupted)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # which nohup sets
        signal.signal(signal.SIGHUP, _interrupted)
    try:
        return _dispatch(words)
    except QvisError as problem:
        report(problem)
        return problem.exit_code
    except KeyboardInterrupt:
        print("qvis: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough; keep the interpreter's own flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, subprocess.SubprocessError) as problem:
        report(InfraError(str(problem)))
        return InfraError.exit_code


def report(problem: QvisError) -> None:
    """Print an error: one line, then the evidence that came with it."""
    print(f"qvis: {problem}", file=sys.stderr)
    for line in problem.tail:
        print(f"  | {line}", file=sys.stderr)
    if problem.command:
        print(f"  command: {' '.join(problem.command)}", file=sys.stderr)
    if problem.log:
        print(f"  logs: {problem.log}", file=sys.stderr)


def _dispatch(words: list[str]) -> int:
    from .. import __doc__ as summary

    listing = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    parser = _Parser(
        prog="qvis",
        description=(summary or "").splitlines()[0],
        epilog=f"verbs:\n{listing}\n\n`qvis VERB --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", metavar="VERB", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not words or words[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    if words[0] not in VERBS:
        parser.error(f"unknown verb {words[0]!r}")
    verb, rest = words[0], words[1:]
    # Only the verb's own module is imported: `qvis exec` has 200 ms for all it does.
    module: Verb = importlib.import_module(f"{__name__}.{verb}")
    own = _Parser(prog=f"qvis {verb}", description=VERBS[verb])
    module.configure(own)
    # A verb that has an ``after_dashes`` takes options on both sides of its own words,
    # which argparse can tell from a command's only without the command.
    if own.get_default("after_dashes") is not None and "--" in rest:
        at = rest.index("--")
        own.set_defaults(after_dashes=rest[at + 1 :])
        rest = rest[:at]
    status = module.run(own.parse_args(rest))
    sys.stdout.flush()  # here, where a full disk or a reader that left is still ours to report
    return status


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
