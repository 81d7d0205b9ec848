# SPDX-License-Identifier: GPL-2.0-or-later
"""The pytest plugin, used as another project's tests would use it."""

from __future__ import annotations

import pytest

from qvis.pytest_plugin import QvisMachine

REQUESTS = 100


def load(machine: QvisMachine) -> None:
    machine.ssh.run(f"qvis-load /dev/vda 1 {REQUESTS}")


@pytest.mark.qvis(backend="tcg", transport="msi", smp=2, queues=2)
def test_an_interrupt_over_msi_touches_no_register(qvis_machine: QvisMachine) -> None:
    with qvis_machine.recording() as recording:
        load(qvis_machine)
    recording.assert_no_exits(device="blk0", cause="interrupt status")
    recording.assert_no_exits(device="blk0", cause="acknowledge")
    recording.assert_no_exits(cause="mask")
    recording.assert_exits(REQUESTS, device="blk0", cause="notify")
    assert recording.interrupts(device="blk0", source="req.1") == REQUESTS


@pytest.mark.qvis(backend="tcg", transport="vis", smp=2, queues=2)
def test_masks_and_moves_over_vis_touch_no_register(qvis_machine: QvisMachine) -> None:
    with qvis_machine.recording() as recording:
        for vector in qvis_machine.irqs.vectors():
            if vector.driver == "virtio_blk":
                file = f"/sys/kernel/debug/irq/irqs/{vector.irq}"
                qvis_machine.ssh.run(f"echo mask > {file}; echo unmask > {file}")
                qvis_machine.irqs.set_affinity(vector.irq, [0])
        load(qvis_machine)
    recording.assert_exits(REQUESTS, device="blk0")
    recording.assert_exits(REQUESTS, device="blk0", cause="notify")
    assert recording.interrupts(device="blk0", source="req.1") == REQUESTS


@pytest.mark.qvis(backend="tcg", transport="intx", smp=2, queues=2)
def test_an_interrupt_over_the_line_touches_two(qvis_machine: QvisMachine) -> None:
    with qvis_machine.recording() as recording:
        load(qvis_machine)
    recording.assert_exits(REQUESTS, device="blk0", register="InterruptStatus")
    recording.assert_exits(REQUESTS, device="blk0", register="InterruptACK")
    with pytest.raises(pytest.fail.Exception, match=r"blk0\.InterruptACK write, acknowledge"):
        recording.assert_no_exits(device="blk0", cause="acknowledge")


@pytest.mark.qvis(backend="tcg", transport="msi", smp=2, queues=2)
def test_what_no_event_has_is_a_mistake(qvis_machine: QvisMachine) -> None:
    with qvis_machine.recording() as recording:
        qvis_machine.ssh.run("true")
    with pytest.raises(TypeError, match="no cause 'masking'"):
        recording.exits(cause="masking")
    with pytest.raises(TypeError, match="have no 'colour'"):
        recording.exits(colour="red")
