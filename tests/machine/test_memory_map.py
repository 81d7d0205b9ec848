# SPDX-License-Identifier: GPL-2.0-or-later
"""Under TCG a vCPU's register accesses go where they should while another one moves registers."""

from __future__ import annotations

import qvis

RANDOM = "0x00ff00"  # the class of the device that makes random numbers: nothing needs it here
TURNS = 100
REQUESTS = 8000  # of each of three, so that they go on for as long as the turns

# Bit 1 of a PCI function's command register maps its registers and takes them away.
MEDDLE = rf"""
set -e
cd $(dirname $(grep -l {RANDOM} /sys/bus/pci/devices/*/class))
basename $PWD > driver/unbind
set_command() {{
    printf "$1" | dd of=config bs=2 seek=2 conv=notrunc 2> /dev/null
}}
command() {{
    echo command: $(hexdump -s 4 -n 2 -e '1/2 "%x"' config)
}}
for cpu in 1 2 3; do qvis-load /dev/vda $cpu {REQUESTS} & done
turn=0
while [ $turn -lt {TURNS} ]; do
    set_command '\000\000'
    [ $turn != 0 ] || command
    set_command '\002\000'
    [ $turn != 0 ] || command
    turn=$((turn + 1))
done
wait
"""


def test_no_eoi_is_lost_while_registers_move() -> None:
    """Else a vCPU takes no more of them ("physmem: keep the view..." of patches/qemu)."""
    with qvis.up(backend="tcg", transport="pci", smp=4, queues=4) as vm:
        vm.irqs.spread()
        done = vm.ssh.run(MEDDLE, deadline=60)
        assert "command: 0\ncommand: 2\n" in done.stdout
        assert done.stdout.count(f'"completed": {REQUESTS}') == 3
