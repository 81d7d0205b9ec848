# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading a guest's interrupt tables, with guests that cannot be had here."""

from __future__ import annotations

import pytest

from qvis import GuestError
from qvis.guest.interrupts import parse

SNAPSHOT = """\
            CPU0       CPU2       CPU10
  9:           1          0          0   IO-APIC   9-fasteoi   acpi
 24:          10          0         33   PCI-MSIX-0000:00:01.0   1-edge      virtio0-req.0
 25:           0          0          0   PCI-MSIX-0000:00:01.0   0-edge      virtio0-config
 26:           0          5          0   IO-APIC  21-fasteoi   virtio1
 27:           0          0          7   MMIO-VIS-LNRO0005:00   1-edge      virtio2-req.0
NMI:           0          0          0   Non-maskable interrupts
ERR:           0
==
/proc/irq/24/smp_affinity_list:0,10
/proc/irq/24/effective_affinity_list:10
/proc/irq/26/smp_affinity_list:0-2,10
==
lrwxrwxrwx 1 root root 0 Jan  1 00:00 virtio0/driver -> ../../bus/virtio/drivers/virtio_blk
lrwxrwxrwx 1 root root 0 Jan  1 00:00 virtio1/driver -> ../../bus/virtio/drivers/virtio_net
==
0,2,10
"""


def test_offline_cpus_shift_no_counts() -> None:
    vectors, online = parse(SNAPSHOT)
    assert online == {0, 2, 10}
    assert [v.irq for v in vectors] == [24, 25, 26, 27]
    request, config, line, stored = vectors
    assert request.counts == {0: 10, 2: 0, 10: 33}
    assert (request.queue, request.source, request.driver) == (0, "req.0", "virtio_blk")
    assert (request.affinity, request.effective) == ({0, 10}, {10})
    assert request.chip == "PCI-MSIX-0000:00:01.0 1-edge"
    assert (config.queue, config.source) == (None, "config")
    assert (stored.queue, stored.chip) == (0, "MMIO-VIS-LNRO0005:00 1-edge")
    assert (line.source, line.driver, line.effective) == ("", "virtio_net", {0, 1, 2, 10})


@pytest.mark.parametrize("snapshot", ["", "==\n==\n==\n", SNAPSHOT.replace("0,2,10\n", "x\n"),
                                      SNAPSHOT.replace("==\n", "", 1)])  # fmt: skip
def test_what_cannot_be_read_is_said(snapshot: str) -> None:
    with pytest.raises(GuestError, match="cannot read the guest's interrupts"):
        parse(snapshot)
