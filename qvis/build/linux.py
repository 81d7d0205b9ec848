# SPDX-License-Identifier: GPL-2.0-or-later
"""Building Linux for guests and for the inner host: tinyconfig and fragments.

The guest's are in ``guest-kernel/``; the inner host, which the nested backend runs
KVM in, has those and the ones in ``guest-kernel/host/`` on top.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import BuildError
from ..paths import guest_kernel_dir
from ..process import run
from ..progress import Step
from . import cache
from .objects import RECORD, linux_objects
from .recipe import Recipe, build, cpus, find, manifest
from .series import Patch
from .tree import Tree

__all__ = ["LinuxBuild", "Role"]

CONFIGURE_DEADLINE = 300.0  # seconds
BUILD_DEADLINE = 3600.0  # seconds
TARGETS = ("bzImage", "vmlinux")

# Nothing of the time, the host or our git tree gets into the image.
SETTINGS = (
    "KBUILD_BUILD_TIMESTAMP=1970-01-01",
    "KBUILD_BUILD_USER=qvis",
    "KBUILD_BUILD_HOST=qvis",
    "KBUILD_BUILD_VERSION=1",
    "LOCALVERSION=",
)


class Role(Enum):
    """What a kernel is for; each has a configuration and build folders of its own."""

    GUEST = ""
    HOST = "host"


# Lines that make prints for a whole build, until a first one was counted.
FIRST_GUESS = 1740


@dataclass(frozen=True)
class LinuxBuild:
    """A kernel that was built."""

    image: Path  # the bzImage
    vmlinux: Path  # with symbols; also what PVH starts
    config: Path
    version: str
    series: str  # a name for the patches that are in it
    key: str  # a name for everything that went into it

    @classmethod
    def make(cls, patches: Sequence[Patch], role: Role = Role.GUEST) -> LinuxBuild:
        """Linux with these patches, built if it never was."""
        return cls._of(build(_recipe(role), patches))

    @classmethod
    def find(cls, patches: Sequence[Patch], role: Role = Role.GUEST) -> LinuxBuild | None:
        """Linux with these patches, if it was ever built."""
        result = find(_recipe(role), patches)
        return cls._of(result) if result else None

    @classmethod
    def _of(cls, result: Path) -> LinuxBuild:
        facts = manifest(result)
        return cls(
            image=result / "bzImage",
            vmlinux=result / "vmlinux",
            config=result / "config",
            version=facts["version"],
            series=facts["series"],
            key=facts["key"],
        )


def _recipe(role: Role) -> Recipe:
    fragments = _fragments(role)
    return Recipe(
        component="linux",
        configuration="",
        inputs=(RECORD, *SETTINGS, *(fragment.read_text() for fragment in fragments)),
        compile=functools.partial(_compile, fragments),
        variant=role.value,
    )


def _fragments(role: Role) -> list[Path]:
    fragments = sorted(guest_kernel_dir().glob("*.config"))
    if role is Role.HOST:
        fragments += sorted((guest_kernel_dir() / "host").glob("*.config"))
    return fragments


def _compile(
    fragments: Sequence[Path], tree: Tree, folder: Path, result: Path, progress: Step
) -> None:
    log = cache.log_file("linux")
    make = ["make", "-C", str(tree.src), f"O={folder}", *SETTINGS]
    merge = ["scripts/kconfig/merge_config.sh", "-m", "-O", str(folder)]
    config = folder / ".config"
    for command in (
        [*make, "tinyconfig"],
        [*merge, *map(str, [config, *fragments])],
        [*make, "olddefconfig"],
    ):
        run(command, cwd=tree.src, stage="configure linux", log=log, deadline=CONFIGURE_DEADLINE)
    if refused := _refused(config.read_text(), fragments):
        raise BuildError(
            f"options that the kernel did not take (a dependency is missing): {', '.join(refused)}",
            stage="configure linux",
            log=log,
        )

    counted = folder.with_name(f"{folder.name}.lines")
    total = int(counted.read_text()) if counted.exists() else FIRST_GUESS
    done = 0

    def follow(line: str) -> None:
        nonlocal done
        if re.match(r"  [A-Z]+ +\S", line):
            done += 1
            progress.update(done, max(done, total))

    run(
        [*make, f"-j{cpus()}", *TARGETS],
        stage="build linux", log=log, deadline=BUILD_DEADLINE, on_line=follow,
    )  # fmt: skip
    if not counted.exists() or done > total:
        counted.write_text(str(done))
    shutil.copy(folder / "arch" / "x86" / "boot" / "bzImage", result)
    shutil.copy(folder / "vmlinux", result)
    shutil.copy(config, result / "config")
    linux_objects(folder, tree.src).save(result)


def _refused(config: str, fragments: Sequence[Path]) -> list[str]:
    """The lines of the fragments that are not true of the final configuration."""
    have = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", config, re.MULTILINE))
    want: dict[str, str | None] = {}
    for fragment in fragments:
        for line in fragment.read_text().splitlines():
            # A later fragment overrides an earlier one.
            if match := re.match(r"(CONFIG_\w+)=(.*)", line):
                want[match[1]] = match[2].strip()
            elif match := re.match(r"# (CONFIG_\w+) is not set$", line):
                want[match[1]] = None
    return [
        f"{name}={value}" if value is not None else f"{name} is not set"
        for name, value in want.items()
        if have.get(name) != value
    ]
