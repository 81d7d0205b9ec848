# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated machine's sockets: QMP, SSH and the serial console."""
