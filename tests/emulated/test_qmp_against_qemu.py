# SPDX-License-Identifier: GPL-2.0-or-later
"""The emulated machine's QMP beside QEMU's: the same questions, the same form of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import qvis
from qvis.emulated.serve.commands import COMMANDS
from qvis.emulated.serve.qapi import OWN, load
from qvis.trace.devices import regions
from qvis.transport import Transport
from tests.emulated.qmp_fakes import Client, serve

SMP = 2


class Introspection:
    """What query-qmp-schema says, and whether a value is as it says."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self._entities = {entity["name"]: entity for entity in entities}

    def returns(self, command: str) -> str:
        return str(self._entities[command]["ret-type"])

    def data(self, event: str) -> str:
        return str(self._entities[event]["arg-type"])

    def check(self, type_name: str, value: Any, where: str) -> None:
        entity = self._entities[type_name]
        match entity["meta-type"]:
            case "builtin":
                kinds: dict[str, tuple[type, ...]] = {
                    "string": (str,), "int": (int,), "number": (int, float),
                    "boolean": (bool,), "null": (type(None),), "value": (object,),
                }  # fmt: skip
                wanted = kinds[entity["json-type"]]
                assert isinstance(value, wanted), f"{where} is {value!r}"
                assert bool in wanted or object in wanted or not isinstance(value, bool), where
            case "enum":
                assert value in {member["name"] for member in entity["members"]}, where
            case "array":
                assert isinstance(value, list), where
                for number, item in enumerate(value):
                    self.check(entity["element-type"], item, f"{where}[{number}]")
            case "alternate":
                assert any(self._fits(member["type"], value) for member in entity["members"]), where
            case "object":
                self._object(entity, value, where)
            case other:
                raise AssertionError(f"{where}: {other}")

    def _fits(self, type_name: str, value: Any) -> bool:
        try:
            self.check(type_name, value, "")
        except AssertionError:
            return False
        return True

    def _object(self, entity: dict[str, Any], value: Any, where: str) -> None:
        assert isinstance(value, dict), where
        members = list(entity["members"])
        if "tag" in entity:
            for variant in entity["variants"]:
                if variant["case"] == value.get(entity["tag"]):
                    members += self._entities[variant["type"]]["members"]
        known = {member["name"]: member for member in members}
        assert not value.keys() - known.keys(), f"{where} has what there is not"
        for name, member in known.items():
            if name in value:
                self.check(member["type"], value[name], f"{where}.{name}")
            else:
                assert "default" in member, f"{where}.{name} is missing"


@dataclass
class Pair:
    """A real machine and an emulated one with the same devices."""

    transport: Transport
    real: Client
    emulated: Client
    schema: Introspection
    """Of the real one."""

    def backend(self, name: str) -> str:
        half = "/virtio-backend" if self.transport is Transport.PCI else ""
        return f"/machine/peripheral/{name}{half}"


@pytest.fixture(scope="module", params=[Transport.MSI, Transport.PCI])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    transport: Transport = request.param
    folder = tmp_path_factory.mktemp("q")
    with (
        qvis.up(backend="tcg", transport=transport, smp=SMP, queues=2) as vm,
        serve(folder, transport, smp=SMP, memory=512) as served,
        Client(vm.folder.path / "qmp.sock", oob=True) as real,
        Client(served.sockets[0], oob=True) as emulated,
    ):
        served.boot()
        yield Pair(transport, real, emulated, Introspection(real("query-qmp-schema")))


# Answers


def shape(value: Any) -> Any:
    """Keys and types of a value; of lists what all their elements have together."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        merged: dict[str, Any] = {}
        for item in value:
            merged |= item if isinstance(item, dict) else {"": item}
        return [shape(merged)]
    return type(value).__name__


def alike(mine: Any, theirs: Any) -> bool:
    """Whether two shapes are the same; of a list that is empty nobody knows."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(alike(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return not mine[0] or not theirs[0] or alike(mine[0], theirs[0])
    return bool(mine == theirs)


QUERIES = sorted(
    name
    for name in COMMANDS
    if name.startswith(("query-", "x-query-")) and not name.startswith("x-query-virtio-")
)
# Commands whose answers have lists of what each machine has more or less of.
OWN_LISTS = {
    "query-commands",
    "query-qmp-schema",
    "query-machines",
    "x-query-interrupt-controllers",
}


@pytest.mark.parametrize("command", QUERIES)
def test_answers_have_the_same_keys_and_types(pair: Pair, command: str) -> None:
    real, emulated = pair.real.request(command), pair.emulated.request(command)
    if "error" in real:
        assert emulated == real
        return
    pair.schema.check(pair.schema.returns(command), emulated["return"], command)
    if command not in OWN_LISTS:
        assert alike(shape(emulated["return"]), shape(real["return"]))


def test_the_schema_that_comes_with_the_package_is_this_qemus(pair: Pair) -> None:
    theirs = {entity["name"]: entity for entity in pair.real("query-qmp-schema")}
    own = {entity["name"] for entity in OWN}
    for entity in pair.emulated("query-qmp-schema"):
        if entity["name"] not in own:
            assert entity == theirs[entity["name"]], "run scripts/qmp_schema.py"
    commands = {entry["name"] for entry in pair.real("query-commands")}
    assert load().qemu_commands == commands


def test_what_is_the_same_in_any_machine_is_the_same(pair: Pair) -> None:
    for command in (
        "query-uuid", "query-target", "query-current-machine", "query-replay", "query-migrate",
        "query-memory-size-summary", "query-memdev", "query-iothreads", "query-jobs",
        "query-block", "query-named-block-nodes", "query-blockstats", "query-dump",
    ):  # fmt: skip
        assert pair.emulated(command) == pair.real(command), command
    assert pair.emulated("query-version")["qemu"] == pair.real("query-version")["qemu"]


def test_pci_functions_are_the_same_at_the_same_addresses(pair: Pair) -> None:
    assert pair.emulated("query-pci") == pair.real("query-pci")


def test_virtio_devices_are_described_alike(pair: Pair) -> None:
    def key(device: dict[str, str]) -> str:
        return device["path"]

    def names(texts: list[str]) -> set[str]:
        return {text.split(":")[0] for text in texts}

    assert sorted(pair.emulated("x-query-virtio"), key=key) == sorted(
        pair.real("x-query-virtio"), key=key
    )
    schema = pair.schema
    for name in ("blk0", "nic0", "random0"):
        path = pair.backend(name)
        mine = pair.emulated("x-query-virtio-status", path=path)
        theirs = pair.real("x-query-virtio-status", path=path)
        schema.check(schema.returns("x-query-virtio-status"), mine, name)
        assert mine.keys() == theirs.keys()
        for same in mine.keys() - {"isr", "status", "host-features", "guest-features"}:
            assert mine[same] == theirs[same], same
        assert names(mine["status"]["statuses"]) == names(theirs["status"]["statuses"])
        for part in ("dev-features", "transports"):
            accepted = names(mine["guest-features"][part])
            assert accepted == names(theirs["guest-features"][part])
            offered = names(mine["host-features"][part])
            expected = names(theirs["host-features"][part])
            # They mean something only to drivers of before virtio 1.0.
            legacy = {
                "VIRTIO_F_ANY_LAYOUT", "VIRTIO_F_NOTIFY_ON_EMPTY", "VIRTIO_NET_F_GSO",
                "VHOST_USER_F_PROTOCOL_FEATURES",
            }  # fmt: skip
            assert offered == expected - legacy
        for command in ("x-query-virtio-queue-status", "x-query-virtio-queue-element"):
            mine, theirs = (
                client(command, path=path, queue=0) for client in (pair.emulated, pair.real)
            )
            schema.check(schema.returns(command), mine, command)
            assert alike(shape(mine), shape(theirs))
            for same in mine.keys() & {"name", "vring-num", "vring-num-default", "vring-align"}:
                assert mine[same] == theirs[same], same


def test_events_are_those_of_the_schema(pair: Pair) -> None:
    schema = pair.schema
    for command, event in (
        ("stop", "STOP"), ("cont", "RESUME"), ("system_powerdown", "POWERDOWN"),
    ):  # fmt: skip
        seen = []
        for client in (pair.real, pair.emulated):
            client(command)
            seen.append(client.event(event))
        real, emulated = seen
        assert alike(shape(emulated), shape(real))
        schema.check(schema.data(event), emulated.get("data", {}), event)


# Objects


def listing(client: Client, path: str) -> dict[str, str]:
    return {entry["name"]: entry["type"] for entry in client("qom-list", path=path)}


def test_every_object_has_its_counterpart(pair: Pair) -> None:
    todo = ["/machine", "/objects"]
    count = 0
    while todo:
        path = todo.pop()
        mine, theirs = listing(pair.emulated, path), listing(pair.real, path)
        missing = {
            name: kind
            for name, kind in mine.items()
            if theirs.get(name) != kind and not name.startswith("child[")
        }
        assert not missing, path
        count += 1
        todo += [f"{path}/{name}" for name, kind in mine.items() if kind.startswith("child<")]
    assert count > 100


@pytest.mark.parametrize("name", ["blk0", "nic0", "random0"])
def test_a_device_has_the_properties_of_the_real_one(pair: Pair, name: str) -> None:
    path = f"/machine/peripheral/{name}"
    mine, theirs = listing(pair.emulated, path), listing(pair.real, path)
    assert mine == theirs
    different = {}
    for entry, kind in theirs.items():
        if kind.startswith("child<"):
            continue
        answers = [
            client.request("qom-get", path=path, property=entry)
            for client in (pair.real, pair.emulated)
        ]
        if answers[0] != answers[1]:
            different[entry] = answers
    assert different == {}


def test_types_are_known_by_their_properties(pair: Pair) -> None:
    def by_name(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(found, key=lambda entry: str(entry["name"]))

    suffix = "pci" if pair.transport is Transport.PCI else "device"
    for command in ("device-list-properties", "qom-list-properties"):
        for kind in ("blk", "net", "rng", "serial"):
            name = f"virtio-{kind}-{suffix}"
            mine, theirs = (
                by_name(client(command, typename=name)) for client in (pair.emulated, pair.real)
            )
            assert mine == theirs
    for arguments in ({}, {"implements": "virtio-device"}, {"abstract": True}):
        mine, theirs = (
            by_name(client("qom-list-types", **arguments)) for client in (pair.emulated, pair.real)
        )
        assert mine == theirs


def test_addresses_belong_to_the_same_devices(pair: Pair) -> None:
    def found(client: Client) -> set[Any]:
        return {
            (one.space, one.start, one.end, one.device, one.map)
            for one in regions(lambda command, **arguments: client(command, **arguments))
        }

    mine, theirs = found(pair.emulated), found(pair.real)
    # Ports that nothing is behind here are as empty as those of a machine without them.
    memory = {one for one in mine if one[0] == "memory"}
    assert {one for one in mine if one[0] == "port"} & theirs
    # Of the ACPI device, of which the guest wants nothing but its interrupt, there is no more.
    assert {one for one in theirs if one[0] == "memory" and one[3] != "GED"} == memory


# Errors

MALFORMED: list[bytes] = [
    b"{}", b"[]", b"5", b'"x"', b"null", b"tru", b"01", b"-x", b"1.x", b"-", b"1e", b"1e+5",
    b"0x5", b"1.5.5", b"+1", b"nul l",
    b"\x00\x01\x02", b"#abc", b"abc#def", b"'", b'"\x7f"', b"{'a'}", b"\xef\xbb\xbf{}",
    b'{"execute":"query-name"}}', b'{"execute":"query-name"},', b"{'execute':'query-name'}",
    b'{"execute":"query-name",}', b'{"execute" "query-name"}', b'{"execute":}', b'{"execute"',
    b"{5:6}", b"{null:6}", b"{[]:6}", b"{{}:6}", b"{{5}:6}", b"{true", b'{"a":1 "b":2}',
    b'{"a":1,"a":2}', b'{"a":1,"a":}', b'{"a":{"b":[}]}', b"[1 2]", b"[1,]", b"[,]", b"[1}",
    b"{]", b"]", b"}", b":", b",", b"[[[", b'{"id":"unterminated\n',
    rb'{"id":"\ud800"}', rb'{"id":"\ud83d\u0041"}', rb'{"id":"\udc00"}', rb'{"id":"\q"}',
    rb'{"id":"\u00zz"}', rb'{"id":"\u0"}', rb'{"id":"\ufffe"}', rb'{"id":"\u0000"}',
    b'{"id":"\xc3("}', b'{"id":"\xff"}', b'{"id":"\xed\xa0\x80"}', b'{"id":"\xef\xbf\xbe"}',
    b"[" * 1024 + b"]" * 1024, b"[" * 1025 + b"]" * 3, b"q" * 5000, b'{"a":' * 1025,
    b'{"execute":5}', b'{"exec-oob":5}', b'{"execute":"query-name","foo":5}',
    b'{"execute":"query-name","exec-oob":"query-name"}', b'{"id":7}',
    b'{"execute":"query-name","arguments":5}', b'{"execute":"query-name","arguments":null}',
    b'{"execute":"query-name","arguments":[]}', b'{"exec-oob":"query-status","id":8}',
    b'{"exec-oob":"no-such-command"}', b'{"exec-oob":"query-yank","arguments":{"x":1}}',
    rb'{"execute":"no-such-command","id":{"a":[1,null,true,"\u00e9\ud83d\ude00"]}}',
    b'{"execute":"no-such-command","id":-9223372036854775808}',
    b'{"execute":"no-such-command","id":18446744073709551615}',
    b'{"execute":"no-such-command","id":1.5}',
]  # fmt: skip


def conversation(client: Client, data: bytes) -> list[Any]:
    """What comes back for ``data``, up to what a client sends that starts over."""
    client.send(data + b'\xff{"execute":"query-target","id":"the end"}')
    found = []
    while (answer := client.answer()).get("id") != "the end":
        found.append(answer)
    return found


@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: repr(data)[2:40])
def test_what_is_no_request_gets_the_same_answer(pair: Pair, data: bytes) -> None:
    def without_name(found: list[Any]) -> list[Any]:
        return [{**one, "return": {}} if "return" in one else one for one in found]

    real, emulated = conversation(pair.real, data), conversation(pair.emulated, data)
    assert without_name(emulated) == without_name(real)


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("qmp_capabilities", {}),
    ("query-status", {"a": 1}),
    ("qom-get", {"path": "/"}),
    ("qom-get", {"property": "x"}),
    ("qom-get", {"path": 5, "property": "x"}),
    ("qom-get", {"path": "/machine", "property": "x"}),
    ("qom-get", {"path": "/nope", "property": "x"}),
    ("qom-get", {"path": "", "property": "x"}),
    ("qom-get", {"path": "lapic", "property": "type"}),
    ("qom-list", {"path": "/nope"}),
    ("qom-list", {"path": "lapic"}),
    ("qom-list", {"path": None}),
    ("qom-list", {"path": "/machine", "extra": 1}),
    ("qom-list-get", {"paths": "/machine"}),
    ("qom-list-get", {"paths": ["/machine", 5]}),
    ("qom-list-get", {"paths": ["/nope"]}),
    ("qom-set", {"path": "/machine/peripheral/blk0"}),
    ("qom-set", {"path": "/machine", "property": "nope", "value": 1}),
    ("qom-set", {"path": "/machine", "property": "type", "value": 1}),
    ("qom-set", {"path": "/machine/peripheral/blk0", "property": "serial", "value": "x"}),
    ("qom-set", {"path": "/machine/peripheral/blk0", "property": "realized", "value": "x"}),
    ("qom-set", {"path": "/machine/peripheral/blk0", "property": "hotplugged", "value": True}),
    ("qom-list-types", {"abstract": 1}),
    ("qom-list-properties", {"typename": "nope"}),
    ("device-list-properties", {"typename": "nope"}),
    ("device-list-properties", {"typename": "rng-random"}),
    ("device-list-properties", {"typename": "virtio-device"}),
    ("device_add", {}),
    ("device_add", {"driver": 5}),
    ("device_add", {"driver": "nope"}),
    ("device_add", {"driver": "microvm-machine"}),
    ("device_add", {"driver": "rng-random"}),
    ("device_add", {"driver": "virtio-device"}),
    ("set_link", {}),
    ("set_link", {"name": "nope", "up": True}),
    ("device_del", {}),
    ("device_del", {"id": "nope"}),
    ("device_del", {"id": "/machine/peripheral"}),
    ("device_del", {"id": "/machine/nope"}),
    ("x-query-virtio-status", {"path": "/nope"}),
    ("x-query-virtio-status", {"path": "/machine"}),
    ("x-query-virtio-queue-status", {"path": "/machine", "queue": 0}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": 99}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": "0"}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": True}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": -1}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": 70000}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": 1.0}),
    ("x-query-virtio-queue-status", {"path": "{blk0}", "queue": 1 << 80}),
    ("x-query-virtio-queue-element", {"path": "{blk0}", "queue": 99}),
    ("x-query-virtio-vhost-queue-status", {"path": "{blk0}", "queue": 0}),
    ("human-monitor-command", {}),
    ("human-monitor-command", {"command-line": "info cpus", "cpu-index": 99}),
    ("human-monitor-command", {"command-line": "info cpus", "cpu-index": "0"}),
    ("human-monitor-command", {"command-line": "info cpus", "cpu-index": 1 << 63}),
    ("memsave", {"val": 0, "size": 16, "filename": "m", "cpu-index": 9}),
    ("memsave", {"val": 0, "size": 16, "filename": "m"}),
    ("pmemsave", {"val": 0, "size": 16, "filename": "no-such-folder/m"}),
    ("set-action", {"reboot": "nope"}),
    ("set-action", {"reboot": 5}),
    ("system_wakeup", {}),
    ("query-rx-filter", {"name": "nope"}),
    ("query-machines", {"compat-props": "x"}),
    ("getfd", {"fdname": "x"}),
    ("closefd", {"fdname": "x"}),
    ("query-hotpluggable-cpus", {}),
    ("query-balloon", {}),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments"), REFUSED)
def test_what_is_refused_is_refused_in_the_same_words(
    pair: Pair, command: str, arguments: dict[str, Any]
) -> None:
    if arguments.get("path") == "{blk0}":
        arguments = {**arguments, "path": pair.backend("blk0")}
    real = pair.real.request(command, **arguments)
    assert "error" in real
    assert pair.emulated.request(command, **arguments) == real


@pytest.mark.parametrize(
    "data",
    [
        b'{"execute":"query-status","id":3}',
        b'{"execute":"no-such-command"}',
        b'{"execute":"qmp_capabilities","arguments":{"enable":["nope"]}}',
        b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
        b'{"execute":"qmp_capabilities","arguments":{"enable":[5]}}',
        b'{"execute":"qmp_capabilities","arguments":{"nope":1}}',
        b'{"exec-oob":"qmp_capabilities"}',
        b"[]",
        b"nope\n",
    ],
)
def test_before_negotiation_too(pair: Pair, data: bytes) -> None:
    greetings, answers = [], []
    for client in (pair.real, pair.emulated):
        # Another monitor of the same machine: these are taken.
        other = client.path.with_name("qmp3.sock" if client is pair.real else "qmp1.sock")
        with Client(other, negotiate=False) as fresh:
            greetings.append(fresh.greeting)
            fresh.send(data)
            answers.append(fresh.read())
    assert answers[0] == answers[1]
    for greeting in greetings:
        greeting["QMP"]["version"]["package"] = ""
    assert greetings[0] == greetings[1]


# The human monitor

LINES = [
    "", " ", "foo", "info foo", "info foo bar", '"', 'info "status"', "info status",
    "  info  status", "info status foo", "info uuid", "stop foo", "system_reset foo", "quit foo",
    "xp", "xp /4xw", "xp /4x", "xp /x", "xp /3xz 0x1000", "xp /-1x 0", "xp /0x 0", "help foo",
    "help info foo", "xp/zz 0", "xp /2xb 0x20000000", "xp /4xw 0x8000000", "xp /5xg 0x8000000",
    "xp /3c 0x8000000", "xp /3ub 0x8000000", "xp /3dh 0x8000000", "xp /2oh 0x8000000",
    "xp /1xw 0x8000000 + 8", "xp/4xw 0x8000000", "xp /2xh 0xfeb00000", "x /2xb 0", "x",
    "p", "p 1+2", "print 0x10", "print /d 0x10", "p /c 65", "p 1/0", "p (1", "p 1 2", "p foo",
    "p /x 010", "p -1", "p ~0", "p 'a'", "p 1<<3", "p $nope", "p 2*3+4&5", "p 08",
    "cpu", "cpu 7", "cpu x", "device_add", "device_add nope", "device_del", "device_del nope",
    "qom-list /nope", "qom-get /machine type", "qom-get", "qom-list", "info mtree -x",
    "info mtree foo", "info lapic 9", "info lapic x", "info lapic 9 9", "system_wakeup",
    "info network", "info memory_size_summary", "info iothreads", "info migrate", "info block",
    "info usernet 3", "nmi", "info qtree foo",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_the_human_monitor_has_the_same_words(pair: Pair, line: str) -> None:
    assert pair.emulated.monitor(line) == pair.real.monitor(line)


def test_the_human_monitor_shows_pci_as_qemu_does(pair: Pair) -> None:
    assert pair.emulated.monitor("info pci") == pair.real.monitor("info pci")


def test_help_is_in_the_form_that_people_know(pair: Pair) -> None:
    real = {line.split(" ")[0] for line in pair.real.monitor("help").splitlines()}
    for line in pair.emulated.monitor("help").splitlines():
        assert " -- " in line
        assert line.split(" ")[0] in real
    real = {line.split(" ")[1] for line in pair.real.monitor("info").splitlines()}
    for line in pair.emulated.monitor("info").splitlines():
        assert line.split(" ")[1] in real
