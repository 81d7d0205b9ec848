# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages to look at: one trace, or transports compared. Each is one file that needs no network."""
