# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of a machine: start, boot, QMP, console, SSH, end, whatever runs it.

:mod:`.machine` is the way in. Nothing is imported here, so that the keeper,
which is of this package, starts with little.
"""
