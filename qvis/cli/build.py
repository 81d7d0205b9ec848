# SPDX-License-Identifier: GPL-2.0-or-later
"""``qvis build``"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..build import (
    LinuxBuild,
    QemuBuild,
    build_host_linux,
    build_initramfs,
    build_linux,
    build_qemu,
)
from ._output import print_json

PARTS: dict[str, Callable[[bool], QemuBuild | LinuxBuild | Path]] = {
    "qemu": lambda patched: build_qemu(patched=patched),
    "linux": lambda patched: build_linux(patched=patched),
    "initramfs": lambda _: build_initramfs(),
    "host": lambda patched: build_host_linux(patched=patched),
}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "part", nargs="?", choices=PARTS, help="only this one; host is the inner host's Linux"
    )
    parser.add_argument("--sources", metavar="DIR", type=Path,
                        help="look for source tarballs here first (QVIS_SOURCES)")  # fmt: skip
    parser.add_argument("--unpatched", action="store_true",
                        help="as released, without our series, to compare with")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything known, in JSON")


def run(args: argparse.Namespace) -> int:
    if args.sources:
        os.environ["QVIS_SOURCES"] = str(args.sources)
    made = {name: PARTS[name](not args.unpatched) for name in ([args.part] if args.part else PARTS)}
    facts = {name: _facts(result) for name, result in made.items()}
    if args.json:
        print_json(facts)
    else:
        for name, fact in facts.items():
            words = " ".join(fact[word] for word in ("version", "key") if word in fact)
            print(f"{name}: {words} {fact['path']}".replace("  ", " "))
    return 0


def _facts(result: QemuBuild | LinuxBuild | Path) -> dict[str, str]:
    """Names and paths as text; ``path`` is the one that a person wants."""
    if isinstance(result, Path):
        return {"path": str(result)}
    path = result.binary if isinstance(result, QemuBuild) else result.image
    return {"path": str(path)} | {name: str(value) for name, value in asdict(result).items()}
