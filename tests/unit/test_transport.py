# SPDX-License-Identifier: GPL-2.0-or-later
"""What each transport makes of QEMU's options."""

from __future__ import annotations

import pytest

from qvis import Transport, UsageError
from qvis.transport import COMPARED

SETTINGS = {
    "pci": ["virtio-net-pci.romfile="],
    "intx": [],
    "msi": ["virtio-mmio.vectors=64"],
    "vis": ["virtio-mmio.vectors=64", "virtio-mmio.vis=on"],
    "vis-doorbell": [
        "virtio-mmio.vectors=64", "virtio-mmio.vis=on", "virtio-mmio.vis-cache-entries=on",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    assert Transport.parse(name).properties(4, at_once=False) == SETTINGS[name]


def test_there_are_no_others() -> None:
    assert list(Transport) == list(SETTINGS)
    with pytest.raises(UsageError, match="'isa': choose one of pci, intx, msi, vis, vis-doorbell"):
        Transport.parse("isa")


@pytest.mark.parametrize("transport", ["msi", "vis", "vis-doorbell"])
def test_vectors_for_every_queue_and_configuration(transport: str) -> None:
    assert Transport(transport).properties(200, at_once=False)[0] == "virtio-mmio.vectors=201"


@pytest.mark.parametrize("transport", Transport)
def test_devices_that_answer_at_once(transport: Transport) -> None:
    added = set(transport.properties(4, at_once=True)) - set(transport.properties(4, at_once=False))
    proxies = (
        ("virtio-blk-pci", "virtio-net-pci") if transport is Transport.PCI else ("virtio-mmio",)
    )
    assert added == {f"{proxy}.ioeventfd=off" for proxy in proxies}


def test_what_is_compared_needs_no_doorbell() -> None:
    assert COMPARED == ("pci", "intx", "msi", "vis")
