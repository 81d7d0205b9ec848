# SPDX-License-Identifier: GPL-2.0-or-later
"""Register maps: what is at which offset of a device, and why it is touched.

A :class:`Map` goes by the name of a region (:class:`~qvis.trace.store.Region`).
Causes here are those of a device that works; what its driver does before that is
set-up, which :mod:`qvis.trace.attribution` knows from the device's status.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .model import Cause

__all__ = ["MAPS", "MSIX_TABLE", "Map", "Register", "default"]


@dataclass(frozen=True)
class Register:
    """``size`` bytes at ``offset``: why a guest reads and why it writes them."""

    offset: int
    size: int
    name: str
    read: Cause
    write: Cause


@dataclass(frozen=True)
class Map:
    """The registers of one kind of region; those between them get ``rest``.

    ``stride`` is where a table's next entry begins with the same registers.
    """

    registers: tuple[Register, ...]
    rest: Cause
    stride: int = 0

    @property
    def size(self) -> int:
        """Bytes from the first register's beginning to the last one's end."""
        return max((register.offset + register.size for register in self.registers), default=0)


def _registers(cause: Cause, text: str) -> Iterator[Register]:
    """Registers of ``cause`` from words "offset[/size]:name", the size in bytes (else 4)."""
    for word in text.split():
        place, name = word.split(":")
        offset, _, size = place.partition("/")
        yield Register(int(offset, 16), int(size or "4"), name, cause, cause)


def default(region: str) -> Map:
    """The map of a region that has none: all of it has one cause."""
    return Map((), REST.get(region, Cause.OTHER))


# virtio 1.3, 4.2.2 (table "MMIO Device Register Layout"), and from 0x0c4
# docs/virtio-interrupts.md. A write to VisUpdate, VIS's doorbell, names a vector and not what
# of it has changed: where the vector goes, as a rule, and its mask only when that meets an
# interrupt, or a vector that KVM delivers. Interrupt storage is no register: what the driver
# and the device do there is memory, and in no trace.
VIRTIO_MMIO = Map(
    (
        *_registers(
            Cause.SETUP,
            "000:MagicValue 004:Version 008:DeviceID 00c:VendorID 010:DeviceFeatures "
            "014:DeviceFeaturesSel 020:DriverFeatures 024:DriverFeaturesSel 030:QueueSel "
            "034:QueueNumMax 038:QueueNum 044:QueueReady 070:Status 080:QueueDescLow "
            "084:QueueDescHigh 090:QueueDriverLow 094:QueueDriverHigh 0a0:QueueDeviceLow "
            "0a4:QueueDeviceHigh 0ac:SHMSel 0b0:SHMLenLow 0b4:SHMLenHigh 0b8:SHMBaseLow "
            "0bc:SHMBaseHigh 0c0:QueueReset 0d0:MsiVectorNum 0d4:MsiControl "
            "0d8:ConfigMsixVector 0dc:QueueMsixVector 0f0:VisStorageLow 0f4:VisStorageHigh "
            "0f8:VisControl",
        ),
        *_registers(Cause.NOTIFY, "050:QueueNotify"),
        *_registers(Cause.STATUS, "060:InterruptStatus"),
        *_registers(Cause.ACKNOWLEDGE, "064:InterruptACK"),
        *_registers(
            Cause.ROUTE,
            "0c4:VisUpdate 0e0:MsiAddrLow 0e4:MsiAddrHigh 0e8:MsiData 0ec:MsiVector",
        ),
        *_registers(Cause.CONFIGURATION, "0fc:ConfigGeneration 100/256:Config"),
    ),
    Cause.OTHER,
)

# virtio 1.3, 4.1.4.3 (struct virtio_pci_common_cfg).
VIRTIO_PCI_COMMON = Map(
    tuple(
        _registers(
            Cause.SETUP,
            "00:device_feature_select 04:device_feature 08:driver_feature_select "
            "0c:driver_feature 10/2:config_msix_vector 12/2:num_queues 14/1:device_status "
            "15/1:config_generation 16/2:queue_select 18/2:queue_size 1a/2:queue_msix_vector "
            "1c/2:queue_enable 1e/2:queue_notify_off 20/8:queue_desc 28/8:queue_driver "
            "30/8:queue_device 38/2:queue_notif_config_data 3a/2:queue_reset "
            "3c/2:admin_queue_index 3e/2:admin_queue_num",
        )
    ),
    Cause.OTHER,
)

# 4.1.4.5 of the same: reading it acknowledges too.
VIRTIO_PCI_ISR = Map(tuple(_registers(Cause.STATUS, "0/1:isr")), Cause.OTHER)

# PCI 3.0, 6.8.2: 16 bytes a vector.
MSIX_TABLE = Map(
    (
        *_registers(Cause.ROUTE, "0:MessageAddress 4:MessageUpperAddress 8:MessageData"),
        # Bit 0 masks; attribution looks at it.
        Register(12, 4, "VectorControl", Cause.MASK, Cause.MASK),
    ),
    Cause.OTHER,
    stride=16,
)
MSIX_PBA = Map((), Cause.STATUS)

# PCI 3.0, 6.1 for the header; what follows are capabilities, at places of their own.
PCI_CONFIG = Map(
    tuple(
        _registers(
            Cause.CONFIGURATION,
            "00/2:VendorID 02/2:DeviceID 04/2:Command 06/2:PciStatus 08/4:RevisionClass "
            "0c/1:CacheLineSize 0d/1:LatencyTimer 0e/1:HeaderType 0f/1:BIST 10:BAR0 14:BAR1 "
            "18:BAR2 1c:BAR3 20:BAR4 24:BAR5 28:CardbusCIS 2c/2:SubsystemVendorID "
            "2e/2:SubsystemID 30:ExpansionROM 34/1:Capabilities 3c/1:InterruptLine "
            "3d/1:InterruptPin 3e/1:MinGnt 3f/1:MaxLat 40/4032:Capability",
        )
    ),
    Cause.CONFIGURATION,
)

# SDM volume 3, table 11-1 (xAPIC); each register is 16 bytes from the next.
LAPIC = Map(
    (
        *_registers(
            Cause.SETUP,
            "020:ID 030:Version 080:TPR 090:APR 0a0:PPR 0c0:RRD 0d0:LDR 0e0:DFR 0f0:SVR 280:ESR "
            "2f0:LVT_CMCI 330:LVT_Thermal 340:LVT_PerfMon 350:LVT_LINT0 360:LVT_LINT1 "
            "370:LVT_Error",
        ),
        *_registers(Cause.EOI, "0b0:EOI"),
        *_registers(Cause.IPI, "300:ICR_Low 310:ICR_High"),
        *_registers(Cause.TIMER, "320:LVT_Timer 380:TimerInitial 390:TimerCurrent 3e0:TimerDivide"),
        # Which were level-triggered, to be ended at the IOAPIC too.
        *(Register(0x180 + 16 * n, 4, f"TMR{n}", Cause.EOI, Cause.OTHER) for n in range(8)),
        # What is pending while an interrupt moves (apic_set_affinity and vector clean-up).
        *(Register(0x100 + 16 * n, 4, f"ISR{n}", Cause.SETUP, Cause.OTHER) for n in range(8)),
        *(Register(0x200 + 16 * n, 4, f"IRR{n}", Cause.ROUTE, Cause.OTHER) for n in range(8)),
    ),
    Cause.OTHER,
)

# 82093AA datasheet, 3.0; the EOI register since version 0x20. What is behind
# IOWIN depends on IOREGSEL: attribution follows.
IOAPIC = Map(
    (
        *_registers(Cause.SETUP, "00:IOREGSEL 10:IOWIN"),
        *_registers(Cause.EOI, "40:EOI"),
    ),
    Cause.OTHER,
)

MAPS = {
    "virtio-mmio": VIRTIO_MMIO,
    "virtio-pci-common": VIRTIO_PCI_COMMON,
    "virtio-pci-isr": VIRTIO_PCI_ISR,
    "virtio-pci-notify": Map((), Cause.NOTIFY),
    "virtio-pci-device": Map((), Cause.CONFIGURATION),
    "msix-table": MSIX_TABLE,
    "msix-pba": MSIX_PBA,
    "pci-config": PCI_CONFIG,
    "apic-msi": LAPIC,
    "ioapic": IOAPIC,
}

# Devices that no interrupt of virtio's is about, by QEMU's names.
REST = {
    "serial": Cause.CONSOLE,
    "rtc": Cause.TIMER,
    "rtc-index": Cause.TIMER,
    "pit": Cause.TIMER,
    "pic": Cause.SETUP,
    "elcr": Cause.SETUP,
    "fwcfg": Cause.SETUP,
    "fwcfg.dma": Cause.SETUP,
    "acpi-ged": Cause.CONFIGURATION,
    "acpi-ged-regs": Cause.CONFIGURATION,
    "kvmvapic": Cause.SETUP,
    "port-b": Cause.TIMER,
    "post": Cause.SETUP,
    "legacy": Cause.SETUP,
    "pci-ports": Cause.CONFIGURATION,
    "pcie-mmcfg-mmio": Cause.CONFIGURATION,
    "gpex_mmio_window": Cause.CONFIGURATION,
}
