# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP's commands about objects and devices (QEMU's qapi/qom.json, qdev.json)."""

from __future__ import annotations

import re
from typing import Any

from ...errors import QvisError
from ...transport import Transport
from ..config import DeviceSpec
from .dispatch import Answers, Call, command
from .qapi import ErrorClass, QmpError, load
from .qom import CPU, PERIPHERAL, Node

__all__: list[str] = []

IDENTIFIER = re.compile(r"[A-Za-z][-._A-Za-z0-9]*")
KINDS = {"virtio-blk": "blk", "virtio-net": "net", "virtio-rng": "rng", "virtio-serial": "console"}
# The back ends may be named, but what is behind devices is always the same.
SETTABLE = {"num-queues", "drive", "netdev", "rng"}
BASE = {"type", "parent_bus", "realized", "hotplugged", "hotpluggable"}  # each device's own


@command("qom-list")
def _qom_list(call: Call, path: str) -> Any:
    if call.answers.tree.ambiguous(path):
        raise QmpError(f"Path '{path}' is ambiguous")
    node = call.answers.tree.resolve(path)
    return [{"name": entry.name, "type": entry.type} for entry in node.properties()]


@command("qom-get")
def _qom_get(call: Call, path: str, property: str) -> Any:
    node = call.answers.tree.resolve(path)
    entry = node.property(property)
    if entry.value is None:
        node = _owner(node, property)
        raise QmpError(f"Property '{node.type}.{property}' is not readable")
    return entry.value


def _owner(node: Node, property: str) -> Node:
    """Whose a property is: most of a PCI function's are those of the device in it."""
    inside = node.children.get("virtio-backend")
    if inside is None or property in BASE:
        return node
    return inside if any(e.name == property for e in inside.properties()) else node


@command("qom-list-get")
def _qom_list_get(call: Call, paths: list[str]) -> Any:
    def listed(path: str) -> Any:
        for entry in call.answers.tree.resolve(path).properties():
            value = {} if entry.value is None else {"value": entry.value}
            yield {"name": entry.name, "type": entry.type, **value}

    return [{"properties": list(listed(path))} for path in paths]


@command("qom-set")
def _qom_set(call: Call, path: str, property: str, value: Any) -> Any:
    node = call.answers.tree.resolve(path)
    entry = node.property(property)
    if property == "realized":
        if not isinstance(value, bool):
            raise QmpError("Invalid parameter type for 'realized', expected: boolean")
        if not value:
            raise QmpError("A device of an emulated machine goes by device_del")
        return {}
    node = _owner(node, property)
    settable = {one["name"] for one in load().devices.get(node.type, ())}
    if entry.name in settable:
        parent, _, name = node.path.rpartition("/")
        who = f"device '{name}'" if parent == PERIPHERAL else "anonymous device"
        raise QmpError(
            f"Attempt to set property '{property}' on {who} (type '{node.type}') "
            "after it was realized"
        )
    raise QmpError(f"Property '{node.type}.{property}' is not writable")


@command("qom-list-types")
def _qom_list_types(call: Call, implements: str | None = None, abstract: bool = False) -> Any:
    return [
        entry
        for entry in load().types
        if (abstract or not entry.get("abstract"))
        and (implements is None or load().is_a(entry["name"], implements))
    ]


@command("qom-list-properties")
def _qom_list_properties(call: Call, typename: str) -> Any:
    if not any(entry["name"] == typename for entry in load().types):
        raise QmpError(f"Class '{typename}' not found", ErrorClass.DEVICE_NOT_FOUND)
    known = load().classes.get(typename)
    if known is None:
        known = [{"name": e.name, "type": e.type} for e in load().properties(typename)]
    return known


@command("device-list-properties")
def _device_list_properties(call: Call, typename: str) -> Any:
    entry = next((one for one in load().types if one["name"] == typename), None)
    if entry is None:
        raise QmpError(f"Device '{typename}' not found", ErrorClass.DEVICE_NOT_FOUND)
    if typename not in load().devices:
        if typename == CPU:
            return _qom_list_properties(call, typename)
        raise QmpError("Parameter 'typename' expects a non-abstract device type")
    return load().devices[typename]


@command("device_add")
def _device_add(call: Call, arguments: dict[str, Any]) -> Any:
    options = dict(arguments)
    driver, id = options.pop("driver", None), options.pop("id", None)
    if not isinstance(driver, str):
        raise QmpError("Parameter 'driver' is missing")
    spec = _spec(call.answers, driver, id, options)
    try:
        call.machine.plug(spec)
    except (QvisError, OSError, ValueError) as problem:
        raise QmpError(str(problem)) from problem
    return {}


def _spec(answers: Answers, driver: str, identifier: Any, options: dict[str, Any]) -> DeviceSpec:
    """What a device_add asks for; QmpError in QEMU's words if that cannot be."""
    schema = load()
    if not schema.is_a(driver, "device"):
        raise QmpError(f"'{driver}' is not a valid device model name")
    if any(entry["name"] == driver and entry.get("abstract") for entry in schema.types):
        raise QmpError("Parameter 'driver' expects a non-abstract device type")
    kind, _, bus = driver.rpartition("-")
    pci = answers.machine.config.transport is Transport.PCI
    if kind not in KINDS or bus not in ("device", "pci"):
        raise QmpError(f"The emulated machine has no {driver}")
    if (bus == "pci") is not pci:
        wanted = "PCI" if bus == "pci" else "virtio-bus"
        raise QmpError(f"No '{wanted}' bus found for device '{driver}'")
    if not isinstance(identifier, str) or not IDENTIFIER.fullmatch(identifier):
        raise QmpError("Parameter 'id' expects an identifier")
    if identifier in answers.machine.devices:
        raise QmpError(f"Duplicate device ID '{identifier}'")
    known = {entry["name"] for entry in schema.devices[driver]}
    for option in options:
        if option == "bus":
            _check_bus(answers, options[option])
        elif option not in known:
            raise QmpError(f"Property '{driver}.{option}' not found")
        elif option not in SETTABLE:
            raise QmpError(f"The emulated machine does not set '{driver}.{option}'")
    queues = options.get("num-queues", 1)
    if not isinstance(queues, int) or isinstance(queues, bool):
        raise QmpError("Parameter 'num-queues' expects uint64")
    if queues <= 0:
        raise QmpError("num-queues property must be larger than 0")
    return DeviceSpec(KINDS[kind], identifier, queues)


def _check_bus(answers: Answers, name: Any) -> None:
    if not any(node.path.endswith(f"/{name}") for node in answers.tree.all()):
        raise QmpError(f"Bus '{name}' not found")
    if name != "pcie.0":
        raise QmpError("The emulated machine chooses the slot of a device itself")


@command("device_del")
def _device_del(call: Call, id: str) -> Any:
    name = id.removeprefix(f"{PERIPHERAL}/")
    if name not in call.machine.devices:
        if id.startswith("/") and "/" in id[1:]:
            call.answers.tree.resolve(id)
            raise QmpError(f"{id} is not a device")
        raise QmpError(f"Device '{id}' not found", ErrorClass.DEVICE_NOT_FOUND)
    try:
        call.machine.unplug(name)
    except (QvisError, OSError, ValueError) as problem:
        raise QmpError(str(problem)) from problem
    return {}
