# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done inside a guest, over SSH: interrupts, their affinity, and load."""
