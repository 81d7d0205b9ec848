# SPDX-License-Identifier: GPL-2.0-or-later
"""The tree of objects that the emulated machine shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvis.emulated.config import Config, DeviceSpec
from qvis.emulated.machine import Machine
from qvis.emulated.serve.qom import Tree
from qvis.transport import Transport
from tests.emulated.qmp_fakes import Client, Served, serve


@pytest.fixture(params=[Transport.VIS, Transport.PCI])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path, request.param, smp=3) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.sockets[0]) as found:
        yield found


def walk(client: Client, path: str = "/") -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in client("qom-list", path=path):
        yield path, entry
        if entry["type"].startswith("child<"):
            yield from walk(client, f"{path.rstrip('/')}/{entry['name']}")


def test_a_walk_sees_every_object_and_reads_every_property(client: Client) -> None:
    links = 0
    for path, entry in walk(client):
        answer = client.request("qom-get", path=path, property=entry["name"])
        if "error" in answer:
            assert "is not readable" in answer["error"]["desc"]
            continue
        if entry["type"].startswith("child<"):
            assert answer["return"] == f"{path.rstrip('/')}/{entry['name']}"
        if entry["type"].startswith("link<") and answer["return"]:
            links += 1
            assert client("qom-list", path=answer["return"]), path
    assert links > 20


def test_a_device_is_on_a_bus_that_leads_back_to_it(client: Client) -> None:
    for name in ("blk0", "nic0", "random0"):
        path = f"/machine/peripheral/{name}"
        bus = client("qom-get", path=path, property="parent_bus")
        children = [
            client("qom-get", path=bus, property=entry["name"])
            for entry in client("qom-list", path=bus)
            if entry["name"].startswith("child[")
        ]
        assert path in children
        assert client("qom-get", path=f"{path}/parent_bus", property="type") == client(
            "qom-get", path=bus, property="type"
        )


def test_values_are_the_machines(served: Served, client: Client) -> None:
    path = "/machine/peripheral/blk0"
    assert client("qom-get", path=path, property="num-queues") == 2
    assert client("qom-get", path="nic0", property="mac") == "52:54:00:12:34:56"
    assert client("qom-get", path="/machine", property="smp")["cpus"] == 3
    assert client("qom-get", path="random0", property="rng") == "/objects/rng0"
    if served.machine.config.transport is Transport.VIS:
        bus = client("qom-get", path=path, property="parent_bus")
        transport = bus.rpartition("/")[0]
        assert client("qom-get", path=transport, property="vis") is True
        assert client("qom-get", path=transport, property="vectors") == 64
    else:
        assert client("qom-get", path=path, property="legacy-addr") == "01.0"


def test_partial_paths_are_found_where_they_are_unique(client: Client) -> None:
    assert client("qom-list", path="blk0") == client("qom-list", path="/machine/peripheral/blk0")
    assert client("qom-list", path="peripheral/blk0")
    assert client.error("qom-list", path="lapic")[1] == "Path 'lapic' is ambiguous"
    assert client.error("qom-list", path="nope")[0] == "DeviceNotFound"
    assert client.error("qom-list", path="")[0] == "DeviceNotFound"


def test_a_path_in_circles_ends(client: Client) -> None:
    around = "/parent_bus/child[0]" * 50_000
    assert client.error("qom-list", path=f"/machine/peripheral/blk0{around}")[0] == "DeviceNotFound"


def test_what_many_paths_are_asked_for_at_once_is_the_same(client: Client) -> None:
    paths = ["/machine", "/machine/peripheral/blk0"]
    found = client("qom-list-get", paths=paths)
    for path, entry in zip(paths, found, strict=True):
        listed = [{"name": one["name"], "type": one["type"]} for one in entry["properties"]]
        assert listed == client("qom-list", path=path)
        for one in entry["properties"]:
            if "value" in one:
                assert one["value"] == client("qom-get", path=path, property=one["name"])


def test_nothing_is_set_once_a_machine_is_there(client: Client) -> None:
    path = "/machine/peripheral/blk0"
    assert "after it was realized" in client.error(
        "qom-set", path=path, property="serial", value="x"
    )[1]  # fmt: skip
    assert client("qom-set", path=path, property="realized", value=True) == {}
    assert "device_del" in client.error("qom-set", path=path, property="realized", value=False)[1]


@pytest.mark.timeout(60)
def test_a_tree_of_a_thousand_devices_and_processors_is_no_trouble() -> None:
    devices = tuple(DeviceSpec("rng", f"r{number}") for number in range(1000))
    machine = Machine(Config(transport=Transport.MSI, smp=1000, devices=devices))
    tree = Tree(machine, {})
    assert len(tree.cpus) == 1000
    paths = {node.path for node in tree.all()}
    for number in range(1000):
        assert tree.backend(f"r{number}") in paths
        tree.resolve(f"/machine/peripheral/r{number}")
    assert len(paths) == sum(1 for _ in tree.all())


def test_answers_are_json_whatever_the_property(client: Client) -> None:
    for name in ("blk0", "/machine", "/objects/microvm.ram", "/chardevs/qmp0"):
        assert json.dumps(client("qom-list-get", paths=[name]))
