# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest's kernel calls things: addresses of functions, and its build ID."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, SymbolTableSection

from ..errors import UsageError

__all__ = ["ENTRY", "FUNCTIONS", "Symbols"]

ENTRY = "irq_entries_start"
"""The first of the stubs that the IDT's device vectors point to, one after the other
(arch/x86/include/asm/idtentry.h)."""
SYMBOL = np.dtype(  # Elf64_Sym, elf(5)
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
     ("size", "<u8")]
)  # fmt: skip
TEXT = "_stext"  # places the kernel: it tells where KASLR moved it to
ENTRY_END = "spurious_entries_start"
FIRST_VECTOR = 0x20  # FIRST_EXTERNAL_VECTOR, arch/x86/include/asm/irq_vectors.h
# How many stubs there are: what FIRST_SYSTEM_VECTOR leaves, which configuration moves.
DEVICE_VECTORS = range(180, 225)
SYSTEM_ENTRY = "asm_sysvec_"  # entries of timers, IPIs and the like

# The functions that a device's interrupt goes through, those of them that the
# compiler left as functions. What each does:
FUNCTIONS = {
    # an interrupt controller's chip (arch/x86/kernel/apic)
    "ioapic_ack_level": "ack",
    "apic_ack_edge": "ack",
    "apic_ack_irq": "ack",
    "mask_ioapic_irq": "mask",
    "unmask_ioapic_irq": "unmask",
    "ioapic_set_affinity": "set_affinity",
    "apic_set_affinity": "set_affinity",
    "msi_set_affinity": "set_affinity",
    "msi_domain_set_affinity": "set_affinity",
    # PCI's MSI-X chip (drivers/pci/msi)
    "pci_irq_mask_msix": "mask",
    "pci_irq_unmask_msix": "unmask",
    "pci_msi_domain_write_msg": "write_msg",
    # virtio-mmio's MSI chip (our series)
    "vm_msi_irq_mask": "mask",
    "vm_msi_irq_unmask": "unmask",
    "vm_msi_irq_write_msg": "write_msg",
    # virtio-mmio's VIS chip (likewise): all that it does is in memory, so this alone tells of it
    "vm_vis_irq_mask": "mask",
    "vm_vis_irq_unmask": "unmask",
    "vm_vis_irq_write_msg": "write_msg",
    # handlers (drivers/virtio); the first argument of each is the IRQ
    "vm_interrupt": "handler",
    "vm_msi_config_changed": "handler",
    "vm_msi_vring_interrupt": "handler",
    "vp_config_changed": "handler",
    "vp_vring_interrupt": "handler",
    "vp_interrupt": "handler",
    "vring_interrupt": "handler",
    # the end
    "native_apic_mem_eoi": "eoi",
    "apic_mem_wait_icr_idle": "ipi",
}


@dataclass(frozen=True)
class Symbols:
    """The symbol table of one kernel image, as linked (not where it was loaded)."""

    addresses: dict[str, int]
    build_id: str  # hexadecimal; empty when the image has none

    @classmethod
    def read(cls, vmlinux: Path) -> Symbols:
        """The functions of ``vmlinux`` that a trace wants, and what places them.

        Raises :class:`UsageError` when it is no ELF file or has no symbols.
        """
        try:
            with vmlinux.open("rb") as file:
                elf = ELFFile(file)
                table = elf.get_section_by_name(".symtab")
                if not isinstance(table, SymbolTableSection):
                    raise UsageError(f"{vmlinux} has no symbols: it was stripped")
                addresses = _addresses(table)
                build_id = next(
                    (
                        note["n_desc"]
                        for section in elf.iter_sections()
                        if isinstance(section, NoteSection)
                        for note in section.iter_notes()
                        if note["n_type"] == "NT_GNU_BUILD_ID"
                    ),
                    "",
                )
        except OSError as problem:
            raise UsageError(f"cannot read {vmlinux}: {problem.strerror}") from problem
        except (ELFError, UnicodeDecodeError) as problem:
            raise UsageError(f"{vmlinux} is no ELF file: {problem}") from problem
        if ENTRY not in addresses:
            raise UsageError(f"{vmlinux} has no symbol {ENTRY}: not an x86 Linux kernel?")
        return cls(addresses, build_id)

    def functions(self) -> dict[int, str]:
        """The names of :data:`FUNCTIONS` that this kernel has, by address."""
        return {address: name for name, address in self.addresses.items() if name in FUNCTIONS}

    def system_entries(self) -> dict[int, str]:
        """Where interrupts that are no device's enter, such as the local timer's, by address."""
        return {
            address: name.removeprefix("asm_")
            for name, address in self.addresses.items()
            if name.startswith(SYSTEM_ENTRY)
        }

    def stubs(self) -> int:
        """How many device vectors there are, from 0x20 on."""
        start, size = self.entry_stubs()
        return (self.addresses[ENTRY_END] - start) // size

    def entry_stubs(self) -> tuple[int, int]:
        """Address of the stub of vector 0x20, and the bytes from one stub to the next.

        They are 8 bytes apart, or 16 in a kernel with IBT, and there is one for
        each of the device vectors.
        """
        start = self.addresses[ENTRY]
        end = self.addresses.get(ENTRY_END, 0)
        for size in (8, 16):
            if (end - start) % size == 0 and (end - start) // size in DEVICE_VECTORS:
                return start, size
        raise UsageError(
            f"the interrupt stubs of this kernel are laid out in a way that qvis does not know "
            f"({ENTRY} at {start:#x}, {ENTRY_END} at {end:#x})"
        )


def _addresses(table: SymbolTableSection) -> dict[str, int]:
    """The symbols that we want, by name.

    The table has tens of thousands, which pyelftools makes an object of each; so
    look for the names in its strings, and then for who has them.
    """
    names = "|".join(map(re.escape, (*FUNCTIONS, ENTRY, ENTRY_END, TEXT)))
    wanted = re.compile(rf"({names}|{SYSTEM_ENTRY}\w+)\0".encode())
    strings = table.stringtable.data()
    symbols = np.frombuffer(table.data(), dtype=SYMBOL)
    # A name may be the end of a longer one's string, hence each position on its own.
    at, found = 0, {}
    while match := wanted.search(strings, at):
        at = match.start() + 1
        for value in symbols["value"][symbols["name"] == match.start()]:
            found[match[1].decode()] = int(value)
    return found
