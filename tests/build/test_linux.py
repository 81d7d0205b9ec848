# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's configuration is what was asked for."""

from __future__ import annotations

from pathlib import Path

from qvis.build.linux import _refused

CONFIG = """\
CONFIG_SMP=y
CONFIG_NR_CPUS=256
CONFIG_LOCALVERSION="-qvis"
# CONFIG_VT is not set
CONFIG_EXTRA=y
"""


def test_options_that_did_not_land_are_named(tmp_path: Path) -> None:
    fragment = tmp_path / "a.config"
    fragment.write_text(
        "# CONFIG_SMP is what we want\nCONFIG_SMP=y\nCONFIG_NR_CPUS=512\n"
        'CONFIG_LOCALVERSION="-qvis"\n# CONFIG_VT is not set\n# CONFIG_EXTRA is not set\n'
        "# CONFIG_ABSENT is not set\nCONFIG_MISSING=y\n"
    )
    assert _refused(CONFIG, [fragment]) == [
        "CONFIG_NR_CPUS=512",
        "CONFIG_EXTRA is not set",
        "CONFIG_MISSING=y",
    ]


def test_later_fragment_overrides(tmp_path: Path) -> None:
    first, second = tmp_path / "a.config", tmp_path / "b.config"
    first.write_text("CONFIG_NR_CPUS=8\n# CONFIG_SMP is not set\n")
    second.write_text("CONFIG_NR_CPUS=256\nCONFIG_SMP=y\n")
    assert _refused(CONFIG, [first, second]) == []
    assert len(_refused(CONFIG, [second, first])) == 2
