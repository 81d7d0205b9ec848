# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's interface by its own description: which commands there are and what they take.

``qmp-schema.json`` is made of a running QEMU by scripts/qmp_schema.py: the part of its
``query-qmp-schema`` that our commands and events reach, and the properties of the objects
that a machine consists of.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["UNCHECKED", "ErrorClass", "QmpError", "Schema", "load"]

FILE = Path(__file__).with_name("qmp-schema.json")

# The schema has one kind of integer; QEMU's C types are these (qapi/virtio.json).
UNSIGNED = {
    ("x-query-virtio-queue-status", "queue"): 16,
    ("x-query-virtio-vhost-queue-status", "queue"): 16,
    ("x-query-virtio-queue-element", "queue"): 16,
    ("x-query-virtio-queue-element", "index"): 16,
}
# What they take is up to the device that they make; they are given it as it comes.
UNCHECKED = {"device_add"}

# Ours, which QEMU does not have.
OWN: list[dict[str, Any]] = [
    {
        "name": "x-qvis-trace-start", "meta-type": "command", "features": ["unstable"],
        "arg-type": "q_obj-x-qvis-trace-start", "ret-type": "0",
    },
    {
        "name": "q_obj-x-qvis-trace-start", "meta-type": "object",
        "members": [{"name": "folder", "type": "str"}],
    },
    {
        "name": "x-qvis-trace-stop", "meta-type": "command", "features": ["unstable"],
        "arg-type": "0", "ret-type": "q_obj-x-qvis-trace",
    },
    {
        "name": "q_obj-x-qvis-trace", "meta-type": "object",
        "members": [
            {"name": "recorded", "type": "int"},
            {"name": "dropped", "type": "int"},
            {"name": "error", "type": "int"},
        ],
    },
]  # fmt: skip


class ErrorClass(StrEnum):
    """Classes that a client may look at (qapi/error.json)."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_ACTIVE = "DeviceNotActive"
    DEVICE_NOT_FOUND = "DeviceNotFound"


class QmpError(Exception):
    """A command that fails."""

    def __init__(self, words: str, kind: ErrorClass = ErrorClass.GENERIC) -> None:
        super().__init__(words)
        self.kind = kind


@dataclass(frozen=True)
class Property:
    """A property of an object: its name, QOM's type of it, and what it is when nobody set it."""

    name: str
    type: str
    value: Any


class Schema:
    """What ``qmp-schema.json`` says. The parts that a client is given must not be changed."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.entities: list[dict[str, Any]] = [*data["schema"], *OWN]
        self.qemu_commands = frozenset(data["commands"])
        """All that QEMU has, ours or not."""
        self.version: dict[str, int] = data["version"]
        self.types: list[dict[str, Any]] = data["types"]
        """As qom-list-types has them."""
        self._by_name = {entity["name"]: entity for entity in self.entities}
        self._parents = {entry["name"]: entry.get("parent") for entry in self.types}
        self._properties: dict[str, list[list[Any]]] = data["properties"]
        self.classes: dict[str, list[dict[str, Any]]] = data["classes"]
        """What a type has: property infos as of qom-list-properties."""
        self.devices: dict[str, list[dict[str, Any]]] = data["devices"]
        """What can be set of a device when it is made, as of device-list-properties."""

    def entity(self, name: str) -> dict[str, Any] | None:
        """A command, event or type."""
        return self._by_name.get(name)

    @functools.cache  # noqa: B019 # there is one schema a process
    def properties(self, type_name: str) -> tuple[Property, ...]:
        """The properties of an object of that type, in QEMU's order."""
        return tuple(Property(*fields) for fields in self._properties.get(type_name, ()))

    def is_a(self, type_name: str, ancestor: str) -> bool:
        """Whether a type is ``ancestor`` or descends from it."""
        at: str | None = type_name
        while at is not None and at != ancestor:
            at = self._parents.get(at)
        return at is not None

    def allows_oob(self, command: str) -> bool:
        return bool(self._by_name.get(command, {}).get("allow-oob"))

    def check(self, command: str, arguments: dict[str, Any]) -> None:
        """QmpError, in QEMU's words, if ``command`` does not take ``arguments``.

        As the visitors that QEMU generates do (qapi/qobject-input-visitor.c): members in
        their order, then what is too much.
        """
        self._object(command, self._by_name[command]["arg-type"], arguments, "")

    def _object(self, command: str, type_name: str, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            _wrong(path, "object")
        known = set()
        for member in self._by_name[type_name]["members"]:
            name = member["name"]
            known.add(name)
            where = f"{path}.{name}" if path else name
            if name not in value:
                if "default" not in member:
                    raise QmpError(f"Parameter '{where}' is missing")
                continue
            bits = UNSIGNED.get((command, name))
            if bits is not None:
                _unsigned(value[name], where, name, bits)
            else:
                self._value(command, member["type"], value[name], where, name)
        for name in value:
            if name not in known:
                where = f"{path}.{name}" if path else name
                raise QmpError(f"Parameter '{where}' is unexpected")

    def _value(self, command: str, type_name: str, value: Any, path: str, name: str) -> None:
        entity = self._by_name[type_name]
        match entity["meta-type"]:
            case "builtin":
                _builtin(entity["json-type"], value, path)
            case "enum":
                _builtin("string", value, path)
                if value not in {member["name"] for member in entity["members"]}:
                    raise QmpError(f"Parameter '{name}' does not accept value '{value}'")
            case "array":
                if not isinstance(value, list):
                    _wrong(path, "array")
                for index, item in enumerate(value):
                    # An element has no name, which QEMU prints like this.
                    self._value(command, entity["element-type"], item, f"{path}[{index}]", "null")
            case _:
                self._object(command, type_name, value, path)


@functools.cache
def load() -> Schema:
    """The schema that comes with the package."""
    return Schema(json.loads(FILE.read_text()))


def _wrong(path: str, expected: str) -> NoReturn:
    raise QmpError(f"Invalid parameter type for '{path}', expected: {expected}")


def _builtin(json_type: str, value: Any, path: str) -> None:
    match json_type:
        case "string" if not isinstance(value, str):
            _wrong(path, "string")
        case "boolean" if not isinstance(value, bool):
            _wrong(path, "boolean")
        case "int" if not isinstance(value, int) or isinstance(value, bool) or not value < 1 << 63:
            _wrong(path, "integer")
        case "number" if not isinstance(value, int | float) or isinstance(value, bool):
            _wrong(path, "number")
        case "null" if value is not None:
            _wrong(path, "null")


def _unsigned(value: Any, path: str, name: str, bits: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise QmpError(f"Parameter '{path}' expects uint64")
    # A negative number is taken as the unsigned one of its 64 bits.
    if (value & (1 << 64) - 1) >> bits:
        raise QmpError(f"Parameter '{name}' expects uint{bits}_t")
