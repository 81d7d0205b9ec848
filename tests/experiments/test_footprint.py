# SPDX-License-Identifier: GPL-2.0-or-later
"""The footprint's counts: by hand on small programs and machines, and checked on the real ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import qvis
from qvis.build import build_linux, build_qemu
from qvis.build.objects import Lines, ObjectFile, Objects, Sizes, SourceFile
from qvis.errors import InfraError
from qvis.experiments.code import count, matches, table
from qvis.experiments.surface import Region, config_registers, regions, surface
from qvis.machine.machine import Machine


def made(source: str, *headers: str, text: int = 0, **more: object) -> ObjectFile:
    """An object without anything that does not matter."""
    known: dict[str, object] = {"functions": {}, "needs": (), "options": ()}
    return ObjectFile(f"{source}.o", (source,), headers, Sizes(text=text), **{**known, **more})  # type: ignore[arg-type]


def program(*objects: ObjectFile) -> Objects:
    """A program with ten lines, seven of them code, in each file."""
    names = {name for one in objects for name in (*one.sources, *one.headers)}
    return Objects(objects, {name: SourceFile(Lines(10, 7), Lines(10, 7)) for name in names})


def test_components_add_up() -> None:
    code = count(
        "linux",
        program(
            made("drivers/pci/pci.c", "pci.h", "both.h", text=100),
            made("drivers/virtio/virtio_pci_common.c", "pci.h", text=20),
            made("drivers/virtio/virtio_mmio.c", "mmio.h", "both.h", text=3),
            made("kernel/irq/msi.c", "all.h", options=("CONFIG_PCI_MSI",)),
            made("mm/slab.c", "all.h"),
        ),
    )
    assert (code.pci.files, code.pci.lines, code.pci.sizes.text) == (2, Lines(20, 14), 120)
    assert (code.mmio.files, code.mmio.lines, code.mmio.sizes.text) == (1, Lines(10, 7), 3)
    # Both components include it, and nothing else does.
    assert (code.pci.headers, code.pci.header_lines) == (1, Lines(10, 7))
    assert code.mmio.headers == 1
    assert {part.name: part.headers for part in code.parts}["PCI core"] == 0
    assert (code.whole.files, code.whole.headers) == (5, 4)
    assert code.unclassified == ()


def test_pci_code_that_no_component_has_is_told() -> None:
    code = count(
        "linux",
        program(
            made("arch/x86/kernel/new.c", options=("CONFIG_PCI_NEW",)),
            made("drivers/acpi/x86/lpss.c", options=("CONFIG_PCI",)),
            made("kernel/odd.c", options=("CONFIG_SPCIAL", "CONFIG_ACPI")),
            made("kernel/user.c", needs=("pci_enable",), functions={"map_pci": 30, "map": 9}),
            made("build:trace.c", functions={"trace_pci": 100}),
        ),
    )
    assert code.unclassified == ("arch/x86/kernel/new.c",)
    assert code.users == ("kernel/user.c",)
    assert (code.functions, code.function_bytes) == (1, 30)


def test_series_is_told_apart() -> None:
    objects = program(made("drivers/virtio/virtio_mmio.c", "mmio.h"))
    objects.files["drivers/virtio/virtio_mmio.c"] = SourceFile(Lines(15, 9), Lines(10, 7))
    code = count("linux", objects)
    assert (code.mmio.lines, code.mmio.released) == (Lines(15, 9), Lines(10, 7))
    assert (code.series_files, code.series_lines) == (1, Lines(5, 2))


MTREE = """\
FlatView #0
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000effff (prio 0, ram): ram owner:{obj path=/objects/ram}
  00000000000f0000-00000000000fffff (prio 0, rom): pc.bios parent:{obj path=/machine/unattached}
  00000000c0000000-00000000c000004f (prio 0, i/o): msix-table owner:{dev id=blk0}
  00000000c0000050-00000000c00007ff (prio 0, i/o): window @0000000000000050 owner:{dev path=/machine/a}
  00000000c0001000-00000000c0001fff (prio 1, i/o): window @0000000000001000 owner:{dev path=/machine/a}
  00000000feb00000-00000000feb001ff (prio 0, i/o): virtio-mmio owner:{dev path=/machine/b[5]}
  00000000feb00200-00000000feb003ff (prio 0, i/o): virtio-mmio owner:{dev path=/machine/b[6]}

FlatView #1
 AS "virtio-blk-pci", root: bus master container
 Root memory region: bus
  0000000000000000-0000000000000fff (prio 0, i/o): hidden owner:{dev id=blk0}

FlatView #2
 AS "I/O", root: io
 Root memory region: io
  00000000000003f8-00000000000003ff (prio 0, i/o): serial owner:{dev path=/machine/c}
"""  # noqa: E501 - as QEMU prints it


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_regions_that_a_vcpu_reaches(newline: str) -> None:
    assert regions(MTREE.replace("\n", newline)) == [
        Region("memory", "msix-table", "/machine/peripheral/blk0", 0xC0000000, 0x50),
        Region("memory", "window", "/machine/a", 0xC0000000, 0x7B0 + 0x1000),
        Region("memory", "virtio-mmio", "/machine/b[5]", 0xFEB00000, 0x200),
        Region("memory", "virtio-mmio", "/machine/b[6]", 0xFEB00200, 0x200),
        Region("I/O", "serial", "/machine/c", 0x3F8, 8),
    ]


def test_regions_of_something_else() -> None:
    with pytest.raises(InfraError, match="known form"):
        regions("memory\n  0000000000000000-ffffffffffffffff (prio 0, i/o): system\n")


def config(*capabilities: tuple[int, bytes], header: int = 0) -> bytes:
    """A function's configuration space with these capabilities, 32 bytes apart."""
    data = bytearray(256)
    data[0x0E] = header
    place = 0x34
    for number, (kind, rest) in enumerate(capabilities):
        data[0x06] = 0x10
        data[place] = 0x40 + 32 * number
        data[0x40 + 32 * number : 0x42 + 32 * number + len(rest)] = bytes([kind, 0]) + rest
        place = 0x41 + 32 * number
    return bytes(data)


@pytest.mark.parametrize(
    ("space", "registers", "words"),
    [
        (config(), 25, 0),
        (config(header=0x81), 31, 0),  # a bridge with more functions
        (config(header=2), 0, 16),  # a kind that the table does not know
        (config((9, b"\x10\x01")), 32, 0),
        (config((9, b"\x14\x02"), (17, b"")), 37, 1),
        (config((1, b""), (17, b"")), 30, 8),  # the unknown one goes on to the next
    ],
)
def test_registers_of_configuration_space(space: bytes, registers: int, words: int) -> None:
    assert config_registers(space) == (registers, words)


def test_capabilities_in_a_circle_end() -> None:
    space = bytearray(config((17, b"")))
    space[0x41] = 0x40
    assert config_registers(bytes(space)) == (30, 0)


@pytest.mark.parametrize(("component", "build"), [("linux", build_linux), ("qemu", build_qemu)])
def test_components_are_true_of_the_real_build(component: str, build: Callable[[], object]) -> None:
    made_of = build()
    folder: Path = made_of.image.parent if component == "linux" else made_of.binary.parent  # type: ignore[attr-defined]
    objects = Objects.load(folder)
    sources = {one.source for one in objects.objects}
    patterns = [pattern for one in table()[component] for pattern in one["files"]]
    if component == "qemu":
        patterns += [pattern for one in table()["region"] for pattern in one["code"]]
    idle = [one for one in patterns if not any(matches(source, [one]) for source in sources)]
    assert not idle, "patterns that no linked source matches"
    # What only a PCI device does.
    classified = [pattern for one in table()[component] for pattern in one["files"]]
    devices = [one.source for one in objects.objects if "pci_register_bar" in one.needs]
    assert not [source for source in devices if not matches(source, classified)]
    code = count(component, objects)
    assert code.unclassified == ()
    assert code.mmio.files == (1 if component == "linux" else 2)
    assert code.mmio.released_files == 1
    assert code.mmio.released.all < code.mmio.lines.all
    assert code.pci.lines.all > 5 * code.mmio.lines.all


def test_surface_of_a_guest(vm: Machine, transport: qvis.Transport) -> None:
    """What QEMU's object tree and the guest itself know of, found again in the regions."""
    found = surface(vm, Objects.load(build_qemu().binary.parent))
    children = vm.qmp("qom-list", path="/machine/unattached")
    transports = sum(child["type"] == "child<virtio-mmio>" for child in children)
    empty, used, msi, vis = 4, 25, 8, 4
    mmio = found.areas["mmio"]
    assert mmio.regions == transports
    assert mmio.size == 0x200 * transports
    assert found.devices == 3
    assert found.areas["none"].registers == 0
    if transport is qvis.Transport.PCI:
        seen = vm.ssh.run("ls /sys/bus/pci/devices").stdout.split()
        pci = found.areas["pci"]
        assert found.functions == len(seen) == 1 + found.devices
        # ECAM; of each device MSI-X's table and bits, and virtio's four.
        assert pci.regions == 1 + 6 * found.devices
        assert mmio.registers == empty * transports
        assert pci.registers > 100 * found.devices
        assert pci.code.all > mmio.code.all
    else:
        each = used + (msi if transport.vector_per_queue else 0) + (vis if transport.storage else 0)
        assert "pci" not in found.areas
        assert found.functions == 0
        assert mmio.registers == each * found.devices + empty * (transports - found.devices)


def test_verb_prints_and_says_where_from(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    page = tmp_path / "footprint.html"
    done = cli("footprint", "--backend", "tcg", "--runs", "1", "--json", "--html", str(page))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["talk"]["linux"]["pci_lines"] == 78_237
    assert result["provenance"]["accelerator"].startswith("tcg")
    assert any("nothing about hardware" in note for note in result["notes"])
    assert set(result["boots"]) == set(result["surfaces"]) == {"pci", "intx", "msi", "vis"}
    for samples in result["boots"].values():
        assert len(samples) == 1
        assert samples[0]["boot_s"] > samples[0]["kernel_s"] > 0
        assert samples[0]["qemu_pss_kib"] > samples[0]["guest_used_kib"] > 1024
    text = page.read_text()
    assert all(word in text for word in ("78,237", "nothing about hardware", "virtio-mmio"))
    assert "http" not in text  # nothing that a reader without a network would miss


def test_verb_refuses_no_runs(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("footprint", "--runs", "0")
    assert done.returncode == 2
    assert "--runs" in done.stderr
