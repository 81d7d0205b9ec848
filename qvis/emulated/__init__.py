# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine in pure Python: platform, guest, and the sockets by which both are reached.

    events, memory              time and RAM
    lapic, ioapic, pic, messages    interrupt controllers
    virtqueue, devices, mmio, vis, pci    virtio devices and their transports
    vcpu, irqchip, costs, machine   what exits, to whom, and what it costs
    guest/                      Linux: drivers, interrupts, files, a shell
    serve/                      QMP, SSH and the console, for real clients

Nothing but the standard library up to ``guest``; all times in it are **modelled cycles**.
"""
