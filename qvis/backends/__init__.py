# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs a machine. Each backend says what it can do and how to launch.

Backends are found by the entry point group ``qvis.backends``, so that another
package can bring one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from ..errors import InfraError, UsageError
from ..spec import MachineSpec

__all__ = ["Backend", "Choice", "Job", "Launch", "Login", "Probe", "available", "choose"]

GROUP = "qvis.backends"
PREFERENCE = ("kvm", "tcg", "emulated")  # the order in which "auto" tries them


@dataclass(frozen=True)
class Probe:
    """Whether a backend works here, and the reason either way."""

    works: bool
    reason: str


@dataclass(frozen=True)
class Launch:
    """How to start one machine: the command line and where its numbers come from."""

    command: list[str]
    program: str  # what runs then, in messages: "QEMU"
    provenance: dict[str, Any]
    reader: str  # of its traces: a key of qvis.trace.sources.SOURCES
    vmlinux: Path | None  # the guest's kernel with its symbols; None: no code of a kernel runs
    nested: bool = False
    """Whether the guest is in an inner host: ``program`` runs that, the inner host's console is
    on ``host-console.sock`` and in ``host-console.log``, and ``host-qmp.sock`` is ``program``'s
    QMP, while the other sockets belong to the QEMU in the inner host."""


@dataclass(frozen=True)
class Login:
    """What a guest has to know to be logged in to."""

    hostname: str
    host_key: bytes  # private, as OpenSSH writes it
    authorized: bytes  # the key of who may log in, as in authorized_keys


@dataclass(frozen=True)
class Job:
    """What a guest does that nobody logs in to: shell text."""

    run: str
    report: str  # afterwards, for what is to be read off the console
    before: str = ""  # what an inner host does before it starts QEMU
    login: Login | None = None  # into the inner host


class Backend(Protocol):
    """Turns a :class:`MachineSpec` into a process that speaks QMP and SSH.

    The process runs with the machine's ``folder`` as its working directory and
    is expected to serve QMP on the Unix sockets that
    :func:`qvis.folder.qmp_sockets` names, a serial console on
    ``console.sock`` (copied to ``console.log``), and SSH on a loopback port.
    """

    name: str
    slowdown: float
    """How much longer than on hardware a boot may take; scales every deadline."""

    def probe(self) -> Probe:
        """Try the backend for real; quick, or remembered from an earlier try."""

    def check(self, spec: MachineSpec) -> None:
        """Raise :class:`UsageError` for what this backend cannot do; before anything is done."""

    def furnish(self, folder: Path, purpose: Login | Job) -> None:
        """Put into ``folder`` what the guest is to find there."""

    def launch(
        self,
        spec: MachineSpec,
        folder: Path,
        *,
        incoming: bool = False,
        options: Sequence[str] = (),
    ) -> Launch:
        """How to start ``spec`` in ``folder``; comes before :meth:`furnish`.

        ``incoming`` waits for a migration, and ``options`` are for the QEMU that runs the guest.
        """


@dataclass(frozen=True)
class Choice:
    """The backend taken and why."""

    backend: Backend
    reason: str


def available() -> dict[str, Backend]:
    """All installed backends by name."""
    return {point.name: point.load()() for point in entry_points(group=GROUP)}


def choose(name: str) -> Choice:
    """The backend called ``name``; ``auto`` takes the first that works.

    Only what is asked for is loaded: somebody else's backend that is broken is
    in nobody's way. Raises :class:`UsageError` for an unknown name and
    :class:`InfraError` when the one asked for, or all of them, do not work
    here, with the reasons.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if name != "auto":
        if name not in points:
            known = ", ".join(["auto", *sorted(points)])
            raise UsageError(f"unknown backend {name!r}: choose one of {known}")
        backend: Backend = points[name].load()()
        probe = backend.probe()
        if not probe.works:
            raise InfraError(f"backend {name} does not work here: {probe.reason}", stage="backend")
        return Choice(backend, "as asked")

    refused: list[str] = []
    for candidate in PREFERENCE:
        if candidate not in points:
            refused.append(f"not {candidate}: it is not installed")
            continue
        backend = points[candidate].load()()
        try:
            probe = backend.probe()
        except InfraError as problem:  # of this host, which another backend may not mind
            probe = Probe(False, str(problem))
        if probe.works:
            return Choice(backend, "; ".join([*refused, f"{candidate}: {probe.reason}"]))
        refused.append(f"not {candidate}: {probe.reason}")
    raise InfraError(f"no backend works here: {'; '.join(refused)}", stage="backend")
