# SPDX-License-Identifier: GPL-2.0-or-later
#
# The devices of our QEMU, and nothing else: each one left out is less to build.

# The machine under test: virtio-mmio, and no legacy hardware that would exit.
CONFIG_MICROVM=y
# The machine that everybody uses, for comparison, and the one that can be an
# inner host (its firmware starts anything).
CONFIG_Q35=y
# Not used, but QEMU 10.2 does not link without: q35's tables call into CXL, and
# there is one stub too few (our series adds it; the unpatched QEMU must build
# as well). CXL wants PXB, its memory device and, to start, PCIe ports.
CONFIG_CXL=y
CONFIG_CXL_MEM_DEVICE=y
CONFIG_PXB=y
CONFIG_PCIE_PORT=y

# Lets microvm have pcie=on, and with it the yardstick that is virtio-pci.
CONFIG_PCI_DEVICES=y
CONFIG_VIRTIO_PCI=y

# Queues that can be driven to any rate without leaving the host.
CONFIG_VIRTIO_BLK=y
# SSH.
CONFIG_VIRTIO_NET=y
# Entropy: a guest under TCG would wait for it to make its host keys.
CONFIG_VIRTIO_RNG=y
# A second way in, and the guest's exit status.
CONFIG_VIRTIO_SERIAL=y
# A device with control queues beside its request queues.
CONFIG_VIRTIO_SCSI=y
# Configuration-change interrupts on demand, through QMP.
CONFIG_VIRTIO_BALLOON=y
# What QEMU's own tests of translated code print to, and how they end.
CONFIG_ISA_DEBUG=y
# A port by which kvm-unit-tests pull lines of interrupt controllers.
CONFIG_ISA_TESTDEV=y
