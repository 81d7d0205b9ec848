# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands of the human monitor; those that only show something are in :mod:`.hmp_info`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import hmp_info  # noqa: F401 # its commands are known once it is imported
from .expression import ExpressionError, dump, show
from .hmp import COMMANDS, HmpError, Line, command, too_much
from .qjson import dumps

if TYPE_CHECKING:
    from ..machine import Machine

__all__: list[str] = []

NUMBER = re.compile(r"[0-9]{1,20}")


# What is done by QMP commands of the same name.


def _by_qmp(names: str, help: str, name: str) -> None:
    def run(line: Line) -> str:
        line.qmp(name)
        return ""

    command(names, "", help)(run)


_by_qmp("stop|s", "stop emulation", "stop")
_by_qmp("cont|c", "resume emulation", "cont")
_by_qmp("quit|q", "quit the emulator", "quit")
_by_qmp("system_reset", "reset the system", "system_reset")
_by_qmp("system_powerdown", "send system power down event", "system_powerdown")
_by_qmp("system_wakeup", "wakeup guest from suspend", "system_wakeup")
_by_qmp("nmi", "inject an NMI", "inject-nmi")


@command("device_add", "driver[,prop=value][,...]", "add device", most=None)
def _device_add(line: Line) -> str:
    driver, *settings = line.rest.split(",")
    arguments: dict[str, Any] = {"driver": driver} if driver else {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        number = NUMBER.fullmatch(value)
        arguments[key] = (int(value) if number else value) if equals else "on"
    line.qmp("device_add", **arguments)
    return ""


@command("device_del", "device", "remove device", most=1, what="string")
def _device_del(line: Line) -> str:
    line.qmp("device_del", id=line.rest)
    return ""


@command("qom-list", "path", "list QOM properties", most=1)
def _qom_list(line: Line) -> str:
    if not line.rest:
        return "/\n"
    listing = line.qmp("qom-list", path=line.rest)
    return "".join(f"{entry['name']} ({entry['type']})\n" for entry in listing)


@command("qom-get", "path property", "print QOM property", most=2, what="string")
def _qom_get(line: Line) -> str:
    words = line.rest.split()
    if len(words) < 2:
        raise HmpError("qom-get: string expected", line.name)
    return f"{dumps(line.qmp('qom-get', path=words[0], property=words[1]))}\n"


# Memory and numbers.


def _physical(machine: Machine) -> Callable[[int, int], bytes | None]:
    """Reads what is at guest-physical addresses, devices' registers too."""
    memory = machine.memory
    mapped = [(start, end) for _, _, space, start, end in machine.regions() if space == "memory"]

    def read(address: int, length: int) -> bytes | None:
        if memory.contains(address, length):
            return memory.read(address, length)
        if not any(start <= address and address + length <= end for start, end in mapped):
            return None
        place = machine.places.get(address >> 9) or machine.find(address)
        found = b""
        for at in range(address, address + length, 4):
            size = min(4, address + length - at)
            found += place.read(at - place.start, size).to_bytes(size, "little")
        return found

    return read


@command("xp", "/fmt addr", "physical memory dump starting at 'addr'", most=None, format=True)
def _xp(line: Line) -> str:
    return _dump(line, _physical(line.machine))


@command("x", "/fmt addr", "virtual memory dump starting at 'addr'", most=None, format=True)
def _x(line: Line) -> str:
    # The guest's kernel is a model and has no page tables.
    return _dump(line, lambda address, length: None)


def _dump(line: Line, read: Callable[[int, int], bytes | None]) -> str:
    form = line.call.answers.dump_format
    try:
        count = form.parse(line.options)
    except ExpressionError as problem:
        raise HmpError(str(problem), line.name) from problem
    address, more = line.number(line.rest)
    if more:
        raise too_much(COMMANDS[line.name], line.name)
    return dump(form, count, address, read)


@command("print|p", "/fmt expr", "print expression value", most=None, format=True)
def _print(line: Line) -> str:
    value, more = line.number(line.rest)
    if more:
        raise too_much(COMMANDS[line.name], line.name)
    return f"{show(value, line.options[-1:] or 'x')}\n"


@command("cpu", "index", "set the default CPU", most=1)
def _cpu(line: Line) -> str:
    index, _ = line.number(line.rest)
    if index >= len(line.machine.vcpus):
        return "invalid CPU index\n"
    # A monitor behind QMP lives as long as one command, and forgets.
    return ""
