# SPDX-License-Identifier: GPL-2.0-or-later
"""Where qvis keeps things. Every other module asks here."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_dir", "guest_kernel_dir", "patches_dir", "state_dir"]

_PACKAGE = Path(__file__).resolve().parent


def cache_dir() -> Path:
    """Sources, trees and build results: can be deleted at any time.

    ``QVIS_CACHE`` or the platform's cache folder (XDG base directories).
    """
    return _root("QVIS_CACHE", platformdirs.user_cache_path("qvis"))


def state_dir() -> Path:
    """Running machines: keys, sockets, logs. Private to the user (mode 0700).

    ``QVIS_STATE`` or the platform's state folder (XDG base directories).
    """
    return _root("QVIS_STATE", platformdirs.user_state_path("qvis"), mode=0o700)


def patches_dir() -> Path:
    """The patch series; ``QVIS_PATCHES`` names another set than the one shipped."""
    return Path(os.environ["QVIS_PATCHES"]) if "QVIS_PATCHES" in os.environ else _data("patches")


def guest_kernel_dir() -> Path:
    """Kernel configuration, init and the load program that go into the guest."""
    return _data("guest-kernel")


def _root(variable: str, default: Path, mode: int = 0o755) -> Path:
    root = Path(os.environ.get(variable) or default).absolute()
    root.mkdir(mode=mode, parents=True, exist_ok=True)
    return root


def _data(name: str) -> Path:
    """A folder beside the package in a checkout, inside it in an installed wheel."""
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
