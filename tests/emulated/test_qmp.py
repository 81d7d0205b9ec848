# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated machine's monitors: protocol, commands, events, and what hostile clients get."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import random
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qemu.qmp import ExecuteError, QMPClient

from qvis.emulated.serve import qjson
from qvis.emulated.serve.commands import COMMANDS
from qvis.emulated.serve.qapi import UNCHECKED, QmpError, load
from qvis.emulated.serve.qjson import JsonError, JsonStream, dumps
from qvis.emulated.vcpu import Vcpu
from qvis.transport import Transport
from tests.emulated.qmp_fakes import Client, Served, serve

MIB = 1 << 20
QUEUE, NODES = "x-query-virtio-queue-status", "query-named-block-nodes"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.sockets[0]) as found:
        yield found


# JSON


def is_character(one: str) -> bool:
    return ord(one) & 0xFFFE != 0xFFFE and not 0xFDD0 <= ord(one) <= 0xFDEF


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]).filter(is_character)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc'\"\\{}[]\n"), inner),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=4), st.integers(1, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_json_is_read_however_it_is_cut(values: list[Any], step: int, ascii_only: bool) -> None:
    data = b"\n".join(json.dumps(one, ensure_ascii=ascii_only).encode() for one in values) + b" "
    stream = JsonStream()
    found: list[Any] = []
    for at in range(0, len(data), step):
        found += stream.feed(data[at : at + step])
    assert found == values


@given(st.binary(max_size=200) | st.text(r"{}[],:'\"\\0123456789.eE+-truefalsn \n").map(str.encode))
@settings(max_examples=150, deadline=None)
def test_no_bytes_are_an_exception_and_all_cuts_give_the_same(data: bytes) -> None:
    def read(step: int) -> list[Any]:
        stream = JsonStream()
        found: list[Any] = []
        for at in range(0, len(data), step):
            found += stream.feed(data[at : at + step])
        return [str(one) if isinstance(one, JsonError) else one for one in found]

    assert read(1) == read(len(data) or 1)


@given(st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_a_client_can_start_over_after_anything(data: bytes) -> None:
    found = list(JsonStream().feed(data + b'\xff{"execute":"stop"}'))
    assert found[-1] == {"execute": "stop"}


def test_a_message_of_too_many_tokens_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qjson, "MAX_TOKEN_COUNT", 1000)
    assert list(JsonStream().feed(b"[" + b"1," * 498 + b"1]")) == [[1] * 499]
    found = list(JsonStream().feed(b"[" + b"1," * 500 + b"1]"))
    assert str(found[0]) == "JSON token count limit exceeded"


def test_an_id_as_deep_as_may_be_comes_back() -> None:
    (deep,) = JsonStream().feed(b"[" * 1024 + b"]" * 1024)
    assert dumps(deep) == "[" * 1024 + "]" * 1024


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"tru ", "invalid keyword 'tru'"),
        (b"01", "stray '01'"),
        (b"#", "stray '#'"),
        (b"{]", "expecting value"),
        (b"[1,]", "expecting value"),
        (b"[1 2]", "expected separator in list"),
        (b'{"a":1 "b":2}', "expected separator in dict"),
        (b'{"a" 1}', "missing : in object pair"),
        (b"{1:1}", "key is not a string in object"),
        (b'{"a":1,"a":1}', "duplicate key"),
        (rb'"\q"', "invalid escape sequence in string"),
        (rb'"\ud800"', r"\ud800 is not a valid Unicode character"),
        (b'"\xc3("', "invalid UTF-8 sequence in string"),
    ],
)
def test_what_is_no_json_is_told_as_qemu_tells_it(data: bytes, words: str) -> None:
    (found,) = JsonStream().feed(data)
    assert str(found) == f"JSON parse error, {words}"


# The schema


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("qom-get", {"path": "/"}, "Parameter 'property' is missing"),
        ("qom-get", {"path": 5}, "Invalid parameter type for 'path', expected: string"),
        ("query-status", {"x": 1}, "Parameter 'x' is unexpected"),
        (NODES, {"flat": 1}, "Invalid parameter type for 'flat', expected: boolean"),
        ("qom-list-get", {"paths": {}}, "Invalid parameter type for 'paths', expected: array"),
        ("qom-list-get", {"paths": [1]}, "Invalid parameter type for 'paths[0]', expected: string"),
        ("set-action", {"reboot": "x"}, "Parameter 'reboot' does not accept value 'x'"),
        ("pmemsave", {"val": True}, "Invalid parameter type for 'val', expected: integer"),
        ("pmemsave", {"val": 1 << 63}, "Invalid parameter type for 'val', expected: integer"),
        (QUEUE, {"path": "", "queue": "0"}, "Parameter 'queue' expects uint64"),
        (QUEUE, {"path": "", "queue": -1}, "Parameter 'queue' expects uint16_t"),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_it(command: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(QmpError) as caught:
        load().check(command, arguments)
    assert str(caught.value) == words


def test_the_schema_leads_nowhere_that_it_does_not_tell_of() -> None:
    names = {entity["name"] for entity in load().entities}
    for entity in load().entities:
        reached = [entity[key] for key in ("arg-type", "ret-type", "element-type") if key in entity]
        for member in (*entity.get("members", ()), *entity.get("variants", ())):
            if isinstance(member, dict) and "type" in member:
                reached.append(member["type"])
        assert set(reached) <= names, entity["name"]


def test_commands_are_those_of_the_schema_with_its_arguments() -> None:
    commands = {one["name"]: one for one in load().entities if one["meta-type"] == "command"}
    assert commands.keys() == COMMANDS.keys()
    for name, function in COMMANDS.items():
        arguments = load().entity(commands[name]["arg-type"])
        assert arguments is not None
        parameters = inspect.signature(function).parameters
        if name in UNCHECKED or any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            continue
        taken = {key: one.default is one.empty for key, one in list(parameters.items())[1:]}
        for member in arguments["members"]:
            needed = taken.pop(member["name"].replace("-", "_"))
            assert not needed or "default" not in member, (name, member)
        assert not taken, name


# The protocol


def test_a_client_is_greeted_and_has_to_negotiate(served: Served) -> None:
    with Client(served.sockets[0], negotiate=False) as client:
        assert client.greeting["QMP"]["capabilities"] == ["oob"]
        assert client.greeting["QMP"]["version"]["package"] == "qvis emulated"
        assert client.error("query-status")[0] == "CommandNotFound"
        assert client.request("qmp_capabilities") == {"return": {}}
        assert client("query-status") == {"status": "running", "running": True}
        assert client.error("qmp_capabilities")[0] == "CommandNotFound"


def test_requests_are_a_stream_without_lines(client: Client) -> None:
    request = b'{"execute":"query-name","id":1}{"execute":\n\n"query-name","id":2} {"id":3'
    for byte in request + b',"execute":"query-name"}':
        client.send(bytes([byte]))
    for number in (1, 2, 3):
        assert client.answer() == {"return": {"name": "qvis-fake"}, "id": number}


def test_ten_thousand_commands_in_a_row_are_answered_in_order(client: Client) -> None:
    count = 10_000
    numbers = iter(range(count))
    waiting = 0
    for start in range(0, count, 500):
        client.send(
            b"".join(
                b'{"execute":"%s","id":%d}' % ((b"query-name", b"nope")[n % 7 == 0], n)
                for n in range(start, start + 500)
            )
        )
        waiting += 500
        while waiting > 250:
            number = next(numbers)
            answer = client.answer()
            assert answer["id"] == number
            assert ("error" in answer) == (number % 7 == 0)
            waiting -= 1
    assert client("query-name")


def test_out_of_band_commands_are_those_that_may_be(served: Served) -> None:
    with Client(served.sockets[0], oob=True) as client:
        client.send('{"exec-oob": "query-yank", "id": 1}')
        assert client.answer()["id"] == 1
        client.send('{"exec-oob": "query-status"}')
        desc = client.answer()["error"]["desc"]
        assert desc == "The command query-status does not support OOB"
        client.send('{"exec-oob": "nope"}')
        assert client.answer()["error"]["class"] == "CommandNotFound"
    with Client(served.sockets[0]) as client:
        client.send('{"exec-oob": "query-yank"}')
        assert client.answer()["error"]["desc"] == "QMP input member 'exec-oob' is unexpected"


def test_what_only_qemu_has_is_told_from_what_nobody_has(client: Client) -> None:
    kind, words = client.error("migrate", uri="exec:true")
    assert (kind, words) == (
        "GenericError", "The emulated machine does not have the command migrate",
    )  # fmt: skip
    assert client.error("no-such") == (
        "CommandNotFound", "The command no-such has not been found",
    )  # fmt: skip
    listed = {one["name"] for one in client("query-commands")}
    assert "migrate" not in listed and {"stop", "x-qvis-trace-start"} <= listed
    described = {one["name"] for one in client("query-qmp-schema") if one["meta-type"] == "command"}
    assert described == listed


def test_a_monitor_serves_one_client_and_then_the_next(served: Served) -> None:
    with Client(served.sockets[0]) as first, socket.socket(socket.AF_UNIX) as second:
        second.settimeout(0.2)
        second.connect(str(served.sockets[0]))
        with pytest.raises(TimeoutError):
            second.recv(1)
        assert first("query-name")
        first.close()
        second.settimeout(10)
        assert b'"QMP"' in second.recv(1000)


# What the machine does


def test_events_reach_everybody_who_has_negotiated(served: Served) -> None:
    with (
        Client(served.sockets[0]) as first,
        Client(served.sockets[1], negotiate=False) as second,
    ):
        before = int(time.time()) - 1
        first("stop")
        second.request("qmp_capabilities")
        first("cont")
        stopped, resumed = first.event("STOP"), first.event("RESUME")
        assert stopped.keys() == {"timestamp", "event"}
        assert before <= stopped["timestamp"]["seconds"] <= time.time() + 1
        assert 0 <= stopped["timestamp"]["microseconds"] < 1_000_000
        assert second.event("RESUME") == resumed
        assert second.events == []  # it had not negotiated when the machine stopped


def test_a_machine_is_stopped_before_the_command_returns(client: Client) -> None:
    client.send('{"execute":"stop"}{"execute":"stop"}{"execute":"query-status"}')
    assert client.read()["event"] == "STOP"
    assert client.read() == {"return": {}}
    assert client.read() == {"return": {}}  # it was stopped already: no event
    assert client.read()["return"] == {"status": "paused", "running": False}
    assert client.request("cont") == {"return": {}}


def test_an_nmi_reaches_every_processor_that_lets_it(served: Served, client: Client) -> None:
    class Guest:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def nmi(self, vcpu: Vcpu) -> None:
            self.seen.append(vcpu.index)

    guest = Guest()

    def prepare() -> None:
        served.machine.guest = guest  # type: ignore[assignment] # this is all that is used
        lint1 = 0x360
        for vcpu in served.machine.vcpus:
            vcpu.apic.write(0xF0, 0x1FF)
        served.machine.vcpus[1].apic.write(lint1, 0x400)

    served.do(prepare)
    assert client("inject-nmi") == {}
    assert guest.seen == [1]


def test_power_button_and_reset_are_events(client: Client) -> None:
    assert client("system_powerdown") == {}
    assert client.event("POWERDOWN")
    assert client("system_reset") == {}
    reset = client.event("RESET")
    assert reset["data"] == {"guest": False, "reason": "host-qmp-system-reset"}


def test_a_reset_may_be_made_an_end(served: Served, client: Client) -> None:
    client("set-action", reboot="shutdown")
    client("system_reset")
    end = client.event("SHUTDOWN")
    assert end["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
    assert client("query-status") == {"status": "shutdown", "running": False}
    assert client.error("cont")[1] == "Resetting the Virtual Machine is required"


def test_quit_is_answered_before_the_machine_ends(served: Served, client: Client) -> None:
    client.send('{"execute":"quit","id":"q"}')
    assert client.read() == {"return": {}, "id": "q"}
    assert client.read()["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert served.machine.status == "shutdown"


@pytest.mark.parametrize("transport", [Transport.VIS, Transport.PCI])
def test_devices_come_and_go(tmp_path: Path, transport: Transport) -> None:
    suffix = "pci" if transport is Transport.PCI else "device"
    with serve(tmp_path, transport) as served, Client(served.sockets[0]) as client:
        driver = f"virtio-blk-{suffix}"
        client("device_add", driver=driver, id="blk9", **{"num-queues": 3})
        path = "/machine/peripheral/blk9"
        assert client("qom-get", path=path, property="num-queues") == 3
        assert len(client("query-block")) == 2
        assert client.error("device_add", driver=driver, id="blk9") == (
            "GenericError", "Duplicate device ID 'blk9'",
        )  # fmt: skip
        client("device_del", id="blk9")
        assert client.event("DEVICE_DELETED")["data"] == {"device": "blk9", "path": path}
        assert client.error("qom-list", path=path)[0] == "DeviceNotFound"
        for kind in ("net", "rng", "serial"):
            client("device_add", driver=f"virtio-{kind}-{suffix}", id=f"more-{kind}")
        assert len(client("x-query-virtio")) == 6
        client("device_del", id="/machine/peripheral/more-net")
        assert len(client("x-query-virtio")) == 5
        other = "device" if transport is Transport.PCI else "pci"
        assert "bus found" in client.error("device_add", driver=f"virtio-rng-{other}", id="x")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"id": "a b"}, "Parameter 'id' expects an identifier"),
        ({"id": 5}, "Parameter 'id' expects an identifier"),
        ({}, "Parameter 'id' expects an identifier"),
        ({"id": "a", "no-pe": 1}, "Property 'virtio-blk-device.no-pe' not found"),
        (
            {"id": "a", "serial": "x"},
            "The emulated machine does not set 'virtio-blk-device.serial'",
        ),
        ({"id": "a", "bus": "nope"}, "Bus 'nope' not found"),
        ({"id": "a", "num-queues": 0}, "num-queues property must be larger than 0"),
        ({"id": "a", "num-queues": "3"}, "Parameter 'num-queues' expects uint64"),
        ({"id": "a", "num-queues": True}, "Parameter 'num-queues' expects uint64"),
    ],
)
def test_devices_that_cannot_be_are_refused(
    client: Client, arguments: dict[str, Any], words: str
) -> None:
    assert client.error("device_add", driver="virtio-blk-device", **arguments)[1] == words
    many = {"num-queues": 1 << 40}
    kind, _ = client.error("device_add", driver="virtio-blk-device", id="a", **many)
    assert kind == "GenericError"


def test_memory_is_saved_as_it_is(served: Served, client: Client, tmp_path: Path) -> None:
    served.machine.memory.write(0x1000, b"qvis")
    file = tmp_path / "memory"
    client("pmemsave", val=0xFFE, size=8, filename=str(file))
    assert file.read_bytes() == b"\0\0qvis\0\0"
    end = served.machine.memory.size
    served.machine.memory.write(end - 2, b"is")
    client("pmemsave", val=end - 2, size=4, filename=str(file))
    assert file.read_bytes() == b"is\0\0"
    size = served.machine.memory.size + 1
    assert "size" in client.error("pmemsave", val=0, size=size, filename=str(file))[1]
    assert client.error("pmemsave", val=0, size=-1, filename=str(file))[0] == "GenericError"
    assert "Could not open" in client.error("pmemsave", val=0, size=1, filename="a\0b")[1]


def test_a_trace_belongs_to_its_connection(served: Served, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    with Client(served.sockets[0]) as owner, Client(served.sockets[1]) as other:
        assert "Could not open" in owner.error("x-qvis-trace-start", folder=str(raw / "no"))[1]
        owner("x-qvis-trace-start", folder=str(raw))
        assert "already" in other.error("x-qvis-trace-start", folder=str(raw))[1]
        assert "No trace" in other.error("x-qvis-trace-stop")[1]
        assert owner("x-qvis-trace-stop").keys() == {"recorded", "dropped", "error"}
        assert "No trace" in owner.error("x-qvis-trace-stop")[1]
        owner("x-qvis-trace-start", folder=str(raw))
    with Client(served.sockets[0]) as later:
        assert served.machine.recorder is None
        later("x-qvis-trace-start", folder=str(raw))


# Clients of others


def test_the_client_of_qemus_own_package_talks_to_it(served: Served) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(str(served.sockets[0]))
        assert await client.execute("query-status") == {"status": "running", "running": True}
        with pytest.raises(ExecuteError, match="has not been found"):
            await client.execute("no-such-command")
        await client.execute("stop")
        assert (await asyncio.wait_for(client.events.get(), 10))["event"] == "STOP"
        many = await asyncio.gather(*(client.execute("query-name") for _ in range(200)))
        assert many == [{"name": "qvis-fake"}] * 200
        await client.disconnect()

    asyncio.run(talk())


def test_qmp_shell_talks_to_it(served: Served) -> None:
    path = str(served.sockets[0])
    shell = pexpect.spawn(
        sys.executable, ["-m", "qemu.qmp.qmp_shell", path],
        encoding="utf-8", timeout=20, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    shell.expect_exact("Connected to QEMU 10.2.2")
    shell.expect_exact("(QEMU) ")
    for line, answer in (
        ("query-status", '"status": "running"'),
        ("qom-get path=/machine/peripheral/blk0 property=num-queues", '"return": 2'),
        ("nope", "CommandNotFound"),
        ("human-monitor-command command-line=help", "device_add"),
    ):
        shell.sendline(line)
        shell.expect_exact(answer)
        shell.expect_exact("(QEMU) ")
    shell.sendeof()
    shell.expect(pexpect.EOF)


# Hostile clients


def test_a_line_of_a_hundred_megabytes_is_no_use_to_anybody(served: Served) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Client(served.sockets[0]) as client, Client(served.sockets[1]) as other:
        client.send('{"execute":"')
        for _ in range(100):
            client.send(b"a" * MIB)
        assert client.answer()["error"]["desc"] == "JSON token size limit exceeded"
        assert other("query-status")["running"]
        client.send('"}\n\xff')
        while "keyword" not in client.answer()["error"]["desc"]:
            pass
        client.send('\xff {"execute":"query-name","id":"end"}')
        while client.answer().get("id") != "end":
            pass
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024  # KiB: the limit of a token, a few times over


def test_junk_is_answered_and_does_no_harm(served: Served) -> None:
    junk = bytes(range(256)) * 64
    with Client(served.sockets[0]) as client:
        client.send(junk + b'\xff{"execute":"query-name","id":"end"}')
        while (answer := client.answer()).get("id") != "end":
            assert answer["error"]["class"] == "GenericError"
        assert answer["return"] == {"name": "qvis-fake"}


@pytest.mark.parametrize(
    "sent", [b"", b'{"execute":"query-na', b'{"execute":"query-qmp-schema"}' * 50]
)
def test_a_client_may_go_in_the_middle(served: Served, sent: bytes) -> None:
    for _ in range(5):
        client = Client(served.sockets[0])
        client.send(sent)
        client.close()
    with Client(served.sockets[0]) as client:
        assert client("query-status")["running"]


def test_a_thousand_connections_to_one_socket_leave_the_machine_running(served: Served) -> None:
    crowd = []
    for _ in range(1000):
        one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # As with QEMU, whose sockets let two wait: all others are to try again.
        one.connect_ex(str(served.sockets[0]))
        crowd.append(one)
    with Client(served.sockets[1]) as client:
        assert client("query-status")["running"]
    for one in crowd:
        one.close()
    with Client(served.sockets[0]) as client:
        assert client("query-status")["running"]


def test_who_does_not_read_is_not_answered_without_end(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as deaf, Client(served.sockets[1]) as client:
        deaf.settimeout(0.5)
        deaf.connect(str(served.sockets[0]))
        deaf.sendall(b'{"execute":"qmp_capabilities"}')
        with pytest.raises(TimeoutError):
            while True:
                deaf.sendall(b'{"execute":"query-qmp-schema"}' * 1000)
        # Events do not pile up for it either.
        connection = served.server._monitors["qmp0"].connection
        assert connection is not None
        for _ in range(300):
            client("stop")
            client("cont")
        unread = served.do(connection._writer.transport.get_write_buffer_size)
        assert unread < 2 * MIB
        assert client("query-status")["running"]


NASTY: dict[str, list[Any]] = {
    "str": ["", "/machine", "blk0", "/machine/peripheral/blk0", "\0", "é²", "a" * 300, "%s",
            "virtio-blk-device", "virtio-net-pci", "max-x86_64-cpu", "type", "realized"],
    "int": [0, 1, -1, 99, 1 << 32, (1 << 63) - 1, -(1 << 63), 65535, 65536],
    "bool": [True, False],
    "any": [None, {}, []],
}  # fmt: skip


@pytest.mark.parametrize("transport", [Transport.VIS_DOORBELL, Transport.PCI])
def test_no_arguments_are_a_fault_of_ours(tmp_path: Path, transport: Transport) -> None:
    dice = random.Random(1)
    everything = [value for values in NASTY.values() for value in values]
    names = sorted(COMMANDS.keys() - {"quit", "pmemsave", "memsave", "system_reset"})
    with serve(tmp_path, transport) as served, Client(served.sockets[0]) as client:
        for name in dice.choices(names, k=800):
            entity = load().entity(name)
            assert entity is not None
            arguments = load().entity(entity["arg-type"])
            assert arguments is not None
            given = {
                member["name"]: dice.choice(
                    NASTY.get(member["type"], everything) if dice.random() < 0.9 else everything
                )
                for member in arguments["members"]
                if "default" not in member or dice.random() < 0.7
            }
            answer = client.request(name, **given)
            assert "Internal error" not in str(answer), (name, given)
        assert client("query-name")
