# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated machine's human monitor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from qvis.emulated.serve.expression import DumpFormat, ExpressionError, dump, evaluate, show
from qvis.machine.follow import FORWARD
from qvis.trace.devices import ROW, regions
from qvis.transport import Transport
from tests.emulated.qmp_fakes import SSH_PORT, Client, Served, serve


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, smp=3) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.sockets[0]) as found:
        yield found


def test_the_port_of_ssh_is_where_qvis_looks_for_it(client: Client) -> None:
    found = FORWARD.search(client.monitor("info usernet"))
    assert found and int(found[1]) == SSH_PORT


def test_lines_end_as_on_a_terminal(client: Client) -> None:
    text = client("human-monitor-command", **{"command-line": "info cpus"})
    assert text.count("\r\n") == text.count("\n") == 3


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("info status", "VM status: running\n"),
        ("info name", "qvis-fake\n"),
        ("info version", "10.2.2qvis emulated\n"),
        ("stop", ""),
        ("foo", "unknown command: 'foo'\n"),
        ("info foo", "unknown command: 'info foo'\n"),
    ],
)
def test_a_line_has_its_answer(client: Client, line: str, expected: str) -> None:
    assert client.monitor(line) == expected


def test_commands_do_what_those_of_qmp_do(served: Served, client: Client) -> None:
    client.monitor("stop")
    assert client.event("STOP") and served.machine.status == "paused"
    assert client.monitor("info status") == "VM status: paused\n"
    client.monitor("c")
    assert client.event("RESUME")
    client.monitor("device_add virtio-blk-device,id=more,num-queues=3")
    assert "more" in client.monitor("info qtree")
    assert client.monitor("device_add virtio-blk-device,id=more").startswith("Error: Duplicate")
    client.monitor("device_del more")
    assert client.event("DEVICE_DELETED")
    client.monitor("system_reset")
    assert client.event("RESET")
    client.monitor("q")
    assert client.event("SHUTDOWN")
    assert client.monitor("info status") == "VM status: paused (shutdown)\n"


def test_every_command_shows_itself_and_runs(client: Client) -> None:
    leave = {"quit", "q", "info", "help", "?"}
    for line in client.monitor("help").splitlines():
        for name in line.split(" ")[0].split("|"):
            assert client.monitor(f"help {name}") == f"{line}\n"
            if name not in leave:
                client.monitor(name)
    for line in client.monitor("info").splitlines():
        name = line.split(" ")[1]
        assert "unknown" not in client.monitor(f"info {name}")


def test_physical_memory_is_shown_registers_too(served: Served, client: Client) -> None:
    served.machine.memory.write(0x2000, bytes(range(16)))
    assert client.monitor("xp /2xg 0x2000") == (
        "0000000000002000: 0x0706050403020100 0x0f0e0d0c0b0a0908\n"
    )
    assert client.monitor("xp /2xw 0xfeb02e00") == "00000000feb02e00: 0x74726976 0x00000002\n"
    assert "Cannot access memory" in client.monitor("xp /2xw 0x100000000000")
    edge = served.machine.memory.size
    assert "Cannot access memory" in client.monitor(f"xp /2xw {edge - 4:#x}")
    long = client.monitor("xp /999999999xb 0")
    assert len(long.splitlines()) == (1 << 16) // 8


def test_each_local_apic_is_shown(client: Client) -> None:
    for index in range(3):
        text = client.monitor(f"info lapic {index}")
        assert text.startswith(f"dumping local APIC state for CPU {index}")
        assert "LVT0" in text and "IRR\t (none)" in text
    assert client.monitor("info lapic 3") == "No CPU available\n"


def test_each_pin_of_the_ioapics_is_shown(served: Served, client: Client) -> None:
    ioapic = served.machine.ioapics[1]
    served.do(lambda: ioapic.write(0, 4, 0x10 + 2 * 7))
    served.do(lambda: ioapic.write(0x10, 4, 0x8931))
    text = client.monitor("info pic")
    assert text.count("  pin ") == 48
    assert "pin 7  0x0000000000008931 dest=0 vec=49  active-hi level        lowest logical" in text
    assert client("x-query-interrupt-controllers")["human-readable-text"] == text


@pytest.mark.parametrize("transport", list(Transport))
def test_addresses_are_told_as_the_traces_want_them(tmp_path: Path, transport: Transport) -> None:
    with serve(tmp_path, transport) as served, Client(served.sockets[0]) as client:
        found = regions(lambda command, **arguments: client(command, **arguments))
        names = {region.device for region in found}
        assert {"blk0", "nic0", "random0", "LAPIC", "IOAPIC", "IOAPIC2", "serial", "PIC"} <= names
        assert ("PCI host bridge" in names) == (transport is Transport.PCI)
        for view in client.monitor("info mtree -f -o").split("FlatView")[1:]:
            rows = [
                (int(row[1], 16), int(row[2], 16) + 1)
                for row in ROW.finditer(view)
            ]  # fmt: skip
            assert rows == sorted(rows)
            assert all(one[1] <= two[0] for one, two in itertools.pairwise(rows))


def test_every_owner_of_an_address_is_an_object(client: Client) -> None:
    for row in ROW.finditer(client.monitor("info mtree -f -o")):
        path = row[5] if row[4] == "path" else f"/machine/peripheral/{row[5]}"
        assert client("qom-list", path=path)


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("1+2*3", 7, ""),
        ("2*(3 + 4) x", 14, "x"),
        ("0x10 - 0x11", (1 << 64) - 1, ""),
        ("010", 8, ""),
        ("08", 0, "8"),
        ("1 + 2 & 3", 3, ""),
        ("~0 % 10", 5, ""),
        ("'a'", 97, ""),
    ],
)
def test_expressions_have_the_monitors_values(text: str, value: int, rest: str) -> None:
    assert evaluate(text) == (value, rest)


@pytest.mark.parametrize(
    "text", ["", "1/0", "1%0", "(1", "x", "1+", "$rip", "(" * 5000, "9" * 5000, "9" * 20]
)
def test_what_is_no_expression_is_said_so(text: str) -> None:
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_dumps_go_on_with_the_last_format() -> None:
    form = DumpFormat()
    assert form.parse("3dh") == 3 and (form.letter, form.size) == ("d", 2)
    assert form.parse("") == 1 and (form.letter, form.size) == ("d", 2)
    assert dump(form, 2, 0x10, lambda address, length: b"\1\0\xff\xff") == (
        "0000000000000010:     1 65535\n"
    )
    with pytest.raises(ExpressionError):
        form.parse("z")


def test_numbers_are_shown_in_each_form() -> None:
    assert [show(65, letter) for letter in "xduoc"] == ["0x41", "65", "65", "0101", "'A'"]
    assert show((1 << 64) - 1, "d") == "-1"
    assert show(10, "c") == r"'\n'" and show(7, "c") == r"'\x07'"


def test_a_line_of_nonsense_is_no_exception(client: Client) -> None:
    for line in (
        "/",
        "xp/",
        "info /x",
        "xp /x/x/x",
        "'" * 9,
        "info " + "x" * 100_000,
        "\0",
        "%s %n",
    ):
        assert isinstance(client.monitor(line), str)
