# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of QMP that the emulated machine answers. Sources: QEMU's qapi/ and docs.

Where it differs from QEMU's microvm, of purpose: devices can be plugged and unplugged, at once;
a reset by system_reset starts the guest over unless set-action says otherwise; its guest has
no page tables, so that what needs them finds no memory; pmemsave saves no more than there is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..devices import Net

# Those two have commands too, which are known once they are imported.
from . import hmp_commands, inventory, objects  # noqa: F401
from .dispatch import COMMANDS, Call, command, constant, refusal
from .hmp import answer
from .hmp_info import interrupt_controllers
from .qapi import ErrorClass, QmpError, load
from .qom import CPU, NETDEV

__all__ = ["COMMANDS", "UNNEGOTIATED", "query_version"]

PACKAGE = "qvis emulated"
UNNEGOTIATED = "qmp_capabilities"
PIECE = 1 << 20  # bytes that are written to a file at a time


refusal(
    UNNEGOTIATED, "Capabilities negotiation is already complete, command ignored",
    ErrorClass.COMMAND_NOT_FOUND,
)  # fmt: skip
constant("query-uuid", {"UUID": "00000000-0000-0000-0000-000000000000"})
constant("query-kvm", {"enabled": False, "present": False})
constant("query-accelerators", {"enabled": "tcg", "present": ["tcg"]})
constant("query-target", {"arch": "x86_64"})
constant("query-current-machine", {"wakeup-suspend-support": False})
constant("query-replay", {"mode": "none", "icount": 0})
constant("query-migrate", {})
constant("query-dump", {"status": "none", "completed": 0, "total": 0})
for _name in (
    "query-iothreads", "query-memory-devices", "query-jobs", "query-block-jobs", "query-mice",
    "query-fdsets", "query-block-exports", "query-acpi-ospm-status", "query-pr-managers",
):  # fmt: skip
    constant(_name, [])
refusal("query-hotpluggable-cpus", "machine does not support hot-plugging CPUs")
refusal("system_wakeup", "wake-up from suspend is not supported by this guest")
refusal("getfd", "No file descriptor supplied via SCM_RIGHTS")
refusal("query-balloon", "No balloon device has been activated", ErrorClass.DEVICE_NOT_ACTIVE)


@command("query-status")
def _query_status(call: Call) -> Any:
    return {"status": str(call.machine.status), "running": call.answers.running()}


@command("query-version")
def query_version(call: Call | None = None) -> Any:
    return {"qemu": load().version, "package": PACKAGE}


@command("query-name")
def _query_name(call: Call) -> Any:
    return {"name": call.answers.name}


@command("query-commands")
def _query_commands(call: Call) -> Any:
    return [{"name": name} for name in COMMANDS]


@command("query-qmp-schema")
def _query_schema(call: Call) -> Any:
    return load().entities


@command("query-machines")
def _query_machines(call: Call, compat_props: bool = False) -> Any:
    return [
        {
            "name": "microvm", "cpu-max": 288, "hotpluggable-cpus": False, "is-default": True,
            "numa-mem-supported": False, "deprecated": False, "acpi": True,
            "default-cpu-type": "qemu64-x86_64-cpu", "default-ram-id": "microvm.ram",
        }
    ]  # fmt: skip


@command("query-cpus-fast")
def _query_cpus(call: Call) -> Any:
    return [
        {
            "cpu-index": vcpu.index, "qom-path": path, "thread-id": os.getpid(),
            "qom-type": CPU, "target": "x86_64",
            "props": {"core-id": vcpu.index, "thread-id": 0, "socket-id": 0},
        }
        for vcpu, path in zip(call.machine.vcpus, call.answers.tree.cpus, strict=True)
    ]  # fmt: skip


@command("query-memory-size-summary")
def _query_memory(call: Call) -> Any:
    return {"base-memory": call.machine.memory.size, "plugged-memory": 0}


@command("query-memdev")
def _query_memdev(call: Call) -> Any:
    return [
        {
            "id": "microvm.ram", "size": call.machine.memory.size, "merge": True, "dump": True,
            "prealloc": False, "share": False, "reserve": True, "host-nodes": [],
            "policy": "default",
        }
    ]  # fmt: skip


@command("query-block")
def _query_block(call: Call) -> Any:
    return inventory.blocks(call.machine)


@command("query-named-block-nodes")
def _query_nodes(call: Call, flat: bool = False) -> Any:
    return inventory.blocks(call.machine, nodes=True)


@command("query-blockstats")
def _query_blockstats(call: Call, query_nodes: bool = False) -> Any:
    return inventory.statistics(call.machine, nodes=query_nodes)


@command("query-chardev")
def _query_chardev(call: Call) -> Any:
    return [
        {"label": label, "filename": filename, "frontend-open": True}
        for label, filename in call.answers.chardevs().items()
    ]


@command("query-yank")
def _query_yank(call: Call) -> Any:
    return [{"type": "chardev", "id": label} for label in call.answers.chardevs()]


@command("query-pci")
def _query_pci(call: Call) -> Any:
    return inventory.pci_buses(call.machine)


@command("query-rx-filter")
def _query_rx_filter(call: Call, name: str | None = None) -> Any:
    cards = inventory.cards(call.machine)
    if name is not None and name not in cards:
        raise QmpError(f"invalid net client name: {name}")
    return [inventory.rx_filter(key, card) for key, card in cards.items() if name in (None, key)]


@command("x-query-interrupt-controllers")
def _query_controllers(call: Call) -> Any:
    return {"human-readable-text": interrupt_controllers(call.machine)}


@command("x-query-virtio")
def _query_virtio(call: Call) -> Any:
    return [
        {"path": call.answers.tree.backend(name), "name": attached.device.NAME}
        for name, attached in call.machine.devices.items()
    ]


@command("x-query-virtio-status")
def _virtio_status(call: Call, path: str) -> Any:
    attached = call.answers.attached(path, "realized VirtIODevice")
    return inventory.virtio_status(attached, running=call.answers.running())


@command("x-query-virtio-queue-status")
def _virtio_queue_status(call: Call, path: str, queue: int) -> Any:
    return inventory.queue_status(call.answers.attached(path), queue)


@command("x-query-virtio-queue-element")
def _virtio_queue_element(call: Call, path: str, queue: int, index: int | None = None) -> Any:
    attached = call.answers.attached(path, "VirtIO device")
    return inventory.queue_element(attached, queue, index)


@command("x-query-virtio-vhost-queue-status")
def _virtio_vhost_status(call: Call, path: str, queue: int) -> Any:
    call.answers.attached(path)
    raise QmpError("Error: vhost device has not started yet")


@command("stop")
def _stop(call: Call) -> Any:
    if call.answers.running():
        call.machine.stop()
    return {}


@command("cont")
def cont(call: Call) -> Any:
    if str(call.machine.status) == "shutdown":
        raise QmpError("Resetting the Virtual Machine is required")
    if not call.answers.running():
        call.machine.cont()
    return {}


@command("system_reset")
def _system_reset(call: Call) -> Any:
    call.later(call.answers.reset)
    return {}


@command("system_powerdown")
def _system_powerdown(call: Call) -> Any:
    call.machine.powerdown()
    return {}


@command("quit")
def _quit(call: Call) -> Any:
    call.later(lambda: call.machine.shutdown("host-qmp-quit"))
    return {}


@command("set_link")
def _set_link(call: Call, name: str, up: bool) -> Any:
    for id, attached in call.machine.devices.items():
        if isinstance(attached.device, Net) and name in (id, NETDEV):
            attached.device.set_link(up)
            return {}
    raise QmpError(f"Device '{name}' not found", ErrorClass.DEVICE_NOT_FOUND)


@command("set-action")
def _set_action(call: Call, **actions: str) -> Any:
    call.answers.actions |= actions
    return {}


@command("inject-nmi")
def _inject_nmi(call: Call) -> Any:
    for vcpu in call.machine.vcpus:
        vcpu.apic.lint(1, True)
        vcpu.apic.lint(1, False)
    return {}


@command("closefd")
def _closefd(call: Call, fdname: str) -> Any:
    raise QmpError(f"File descriptor named '{fdname}' not found")


@command("memsave")
def _memsave(call: Call, val: int, size: int, filename: str, cpu_index: int = 0) -> Any:
    if not 0 <= cpu_index < len(call.machine.vcpus):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    # The guest's kernel is a model and has no page tables.
    raise QmpError(f"Invalid addr {val & (1 << 64) - 1:#018x}/size {size} specified")


@command("pmemsave")
def _pmemsave(call: Call, val: int, size: int, filename: str) -> Any:
    memory = call.machine.memory
    if size < 0 or size > memory.size:
        # QEMU would go on until the disk is full.
        raise QmpError(f"Parameter 'size' expects at most the {memory.size} bytes that there are")
    try:
        with Path(filename).open("wb") as file:
            for at in range(val, val + size, PIECE):
                length = min(PIECE, val + size - at)
                inside = min(length, memory.size - at) if 0 <= at < memory.size else 0
                file.write(memory.read(at, inside) + bytes(length - inside))
    except (OSError, ValueError) as problem:
        reason = os.strerror(getattr(problem, "errno", None) or 22)
        raise QmpError(f"Could not open '{filename}': {reason}") from problem
    return {}


@command("human-monitor-command")
def _human(call: Call, command_line: str, cpu_index: int | None = None) -> Any:
    cpu = cpu_index or 0
    if not 0 <= cpu < len(call.machine.vcpus):
        raise QmpError("Parameter 'cpu-index' expects a CPU number")
    return answer(call, command_line, cpu)


@command("x-qvis-trace-start")
def _trace_start(call: Call, folder: str) -> Any:
    call.answers.recording.start(call.connection, folder)
    return {}


@command("x-qvis-trace-stop")
def _trace_stop(call: Call) -> Any:
    return call.answers.recording.stop(call.connection)
