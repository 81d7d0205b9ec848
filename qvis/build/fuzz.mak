# SPDX-License-Identifier: GPL-2.0-or-later
#
# The devices of the QEMU that is fuzzed: the machine with virtio-mmio, and what
# goes on it. Each reset, one an input, resets all of them.
CONFIG_MICROVM=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
