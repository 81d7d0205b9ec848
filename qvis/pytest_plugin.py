# SPDX-License-Identifier: GPL-2.0-or-later
"""A pytest plugin: real guests as fixtures, and assertions about what they do to devices.

Installed with qvis and found by pytest by itself (entry point ``pytest11``)::

    @pytest.mark.qvis(transport="msi", smp=2, queues=2)
    def test_reads_acknowledge_nothing(qvis_machine):
        with qvis_machine.recording() as recording:
            qvis_machine.ssh.run("qvis-load /dev/vda 1 100")
        recording.assert_no_exits(cause="acknowledge")
        recording.assert_exits(100, device="blk0", cause="notify")

The marker's arguments are those of :func:`qvis.up`. A machine is shared by the
tests of a module that ask for the same, so leave it as you found it. On TCG
nothing exits: what is counted there are the accesses that would. With
``--qvis-backend emulated`` no build, no QEMU and no KVM is needed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Every pytest run of the environment loads this: what it needs is imported when it is used.
if TYPE_CHECKING:
    from .machine.machine import Machine
    from .trace.store import Trace

__all__ = ["QvisMachine", "Recording"]

MARKER = "qvis"


class Recording:
    """A trace, to be asserted about; it is there when its ``with`` block has ended."""

    def __init__(self) -> None:
        self._trace: Trace | None = None

    @property
    def trace(self) -> Trace:
        """All that was recorded (:class:`qvis.trace.store.Trace`)."""
        assert self._trace is not None, "the recording has not ended yet"
        return self._trace

    def exits(self, **what: str | int) -> int:
        """How many exits, or on TCG accesses, there were with this ``device``, ``register``,
        ``cause``, ``source``, ``vcpu`` or ``write``."""
        return sum(row["count"] for row in self._rows(what))

    def interrupts(self, **what: str | int) -> int:
        """How many interrupts vCPUs took, of this ``device``, ``source``, ``irq`` or ``vcpu``."""
        from .trace.model import Kind

        return sum(row["count"] for row in self._rows(what, Kind.DELIVER))

    def assert_no_exits(self, **what: str | int) -> None:
        """Fail, and show them, if there were any; arguments as of :meth:`exits`."""
        self.assert_exits(0, **what)

    def assert_exits(self, expected: int, **what: str | int) -> None:
        """Fail, and show them, unless there were exactly so many."""
        __tracebackhide__ = True
        rows = self._rows(what)
        found = sum(row["count"] for row in rows)
        if self.trace.manifest.partial:
            pytest.fail(f"the trace is partial: {'; '.join(self.trace.manifest.partial)}")
        if found != expected:
            shown = [
                f"  {row['count']:>8,}  {row['device']}.{row['register']} "
                f"{'write' if row['write'] else 'read'}, {row['cause']}"
                for row in rows
            ]
            noun = {"access": "accesses", "exit": "exits"}[self.trace.manifest.provenance.touch]
            wanted = ", ".join(f"{name}={value!r}" for name, value in what.items()) or "any"
            pytest.fail(
                "\n".join([f"{found:,} {noun} with {wanted}, expected {expected:,}", *shown,
                           f"  {self.trace.manifest.provenance.line()}",
                           f"  trace: {self.trace.path}"])
            )  # fmt: skip

    def _rows(self, what: dict[str, str | int], *kinds: str) -> list[dict[str, Any]]:
        import polars as pl

        from .trace.model import SCHEMA, Cause

        events = self.trace.events()
        touch = self.trace.manifest.provenance.touch
        events = events.filter(pl.col("kind").is_in(list(kinds) or [touch]))
        for name, value in what.items():
            if name not in SCHEMA:
                raise TypeError(f"events have no {name!r}: they have {', '.join(SCHEMA)}")
            if name == "cause" and value not in list(Cause):
                raise TypeError(f"no cause {value!r}: there are {', '.join(Cause)}")
            devices = {region.device for region in self.trace.manifest.regions}
            if name == "device" and value not in devices:
                raise TypeError(f"no device {value!r}: there are {', '.join(sorted(devices))}")
            text = isinstance(value, str)
            column = pl.col(name).cast(pl.String) if text else pl.col(name)
            events = events.filter(column == value)
        keys = ["device", "register", "write", "cause"]
        counted = events.group_by(keys).len("count").sort("count", descending=True)
        return counted.collect().to_dicts()


class QvisMachine:
    """A running machine; whatever :class:`qvis.Machine` has, this has too."""

    def __init__(self, machine: Machine, traces: Path) -> None:
        self._machine = machine
        self._traces = traces
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record what the guest does during the block."""
        from .trace.record import recording

        self._count += 1
        found = Recording()
        with recording(self._machine, self._traces / f"{self._count}.trace") as session:
            yield found
        found._trace = session.trace


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qvis")
    group.addoption(
        "--qvis-backend", default="auto", metavar="NAME",
        help="backend of qvis_machine: auto, kvm, tcg or emulated (default: auto)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARKER}(**what): what machine qvis_machine is, as qvis.up's arguments"
    )


@pytest.fixture(scope="module")
def _qvis_machines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, QvisMachine]]:
    """The module's machines by what was asked for; they end with it."""
    machines: dict[str, QvisMachine] = {}
    yield machines
    for machine in machines.values():
        machine.down()


@pytest.fixture
def qvis_machine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    _qvis_machines: dict[str, QvisMachine],
) -> QvisMachine:
    """A real guest, as the test's ``qvis`` marker says; shared within a module."""
    import qvis

    marker = request.node.get_closest_marker(MARKER)
    what = {
        "backend": request.config.getoption("--qvis-backend"),
        **(marker.kwargs if marker else {}),
    }
    key = json.dumps(what, sort_keys=True, default=str)
    if key not in _qvis_machines:
        traces = tmp_path_factory.mktemp("traces")
        _qvis_machines[key] = QvisMachine(qvis.up(**what), traces)
    return _qvis_machines[key]
