# SPDX-License-Identifier: GPL-2.0-or-later
"""Under TCG a vCPU's register accesses go where they should while another one moves registers."""

from __future__ import annotations

import qvis

DEVICE = "/sys/bus/pci/devices/0000:00:03.0"  # makes random numbers, which nothing needs here
TURNS = 100
REQUESTS = 8000  # of each of three, so that they go on for as long as the turns

# Bit 1 of a PCI function's command register maps its registers and takes them away.
MEDDLE = rf"""
basename {DEVICE} > {DEVICE}/driver/unbind
set_command() {{ printf "$1" | dd of={DEVICE}/config bs=2 seek=2 conv=notrunc; }}
for cpu in 1 2 3; do qvis-load /dev/vda $cpu {REQUESTS} & done
turn=0
while [ $turn -lt {TURNS} ]; do
    set_command '\000\000'
    set_command '\002\000'
    turn=$((turn + 1))
done 2> /dev/null
wait
"""


def test_no_eoi_is_lost_while_registers_move() -> None:
    """Else a vCPU takes no more of them ("physmem: keep the view..." of patches/qemu)."""
    with qvis.up(backend="tcg", transport="pci", smp=4, queues=4) as vm:
        vm.irqs.spread()
        done = vm.ssh.run(MEDDLE, deadline=60)
        assert done.stdout.count(f'"completed": {REQUESTS}') == 3
