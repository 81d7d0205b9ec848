# SPDX-License-Identifier: GPL-2.0-or-later
"""How much compiled code is there for which transport, component by component.

``footprint.toml`` says what belongs where; :func:`count` adds it up for the
objects that a program was really linked from, and says what contradicts it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from ..build.objects import GENERATED, Lines, ObjectFile, Objects, Sizes

__all__ = ["Code", "Component", "Part", "count", "lines_of", "matches", "table", "unclassified"]

TABLE = Path(__file__).with_name("footprint.toml")
PCI_OPTION = re.compile(r"CONFIG_(\w+_)?PCI(E|\b|_|EPORTBUS)")
PCI_SYMBOL = re.compile(r"(^|_)pci")  # also pcie_, pcim_, pcibios_


@dataclass(frozen=True)
class Component:
    """Sources that serve one end; ``over`` is pci, mmio, both or neither."""

    name: str
    over: str
    files: tuple[str, ...]  # patterns
    why: str


@dataclass(frozen=True)
class Part:
    """What is compiled of a component, or of several."""

    name: str
    over: str
    why: str
    files: int  # sources, also those that another includes
    lines: Lines
    released: Lines  # of the same files before our series
    released_files: int  # those of them that there were
    headers: int  # that nothing else in the program includes
    header_lines: Lines
    sizes: Sizes


@dataclass(frozen=True)
class Code:
    """A program's code: the components, their sums, and what to know beside them."""

    parts: tuple[Part, ...]
    pci: Part  # the sum of what is there for PCI
    mmio: Part  # the sum of what is there for virtio over MMIO
    whole: Part  # everything that is linked
    series_lines: Lines  # by which our series made what is compiled longer
    series_files: int  # sources and headers that it touches
    # PCI code inside files that are not PCI's: those that name PCI functions, and how many
    # functions of such names, of how many bytes of text, they have themselves.
    users: tuple[str, ...]
    functions: int
    function_bytes: int
    unclassified: tuple[str, ...]  # depend on PCI by their Makefile, but have no component


@cache
def table() -> dict[str, Any]:
    """``footprint.toml``."""
    return tomllib.loads(TABLE.read_text())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is true of a source or region."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def count(program: str, objects: Objects) -> Code:
    """The code of ``program`` ("linux" or "qemu"), which was linked from ``objects``."""
    components = [
        Component(one["name"], one["over"], tuple(one["files"]), one["why"])
        for one in table()[program]
    ]
    members: dict[str, list[ObjectFile]] = {component.name: [] for component in components}
    rest: list[ObjectFile] = []
    for one in objects.objects:
        home = next((c.name for c in components if matches(one.source, c.files)), None)
        members[home].append(one) if home else rest.append(one)

    def total(over: str) -> Part:
        inside = [one for c in components if c.over == over for one in members[c.name]]
        return _part(Component(f"all for {over}", over, (), ""), inside, objects)

    # Names that the build made up, such as those of trace events, are nobody's code.
    written = [one for one in rest if not one.source.startswith(GENERATED)]
    inside = [size for one in written for n, size in one.functions.items() if PCI_SYMBOL.search(n)]
    changed = [file for file in objects.files.values() if file.lines != file.released]
    return Code(
        parts=tuple(_part(c, members[c.name], objects) for c in components if members[c.name]),
        pci=total("pci"),
        mmio=total("mmio"),
        whole=_part(Component("everything", "", (), ""), objects.objects, objects),
        series_lines=sum((file.lines - file.released for file in changed), Lines()),
        series_files=len(changed),
        users=tuple(
            one.source
            for one in written
            if any(PCI_SYMBOL.search(name) for name in (*one.functions, *one.needs))
        ),
        functions=len(inside),
        function_bytes=sum(inside),
        unclassified=tuple(unclassified(rest)) if program == "linux" else (),
    )


def unclassified(rest: Iterable[ObjectFile]) -> list[str]:
    """Sources of objects without a component that the Makefiles build for PCI only."""
    known = {one["file"] for one in table()["linux-exception"]}
    return [
        one.source
        for one in rest
        if any(PCI_OPTION.match(option) for option in one.options) and one.source not in known
    ]


def lines_of(objects: Objects, patterns: Sequence[str]) -> Lines:
    """The lines of the linked sources that match."""
    names = {name for one in objects.objects for name in one.sources if matches(name, patterns)}
    return sum((objects.files[name].lines for name in names), Lines())


def _part(what: Component, members: Sequence[ObjectFile], objects: Objects) -> Part:
    files = objects.files
    sources = {source for one in members for source in one.sources}
    ours = {one.path for one in members}
    elsewhere = {header for o in objects.objects if o.path not in ours for header in o.headers}
    headers = {header for one in members for header in one.headers} - elsewhere
    return Part(
        name=what.name,
        over=what.over,
        why=what.why,
        files=len(sources),
        lines=sum((files[source].lines for source in sources), Lines()),
        released=sum((files[source].released for source in sources), Lines()),
        released_files=sum(files[source].released != Lines() for source in sources),
        headers=len(headers),
        header_lines=sum((files[header].lines for header in headers), Lines()),
        sizes=sum((one.sizes for one in members), Sizes()),
    )
