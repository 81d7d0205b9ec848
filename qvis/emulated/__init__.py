# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine in pure Python: platform, guest, and the sockets by which both are reached.

    events, memory              time and RAM
    lapic, apictimer, ioapic, pic, messages             interrupt controllers
    virtqueue, virtio, devices, mmio, vis, pci, virtio_pci  devices and their transports
    vcpu, irqchip, costs, machine, places, ports        what exits, to whom, what it costs
    recorder                    what happened, for qvis.trace.emulated to read
    guest/                      Linux: drivers, interrupts, files, a shell
    serve/                      QMP, SSH and the console, for real clients

Nothing but the standard library up to ``guest``; all times in it are **modelled cycles**.
"""
