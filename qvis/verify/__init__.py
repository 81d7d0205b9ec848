# SPDX-License-Identifier: GPL-2.0-or-later
"""A check of the VIS protocol through all interleavings of bounded programs (docs/verify.md).

:mod:`.memory` is a memory that reorders and the search, :mod:`.protocol` the protocol as
programs, :mod:`.scenarios` what is run, :mod:`.check` runs it.
"""
