# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparing transports: what they cost, measured side by side on one machine."""
