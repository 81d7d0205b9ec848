# SPDX-License-Identifier: GPL-2.0-or-later
"""Recording, reading and understanding what a guest did: one event model for all backends."""
