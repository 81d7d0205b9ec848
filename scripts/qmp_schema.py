# SPDX-License-Identifier: GPL-2.0-or-later
"""Make qvis/emulated/serve/qmp-schema.json of running QEMUs.

    python scripts/qmp_schema.py

boots one machine with virtio-mmio and one with PCI (TCG) and asks them: for the commands that
the emulated machine answers, for their types, and for the objects that machines consist of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import qvis
from qvis.emulated.serve.commands import COMMANDS
from qvis.emulated.serve.qapi import FILE

Query = Callable[..., Any]

EVENTS = ("STOP", "RESUME", "RESET", "POWERDOWN", "SHUTDOWN", "DEVICE_DELETED")
# Buses and parts that are the same in both machines are as in the first.
TRANSPORTS = ("msi", "pci")
# What these machines do not have, but can be given.
MORE = ("virtio-serial-device", "virtio-serial-pci", "virtio-pci-bus")
WITHOUT = {"realized": True, "hotplugged": True, "hotpluggable": True}
# What says where in its machine the one object is that was asked.
PLACES = ("unnamed-gpio", "sysbus-irq", "child[")
# What is of that machine alone; it is left empty.
OWN = {"kernel", "initrd", "append", "rtc-time", "date", "container", "addr"}
# Of a CPU its feature bits are left out, but for these.
CPU_TABLES = {"feature-words", "filtered-features"}
CPU_FLAGS = {"realized", "hotplugged", "hotpluggable", "x2apic", "start-powered-off"}


def main() -> int:
    """Ask, and write the file."""
    result: dict[str, Any] = {"properties": {}, "classes": {}, "devices": {}}
    for transport in TRANSPORTS:
        with qvis.up(backend="tcg", transport=transport, smp=2, queues=2) as machine:
            query = machine.qmp
            for path, listing in walk(query, "/"):
                add_object(query, result, path, listing)
            version = query("query-version")["qemu"]
            result["version"] = {part: version[part] for part in ("major", "minor", "micro")}
            result["commands"] = sorted(entry["name"] for entry in query("query-commands"))
            result["schema"] = list(reached(query("query-qmp-schema")))
            result["types"] = sorted(
                query("qom-list-types", abstract=True), key=lambda entry: str(entry["name"])
            )
            for kind in MORE:
                add_type(query, result, kind)
    FILE.write_text(text(result))
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, {len(result['schema'])} entities")
    return 0


def text(result: dict[str, Any]) -> str:
    """JSON with a line for each entry, so that a newer QEMU's is a readable change."""
    parts = []
    for name, part in sorted(result.items()):
        body = json.dumps(part, sort_keys=True)
        if name == "schema" or name == "types":
            body = "[\n" + ",\n".join(json.dumps(one, sort_keys=True) for one in part) + "\n]"
        elif name in ("properties", "classes", "devices"):
            lines = [
                f"{json.dumps(key)}: {json.dumps(one, sort_keys=True)}"
                for key, one in sorted(part.items())
            ]
            body = "{\n" + ",\n".join(lines) + "\n}"
        parts.append(f"{json.dumps(name)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def walk(query: Query, path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every object at and below ``path``: its path and what qom-list says of it."""
    listing = query("qom-list", path=path)
    yield path, listing
    for entry in listing:
        if entry["type"].startswith("child<"):
            yield from walk(query, f"{path.rstrip('/')}/{entry['name']}")


def add_object(
    query: Query, result: dict[str, Any], path: str, listing: list[dict[str, Any]]
) -> None:
    """What an object of a type is like: the first that is met stands for all."""
    kind = query("qom-get", path=path, property="type")
    if kind in result["properties"]:
        return
    cpu = kind.endswith("-cpu")
    result["properties"][kind] = [
        [entry["name"], entry["type"], value(query, path, entry["name"])]
        for entry in listing
        if not entry["type"].startswith("child<")
        and not entry["name"].startswith(PLACES)
        and not (cpu and entry["type"] == "bool" and entry["name"] not in CPU_FLAGS)
        and not (cpu and entry["name"] in CPU_TABLES)
    ]
    if not cpu:
        result["classes"][kind] = query("qom-list-properties", typename=kind)
        if any(entry["name"] == "realized" for entry in listing):
            result["devices"][kind] = device_properties(query, kind)


def add_type(query: Query, result: dict[str, Any], kind: str) -> None:
    """What an object of a type would be like if there were one."""
    if kind in result["properties"]:
        return
    result["classes"][kind] = query("qom-list-properties", typename=kind)
    result["devices"][kind] = device_properties(query, kind)
    result["properties"][kind] = [
        [entry["name"], entry["type"], entry.get("default-value", WITHOUT.get(entry["name"]))]
        for entry in result["classes"][kind]
    ]


def value(query: Query, path: str, name: str) -> Any:
    """A property's value; None for what cannot be read."""
    try:
        found = query("qom-get", path=path, property=name)
    except qvis.UsageError:
        return None
    return type(found)() if name in OWN else found


def device_properties(query: Query, kind: str) -> list[dict[str, Any]]:
    """What can be set of a device of that kind; nothing for one that users do not make."""
    try:
        found: list[dict[str, Any]] = query("device-list-properties", typename=kind)
    except qvis.UsageError:
        return []
    return found


def reached(schema: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entities that our commands and events lead to, in QEMU's order."""
    entities = {entity["name"]: entity for entity in schema}
    found: set[str] = set()
    # Types that only our own commands might name.
    todo = ["str", "int", "bool", "any", *EVENTS]
    todo += [name for name in COMMANDS if name in entities]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        entity = entities[name]
        todo += [entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity]
        for member in (*entity.get("members", ()), *entity.get("variants", ())):
            if isinstance(member, dict) and "type" in member:
                todo.append(member["type"])
    return (entity for entity in schema if entity["name"] in found)


if __name__ == "__main__":
    sys.exit(main())
