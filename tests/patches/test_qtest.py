# SPDX-License-Identifier: GPL-2.0-or-later
"""The device's own tests, in QEMU's framework: every clause of docs/virtio-interrupts.md."""

from __future__ import annotations

import pytest

from qvis.build import qtest

# They build, where scripts/test has not done so before.
pytestmark = pytest.mark.timeout(3600)


def test_virtio_mmio_msi() -> None:
    qtest("virtio-mmio-msi-test")
