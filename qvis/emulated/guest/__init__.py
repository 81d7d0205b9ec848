# SPDX-License-Identifier: GPL-2.0-or-later
"""A model of the guest: what Linux's drivers do to devices, its files, and a shell."""
