# SPDX-License-Identifier: GPL-2.0-or-later
"""Patched and unpatched parts get on: the feature is used only where both have it."""

from __future__ import annotations

from dataclasses import replace

import pytest

import qvis
from qvis.backends.tcg import Tcg
from qvis.build import build_all, build_linux, build_qemu
from qvis.guest import load

# They build, where scripts/test has not done so before.
pytestmark = pytest.mark.timeout(3600)

REQUESTS = 200


def test_unpatched_guest_on_patched_qemu() -> None:
    """A device that offers MSI works with a driver that has never heard of it."""
    artifacts = replace(build_all(), linux=build_linux(patched=False))
    with qvis.up(backend=Tcg(artifacts), transport="msi", smp=2, queues=2) as vm:
        (line,) = (v for v in vm.irqs.vectors() if v.driver == "virtio_blk")
        assert line.source == ""
        assert "IO-APIC" in line.chip
        for queue in range(2):
            assert load.run(vm.ssh, queue, REQUESTS).completed == REQUESTS


def test_patched_guest_on_unpatched_qemu() -> None:
    artifacts = replace(build_all(), qemu=build_qemu(patched=False))
    for transport in (qvis.Transport.INTX, qvis.Transport.PCI):
        with qvis.up(backend=Tcg(artifacts), transport=transport, smp=2, queues=2) as vm:
            vectors = [v for v in vm.irqs.vectors() if v.driver == "virtio_blk"]
            assert len(vectors) == (3 if transport.vector_per_queue else 1)
            for queue in range(2):
                assert load.run(vm.ssh, queue, REQUESTS).completed == REQUESTS


def test_unpatched_qemu_says_what_it_lacks() -> None:
    artifacts = replace(build_all(), qemu=build_qemu(patched=False))
    with pytest.raises(qvis.InfraError, match=r"virtio-mmio\.vectors") as caught:
        qvis.up(backend=Tcg(artifacts), transport="msi")
    assert caught.value.stage == "launch"
