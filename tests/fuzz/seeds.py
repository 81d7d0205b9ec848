# SPDX-License-Identifier: GPL-2.0-or-later
"""Inputs to begin with: what drivers do, and each thing that a hostile one may try.

Random bytes do not negotiate a feature, nor hand storage over, so a fuzzer that
begins with nothing finds nothing but the first few checks. There are two languages:
that of ``virtio_mmio_fuzz.c`` (:class:`Commands`), and that of QEMU's generic fuzzer
(:class:`GenericCommands`), each as its source has it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from enum import IntEnum

__all__ = ["Commands", "GenericCommands", "Op", "Place", "seeds"]

VECTORS = 8  # of all targets but one
MANY_VECTORS = 1100  # of virtio-mmio-vis-fuzz
ENABLE = 1 << 16
REGISTERS_SIZE = 0x200


class Register(IntEnum):
    """Offsets of registers, as docs/virtio-interrupts.md and the virtio specification have them."""

    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC = 0x080
    QUEUE_DRIVER = 0x090
    QUEUE_DEVICE = 0x0A0
    VIS_UPDATE = 0x0C4
    MSI_VECTOR_NUM = 0x0D0
    MSI_CONTROL = 0x0D4
    CONFIG_VECTOR = 0x0D8
    QUEUE_VECTOR = 0x0DC
    MSI_ADDR_LOW = 0x0E0
    MSI_ADDR_HIGH = 0x0E4
    MSI_DATA = 0x0E8
    MSI_VECTOR = 0x0EC
    VIS_STORAGE_LOW = 0x0F0
    VIS_STORAGE_HIGH = 0x0F4
    VIS_CONTROL = 0x0F8


SET_MSG, MASK, UNMASK = 1 << 16, 1 << 17, 1 << 18  # of MSI_VECTOR
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8  # of STATUS


class Op(IntEnum):
    """Commands of ``virtio_mmio_fuzz.c``."""

    WRITE = 0
    READ = 1
    ACCESS = 2
    MEM = 3
    ENTRY = 4
    VECTOR = 5
    STORAGE = 6
    NEGOTIATE = 7
    QUEUE = 8
    REQUEST = 9
    NOTIFY = 10
    CONFIG = 11
    FIRE = 12
    STATUS = 13
    STORM = 14
    EXTRA = 15
    MIGRATE = 16


class Place(IntEnum):
    """Where it can point a device to."""

    WINDOW = 0  # memory that is clear when an input starts, 64 KiB
    EXTRA = 1  # the same, but it can go away
    END = 2  # the last 32 KiB of memory, and what follows
    ROM = 3
    REGISTERS = 4  # of the devices themselves
    APIC = 5
    HOLE = 6
    WRAP = 7  # the last 32 KiB of the address space


MSI, VIS, NO_VERSION_1, NO_RESET, NO_FEATURES_OK, RUN = (1 << bit for bit in range(6))
WINDOW_BASE = 0x100000
QUEUE_AT, MESSAGES_AT, BUFFER_AT = 0x4000, 0x8000, 0xC000  # in a window: out of others' way


class Commands:
    """An input of ``virtio_mmio_fuzz.c``: eight bytes a command."""

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.data = b""

    def add(self, op: Op, more: int = 0, offset: int = 0, value: int = 0) -> Commands:
        """``more`` is what the command makes of its argument beside the device."""
        argument = self.device | more << 1
        self.data += struct.pack("<BBHI", op, argument, offset, value & 0xFFFFFFFF)
        return self

    def write(self, register: int, value: int) -> Commands:
        return self.add(Op.WRITE, offset=register, value=value)

    def read(self, register: int) -> Commands:
        return self.add(Op.READ, offset=register)

    def on(self, device: int) -> Commands:
        """Those that follow go to another device."""
        self.device = device
        return self

    def negotiate(self, flags: int) -> Commands:
        return self.add(Op.NEGOTIATE, value=flags)

    def storage(self, control: int, place: Place = Place.WINDOW, offset: int = 0) -> Commands:
        return self.add(Op.STORAGE, place, offset, control)

    def entry(self, vector: int, area: int, place: Place, offset: int, data: int) -> Commands:
        """What vector's message is; storage is at the window's beginning."""
        return self.add(Op.ENTRY, place, 3 * area + 8 * vector, offset << 16 | data)

    def queue(self, number: int = 0, place: Place = Place.WINDOW, at: int = QUEUE_AT) -> Commands:
        return self.add(Op.QUEUE, place, at + 0x800 * number, number << 8 | 4)

    def request(self, number: int = 0, place: Place = Place.WINDOW) -> Commands:
        return self.add(Op.REQUEST, place, BUFFER_AT, number << 8 | 8)

    def fire(self, vector: int) -> Commands:
        return self.add(Op.FIRE, value=vector)

    def vector(self, vector: int, action: int, data: int = 0) -> Commands:
        """What a driver does: 0 mask, 1 unmask, 2 retarget, 3 retarget to its own entry."""
        return self.add(Op.VECTOR, action, vector, data)


def vis(n: int = VECTORS, device: int = 0) -> Commands:
    """A driver that has its storage in place, with messages to memory."""
    area = 128 * -(-n // 128)
    commands = Commands(device).negotiate(VIS)
    for vector in (0, 1, 2, n - 1):
        commands.entry(vector, area, Place.WINDOW, MESSAGES_AT + 4 * vector, 0x4000 + vector)
    return commands.storage(n | ENABLE)


def msi(device: int = 0) -> Commands:
    """A driver that has its vectors' messages in place."""
    commands = Commands(device).negotiate(MSI)
    for vector in (0, 1, 2, VECTORS - 1):
        message(commands, vector, WINDOW_BASE + MESSAGES_AT + 4 * vector)
    commands.write(Register.CONFIG_VECTOR, 0)
    for queue in range(2):
        commands.write(Register.QUEUE_SEL, queue).write(Register.QUEUE_VECTOR, queue + 1)
    return commands.write(Register.MSI_CONTROL, 1)


def message(commands: Commands, vector: int, address: int, data: int = 0x4021) -> Commands:
    commands.write(Register.MSI_ADDR_LOW, address).write(Register.MSI_ADDR_HIGH, address >> 32)
    commands.write(Register.MSI_DATA, data)
    return commands.write(Register.MSI_VECTOR, vector | SET_MSG | UNMASK)


def run(commands: Commands) -> Commands:
    """Queues, and a request on each; an interrupt of the configuration."""
    commands.queue(0).queue(1).add(Op.STATUS, value=ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    return commands.request(0).request(1).request(0).add(Op.CONFIG)


def drivers() -> Iterator[tuple[str, Commands]]:
    """What a good driver does."""
    line = run(Commands().negotiate(0)).read(Register.INTERRUPT_STATUS)
    yield "line", line.write(Register.INTERRUPT_ACK, 3)
    yield "msi", run(msi())
    yield "vis", run(vis())
    yield "vis-many", run(vis(MANY_VECTORS)).fire(1024).fire(MANY_VECTORS - 1)
    yield "vis-one", run(vis(1)).fire(0).fire(1)
    both = Commands().negotiate(MSI | VIS).storage(VECTORS | ENABLE)
    yield "both", run(both).write(Register.VIS_CONTROL, 0).write(Register.MSI_CONTROL, 1).fire(1)
    masked = msi()
    for action in (MASK, UNMASK, MASK | SET_MSG):
        masked.write(Register.MSI_VECTOR, 1 | action).fire(1).read(Register.MSI_VECTOR)
    yield "msi-mask", masked.write(Register.MSI_VECTOR, 1 | UNMASK).fire(1)
    yield "vis-mask", vis().vector(1, 0).fire(1).fire(1).vector(1, 1).fire(1)
    yield "vis-retarget", vis().fire(1).vector(1, 2, 0x9000).fire(1).vector(1, 2, 0x9008).fire(1)
    masked = vis().fire(1).vector(1, 0).fire(1).vector(1, 2, 0x9000).vector(1, 1).fire(1)
    yield "vis-mask-retarget", masked
    again = run(vis()).write(Register.VIS_CONTROL, 0).fire(1)
    yield "vis-again", again.storage(4 | ENABLE, offset=0x1000).fire(1).fire(5)
    yield "vis-rebind", vis().fire(0).add(Op.STATUS, value=0).fire(0).negotiate(0).fire(0)
    two = run(vis()).on(1).negotiate(VIS).storage(VECTORS | ENABLE, offset=0x1000)
    yield "two-devices", run(two).on(0).fire(1)
    yield "vis-migrate", vis().vector(1, 0).fire(1).add(Op.MIGRATE).vector(1, 1).fire(1).fire(2)
    masked = msi().write(Register.MSI_VECTOR, 1 | MASK).fire(1).add(Op.MIGRATE)
    yield "msi-migrate", masked.write(Register.MSI_VECTOR, 1 | UNMASK).fire(1)
    yield "migrate-running", run(vis()).add(Op.MIGRATE).request(0).request(1)


def bad_storage() -> Iterator[tuple[str, Commands]]:
    """Storage that a device must refuse, or survive."""
    control = VECTORS | ENABLE

    def handed(place: Place, offset: int = 0, value: int = control) -> Commands:
        return Commands().negotiate(VIS).storage(value, place, offset).fire(0).fire(1)

    yield "rom", handed(Place.ROM)
    yield "registers", handed(Place.REGISTERS)
    yield "other-registers", handed(Place.REGISTERS, REGISTERS_SIZE)
    yield "apic", handed(Place.APIC)
    yield "hole", handed(Place.HOLE)
    yield "unaligned", handed(Place.WINDOW, 64)
    yield "odd", handed(Place.WINDOW, 0x81)
    yield "wraps", handed(Place.WRAP, 0x7F80)
    yield "wraps-much", handed(Place.WRAP, 0x7F80, MANY_VECTORS | ENABLE)
    yield "last-bytes", handed(Place.END, 0x8000 - 3 * 128 - 128, VECTORS | ENABLE)
    yield "past-the-end", handed(Place.END, 0x8000 - 128)
    yield "none", handed(Place.WINDOW, 0, ENABLE)
    yield "too-many", handed(Place.WINDOW, 0, VECTORS + 1 | ENABLE)
    yield "far-too-many", handed(Place.WINDOW, 0, 0xFFFF | ENABLE)
    yield "reserved-bits", handed(Place.WINDOW, 0, control | 1 << 31)
    yield "reserved-disable", vis().write(Register.VIS_CONTROL, 1 << 17).fire(1)
    yield "address-high", vis().write(Register.MSI_ADDR_HIGH, 0xFFFFFFFF).fire(1)
    high = Commands().negotiate(VIS).write(Register.MSI_ADDR_HIGH, 0xFFFFFFFF)
    yield "address-too-high", high.storage(control).fire(1).fire(0)
    yield "without-feature", Commands().negotiate(0).storage(control).fire(1)
    yield "not-negotiated", Commands().storage(control).fire(1)
    refused = Commands().negotiate(VIS | NO_FEATURES_OK).storage(control).fire(1)
    yield "before-features-ok", refused
    yield "legacy", Commands().negotiate(VIS | NO_VERSION_1).storage(control).fire(1)
    yield "given-up", vis().fire(1).negotiate(NO_RESET).fire(1).storage(control).fire(1)
    yield "twice", vis().storage(control, offset=0x1000).fire(1)

    # Over what the device itself works with.
    for where, at in ("desc", 0), ("rings", 0x100), ("used", 0x180):
        over = Commands().negotiate(VIS).queue(0, at=at).storage(control)
        over.add(Op.STATUS, value=ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        yield f"over-{where}", over.request(0).fire(1).request(0).add(Op.CONFIG)
    other = run(vis()).on(1).negotiate(VIS).storage(control)
    yield "over-other-device", other.fire(1).on(0).fire(1).vector(1, 0).on(1).fire(1)
    buffers = vis().queue(0).add(Op.STATUS, value=0xF).add(Op.REQUEST, Place.WINDOW, 0, 8)
    yield "over-buffer", buffers.fire(1).add(Op.REQUEST, Place.WINDOW, 0x180, 0).fire(1)

    # Memory that goes away, comes back, or turns into ROM.
    for name, state in ("gone", 1), ("rom-now", 2):
        for masked in (0, 1):
            gone = Commands().negotiate(VIS).storage(control, Place.EXTRA)
            if masked:
                gone.vector(1, 0)
            gone.fire(1).add(Op.EXTRA, value=state).fire(1).fire(0).read(Register.STATUS)
            yield f"{name}-{masked}", gone.add(Op.EXTRA).fire(1).storage(control).fire(1)
        moved = Commands().negotiate(VIS).storage(control, Place.EXTRA).fire(1)
        moved.add(Op.MIGRATE, value=state).fire(1).vector(1, 0).fire(1)
        yield f"migrate-{name}", moved.add(Op.EXTRA).fire(1)
        update = Commands().negotiate(VIS).storage(control, Place.EXTRA).fire(1)
        update.add(Op.EXTRA, value=state).write(Register.VIS_UPDATE, 1)
        yield f"update-{name}", update.write(Register.VIS_CONTROL, 0)


def bad_entries() -> Iterator[tuple[str, Commands]]:
    """Messages to where there is no interrupt controller, and vectors that are none."""
    area = 128
    targets = {
        "registers-notify": (Place.REGISTERS, Register.QUEUE_NOTIFY, 0),
        "registers-status": (Place.REGISTERS, Register.STATUS, 0),
        "registers-disable": (Place.REGISTERS, Register.VIS_CONTROL, 0),
        "registers-msi": (Place.REGISTERS, Register.MSI_CONTROL, 1),
        "other-reset": (Place.REGISTERS, REGISTERS_SIZE + Register.STATUS, 0),
        "other-update": (Place.REGISTERS, REGISTERS_SIZE + Register.VIS_UPDATE, 1),
        "other-notify": (Place.REGISTERS, REGISTERS_SIZE + Register.QUEUE_NOTIFY, 0),
        "apic": (Place.APIC, 0, 0x31),
        "apic-nmi": (Place.APIC, 0, 0x431),
        "apic-logical": (Place.APIC, 0xC, 0x31),
        "apic-register": (Place.APIC, 0x300, 0x31),
        "rom": (Place.ROM, 0, 1),
        "hole": (Place.HOLE, 0, 1),
        "unaligned": (Place.WINDOW, MESSAGES_AT + 3, 1),
        "own-mask": (Place.WINDOW, 0, 0x101),
        "own-pending": (Place.WINDOW, area, 0x101),
        "own-entry": (Place.WINDOW, 3 * area + 8, 0),
        "queue": (Place.WINDOW, QUEUE_AT + 0x102, 0x20),
        "used-ring": (Place.WINDOW, QUEUE_AT + 0x130, 0x1234),
    }
    for name, (place, offset, data) in targets.items():
        commands = vis().entry(1, area, place, offset, data)
        yield f"entry-{name}", run(commands.on(0)).fire(1).vector(1, 0).fire(1)
        address = {Place.WINDOW: WINDOW_BASE, Place.REGISTERS: 0xFEB00000,
                   Place.APIC: 0xFEE00000, Place.ROM: 0xFFFF0000,
                   Place.HOLE: 0x80000000}[place]  # fmt: skip
        yield f"message-{name}", run(message(msi(), 1, address + offset, data)).fire(1)
    chased = vis().on(1).negotiate(VIS).storage(VECTORS | ENABLE, offset=0x1000)
    chased.add(Op.ENTRY, Place.REGISTERS, 0x1180, Register.QUEUE_NOTIFY << 16)
    yield (
        "entry-in-circles",
        chased.on(0)
        .entry(0, area, Place.REGISTERS, REGISTERS_SIZE + Register.QUEUE_NOTIFY, 0)
        .fire(0)
        .on(1)
        .fire(0),
    )
    yield "entry-follows-itself", vis().fire(1).vector(1, 3, 0x100184).fire(1).vector(1, 3).fire(1)
    for value in (VECTORS - 1, VECTORS, 0x7FFF, 0xFFFE, 0xFFFF):
        mapped = vis().write(Register.CONFIG_VECTOR, value).read(Register.CONFIG_VECTOR)
        mapped.write(Register.QUEUE_SEL, 1).write(Register.QUEUE_VECTOR, value)
        yield f"map-{value:x}", run(mapped).fire(value).write(Register.VIS_UPDATE, value)
        yield f"msi-vector-{value:x}", msi().write(Register.MSI_VECTOR, value | SET_MSG).fire(value)
    for value in (1 << 19, 0xFFFF0000, MASK | UNMASK):
        yield f"msi-command-{value:x}", msi().write(Register.MSI_VECTOR, 1 | value).fire(1)
    yield "queue-sel", vis().write(Register.QUEUE_SEL, 1023).write(Register.QUEUE_VECTOR, 1)
    for register in (Register.VIS_UPDATE, Register.VIS_CONTROL, Register.VIS_STORAGE_LOW):
        odd = vis()
        for size in range(4):
            odd.add(Op.ACCESS, size | 4, register + size, 0x10001).add(Op.ACCESS, size, register)
        yield f"size-{register:x}", odd.fire(1)


def disorder() -> Iterator[tuple[str, Commands]]:
    """Everything at once, too often, or in the middle."""
    yield "storm", vis().fire(1).add(Op.STORM, 0, 255, 0).add(Op.STORM, 0, 255, 0xFF00).fire(1)
    yield "storm-disabled", Commands().negotiate(VIS).add(Op.STORM, 0, 100)
    yield "msi-then-vis", msi().negotiate(NO_RESET | MSI | VIS).storage(VECTORS | ENABLE).fire(1)
    both = Commands().negotiate(MSI | VIS).write(Register.MSI_CONTROL, 1)
    yield "msi-first", both.storage(VECTORS | ENABLE).fire(1).write(Register.MSI_CONTROL, 0).fire(1)
    both = Commands().negotiate(MSI | VIS).storage(VECTORS | ENABLE)
    yield "vis-first", message(both.write(Register.MSI_CONTROL, 1), 1, WINDOW_BASE).fire(1)
    reset = run(vis()).add(Op.STATUS, value=0).fire(0).fire(1).add(Op.CONFIG).add(Op.NOTIFY)
    yield "reset", reset.write(Register.VIS_UPDATE, 1).read(Register.VIS_CONTROL)
    yield "reset-msi", run(msi()).add(Op.STATUS, value=0).fire(1).read(Register.MSI_VECTOR)
    changed = vis().fire(1)
    for value in (0xFFFFFFFF, 0, 0x01010101):
        for offset in (0, 128, 256, 384):
            changed.add(Op.MEM, 2, offset, value).add(Op.MEM, 2, offset + 4, value)
        changed.fire(0).fire(1).fire(2).write(Register.VIS_UPDATE, 1)
    yield "storage-changed", changed
    toggled = Commands().negotiate(VIS)
    for _ in range(8):
        toggled.storage(VECTORS | ENABLE).fire(1).write(Register.VIS_CONTROL, 0).fire(1)
    yield "toggled", toggled
    yield "bad-queue", vis().queue(0, Place.HOLE).add(Op.STATUS, value=0xF).request(0).fire(1)
    bad = vis().queue(0, Place.REGISTERS).add(Op.STATUS, value=0xF)
    yield "queue-in-registers", bad.request(0).add(Op.NOTIFY).fire(1)
    broken = vis().queue(0).add(Op.STATUS, value=0xF).add(Op.MEM, 1, QUEUE_AT + 0x102, 0x7FFF)
    yield "broken-queue", broken.add(Op.NOTIFY).fire(0).add(Op.MIGRATE).fire(0)


class GenericCommands:
    """An input of QEMU's generic fuzzer, of a machine whose first region is the device's."""

    SEPARATOR = b"FUZZ"

    def __init__(self) -> None:
        self.data = b""

    def _add(self, op: int, operands: bytes) -> GenericCommands:
        self.data += bytes([op]) + operands + self.SEPARATOR
        return self

    def read(self, register: int) -> GenericCommands:
        return self._add(2, struct.pack("<BBxxI", 2, 0, register))

    def write(self, register: int, value: int) -> GenericCommands:
        return self._add(3, struct.pack("<BBxxIQ", 2, 0, register, value & 0xFFFFFFFF))

    def write64(self, register: int, value: int) -> GenericCommands:
        """A pair of registers, the lower half first."""
        return self.write(register, value).write(register + 4, value >> 32)

    def pattern(self, data: bytes) -> GenericCommands:
        """What the next read by DMA finds; the first again after the last."""
        return self._add(7, b"\0\0" + data)

    def negotiate(self, features: int) -> GenericCommands:
        status = ACKNOWLEDGE | DRIVER
        self.write(Register.STATUS, 0).write(Register.STATUS, status)
        for word in range(2):
            self.write(Register.DRIVER_FEATURES_SEL, word)
            self.write(Register.DRIVER_FEATURES, features >> 32 * word)
        return self.write(Register.STATUS, status | FEATURES_OK)

    def run(self) -> GenericCommands:
        """A request that asks for the disk's name, and has no room for the answer."""
        for content in (
            struct.pack("<H", 1),  # the ring's index
            struct.pack("<H", 0),  # its first descriptor
            struct.pack("<QIHH", WINDOW_BASE + BUFFER_AT, 16, 1, 1),
            struct.pack("<IIQ", 8, 0, 0),  # the request's header
            struct.pack("<QIHH", WINDOW_BASE + BUFFER_AT + 32, 1, 2, 0),
            struct.pack("<H", 0),  # the ring's flags
        ):
            self.pattern(content)
        self.write(Register.QUEUE_SEL, 0).write(Register.QUEUE_NUM, 16)
        base = WINDOW_BASE + QUEUE_AT
        self.write64(Register.QUEUE_DESC, base)
        self.write64(Register.QUEUE_DRIVER, base + 0x100)
        self.write64(Register.QUEUE_DEVICE, base + 0x180)
        self.write(Register.QUEUE_READY, 1)
        self.write(Register.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return self.write(Register.QUEUE_NOTIFY, 0)


VERSION_1, F_VIS, F_MSI = 1 << 32, 1 << 48, 1 << 49


def generic() -> Iterator[tuple[str, GenericCommands]]:
    """The same, where there is nothing but registers."""

    def storage(features: int, address: int, control: int = VECTORS | ENABLE) -> GenericCommands:
        commands = GenericCommands().negotiate(VERSION_1 | features)
        commands.write64(Register.VIS_STORAGE_LOW, address)
        return commands.write(Register.VIS_CONTROL, control).read(Register.VIS_CONTROL)

    def vectors(address: int) -> GenericCommands:
        commands = GenericCommands().negotiate(VERSION_1 | F_MSI)
        for vector in range(2):
            commands.write64(Register.MSI_ADDR_LOW, address)
            commands.write(Register.MSI_DATA, 0x31)
            commands.write(Register.MSI_VECTOR, vector | SET_MSG | UNMASK)
        commands.write(Register.CONFIG_VECTOR, 0).write(Register.QUEUE_VECTOR, 1)
        return commands.write(Register.MSI_CONTROL, 1)

    yield "line", GenericCommands().negotiate(VERSION_1).run().read(Register.INTERRUPT_STATUS)
    for name, address in ("apic", 0xFEE00000), ("own", 0xFEB00050), ("memory", WINDOW_BASE):
        yield f"msi-{name}", vectors(address).run()
    masked = vectors(0xFEE00000).write(Register.MSI_VECTOR, 1 | MASK).run()
    yield "msi-mask", masked.read(Register.MSI_VECTOR).write(Register.MSI_VECTOR, 1 | UNMASK)
    for name, address in (
        ("memory", WINDOW_BASE), ("rom", 0xFFFF0000), ("own", 0xFEB00000), ("hole", 0x80000000),
        ("wraps", (1 << 64) - 128), ("unaligned", WINDOW_BASE + 8),
        # A descriptor is read, and so written first, over entries; rings over masks.
        ("over-desc", WINDOW_BASE + QUEUE_AT - 384), ("over-avail", WINDOW_BASE + QUEUE_AT + 0x100),
        ("over-used", WINDOW_BASE + QUEUE_AT + 0x180),
    ):  # fmt: skip
        run = storage(F_VIS, address).run().write(Register.VIS_UPDATE, 1)
        yield f"vis-{name}", run.write(Register.QUEUE_NOTIFY, 0).write(Register.STATUS, 0)
    both = storage(F_VIS | F_MSI, WINDOW_BASE).write(Register.MSI_CONTROL, 1).run()
    yield "both", both.write(Register.VIS_CONTROL, 0).write(Register.MSI_CONTROL, 1)


Source = Callable[[], Iterator[tuple[str, Commands]] | Iterator[tuple[str, GenericCommands]]]
SOURCES: dict[str, tuple[Source, ...]] = {
    "mmio": (drivers, bad_storage, bad_entries, disorder),
    "generic": (generic,),
}


def seeds(language: str) -> dict[str, bytes]:
    """Inputs by name, in the ``language`` that a target takes."""
    found: dict[str, bytes] = {}
    for source in SOURCES[language]:
        for name, made in source():
            assert name not in found, name
            found[name] = made.data
    return found
