# SPDX-License-Identifier: GPL-2.0-or-later
"""Patched and unpatched parts get on: the feature is used only where both have it."""

from __future__ import annotations

from dataclasses import replace

import pytest

import qvis
from qvis.backends.qemu import Accelerator
from qvis.backends.tcg import Tcg
from qvis.build import build_all, build_linux, build_qemu
from qvis.guest import load
from qvis.spec import MachineSpec

# They build, where scripts/test has not done so before.
pytestmark = pytest.mark.timeout(3600)

REQUESTS = 200


@pytest.mark.parametrize("offered", ["msi", "vis", "vis-doorbell"])
def test_unpatched_guest_on_patched_qemu(offered: str) -> None:
    """A device that offers MSI and VIS works with a driver that has never heard of them."""
    artifacts = replace(build_all(), linux=build_linux(patched=False))
    with qvis.up(backend=Tcg(artifacts), transport=offered, smp=2, queues=2) as vm:
        (line,) = (v for v in vm.irqs.vectors() if v.driver == "virtio_blk")
        assert line.source == ""
        assert "IO-APIC" in line.chip
        for queue in range(2):
            assert load.run(vm.ssh, queue, REQUESTS).completed == REQUESTS


@pytest.mark.parametrize(
    ("settings", "chip"),
    [
        (("vectors=64", "vis=on"), "MMIO-VIS-LNRO0005:"),
        (("vectors=64", "vis=off"), "MMIO-MSI-LNRO0005:"),
        (("vectors=0", "vis=off"), "IO-APIC"),
    ],
)
def test_the_driver_takes_the_best_that_there_is(settings: tuple[str, ...], chip: str) -> None:
    """VIS, else MSI, else the line; the same kernel each time."""
    with qvis.up(backend=Offering(settings), transport="intx", smp=2, queues=2) as vm:
        vectors = [v for v in vm.irqs.vectors() if v.driver == "virtio_blk"]
        assert len(vectors) == (1 if chip == "IO-APIC" else 3)
        assert all(chip in vector.chip for vector in vectors)
        for queue in range(2):
            assert load.run(vm.ssh, queue, REQUESTS).completed == REQUESTS


class Offering(Tcg):
    """A TCG backend whose virtio-mmio has these settings."""

    def __init__(self, settings: tuple[str, ...]) -> None:
        super().__init__()
        self._settings = settings

    def accelerator(self, spec: MachineSpec) -> Accelerator:
        usual = super().accelerator(spec)
        more = [word for name in self._settings for word in ("-global", f"virtio-mmio.{name}")]
        return replace(usual, options=(*usual.options, *more))


def test_patched_guest_on_unpatched_qemu() -> None:
    artifacts = replace(build_all(), qemu=build_qemu(patched=False))
    # As released it can lose an EOI while another vCPU maps BARs ("physmem: keep the view..."),
    # so over PCI there is no other.
    for transport, smp in ((qvis.Transport.INTX, 2), (qvis.Transport.PCI, 1)):
        with qvis.up(backend=Tcg(artifacts), transport=transport, smp=smp, queues=smp) as vm:
            vectors = [v for v in vm.irqs.vectors() if v.driver == "virtio_blk"]
            assert len(vectors) == (1 + smp if transport.vector_per_queue else 1)
            for queue in range(smp):
                assert load.run(vm.ssh, queue, REQUESTS).completed == REQUESTS


@pytest.mark.parametrize("transport", ["msi", "vis"])
def test_unpatched_qemu_says_what_it_lacks(transport: str) -> None:
    artifacts = replace(build_all(), qemu=build_qemu(patched=False))
    with pytest.raises(qvis.InfraError, match=r"virtio-mmio\.vectors") as caught:
        qvis.up(backend=Tcg(artifacts), transport=transport)
    assert caught.value.stage == "launch"
