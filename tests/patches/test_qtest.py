# SPDX-License-Identifier: GPL-2.0-or-later
"""The device's own tests, in QEMU's framework: every clause of what a driver is promised.

Which test is for which clause is in section 13 of docs/virtio-interrupts.md.
"""

from __future__ import annotations

import pytest

from qvis.build import qtest

# They build, where scripts/test has not done so before.
pytestmark = pytest.mark.timeout(3600)


@pytest.mark.parametrize("name", ["virtio-mmio-msi-test", "virtio-mmio-vis-test"])
def test_virtio_mmio(name: str) -> None:
    qtest(name)
