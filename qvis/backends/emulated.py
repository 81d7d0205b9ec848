# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine in pure Python: needs nothing of the host, and models what it may not have."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..emulated.config import Config
from ..emulated.costs import Costs
from ..emulated.identity import model_identity
from ..emulated.machine import check
from ..errors import UsageError
from ..folder import AUTHORIZED_KEYS, HOST_KEY
from ..spec import MachineSpec
from ..x86 import Platform
from . import Job, Launch, Login, Probe

__all__ = ["Emulated"]

QEMU, LINUX = "10.2.2", "6.12.107"  # what the model is held against


class Emulated:
    """Discrete events instead of a processor; its times are modelled cycles."""

    name = "emulated"
    slowdown = 1.0

    def probe(self) -> Probe:
        return Probe(True, "needs nothing of the host; all its times are modelled")

    def check(self, spec: MachineSpec) -> None:
        if spec.icount:
            raise UsageError(
                "the emulated machine has no instructions to count, and is the same each time "
                "without: --icount needs --backend tcg"
            )
        check(Config.of(spec))
        if spec.costs is not None:
            Costs.load(Path(spec.costs))

    def furnish(self, folder: Path, purpose: Login | Job) -> None:
        if isinstance(purpose, Job):
            raise UsageError("the emulated machine runs no script by itself: use --backend tcg")
        for name, content in ((HOST_KEY, purpose.host_key), (AUTHORIZED_KEYS, purpose.authorized)):
            (folder / name).touch(mode=0o600)
            (folder / name).write_bytes(content)

    def launch(
        self,
        spec: MachineSpec,
        folder: Path,
        *,
        incoming: bool = False,
        options: Sequence[str] = (),
    ) -> Launch:
        if incoming:
            raise UsageError("an emulated machine cannot be migrated: its guest is no memory image")
        platform = spec.platform or Platform()
        costs = Costs.load(Path(spec.costs) if spec.costs else None)
        model = f"modelled, {model_identity()}"
        provenance = {
            "backend": self.name,
            "accelerator": f"{platform.description}; costs {costs.identity}",
            "qemu": QEMU,
            "qemu_series": model,
            "linux": LINUX,
            "linux_series": model,
        }
        command = [sys.executable, "-m", "qvis.emulated.serve", json.dumps(spec.to_json())]
        return Launch(command, "the emulated machine", provenance, "emulated", None)
