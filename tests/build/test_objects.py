# SPDX-License-Identifier: GPL-2.0-or-later
"""What a program was linked from, in builds small enough to know, and in the real ones."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from qvis.build import build_linux, build_qemu
from qvis.build.git import git
from qvis.build.objects import (
    Lines,
    Objects,
    count_lines,
    linux_objects,
    qemu_objects,
    section_sizes,
)
from qvis.build.tree import BASE
from qvis.errors import BuildError

# A kernel of five objects, of which a library's last one is in no demand.
SOURCES = {
    "init/main.c": '#include "a.h"\n#include "part.c"\nint wanted(void);\n'
    "int start(void) { return wanted() + part(); }\n",
    "init/part.c": "/* included,\n   not compiled */\nstatic int part(void) { return 1; }\n",
    "init/version-timestamp.c": "int version;\n",
    "drivers/pci/pci.c": "int pci_find(void) { return 2; }\nstatic int pci_zero[1024];\n"
    "int *pci_where(void) { return pci_zero; }\n",
    "lib/wanted.c": '#include "a.h"\nint deeper(void);\nint wanted(void) { return deeper(); }\n',
    "lib/deeper.c": "int deeper(void) { return 3; }\n",
    "lib/unwanted.c": "int unwanted(void) { return 4; }\n",
    "include/a.h": "\n\n#define A 1\n",
    "Makefile": "drivers-$(CONFIG_ALL) += drivers/\n",
    "drivers/Makefile": "obj-y += \\\n\tpci/\n",
    "drivers/pci/Makefile": "ifdef CONFIG_PCI\nobj-$(CONFIG_PCI_MORE) += whole.o\nendif\n"
    "whole-y := pci.o # more\n",
}
ALWAYS = ("init/main", "drivers/pci/pci")
LIBRARY = ("lib/unwanted", "lib/deeper", "lib/wanted")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The sources as a tree of ours: a series on top of a base."""
    tree = tmp_path / "src"
    for name, text in SOURCES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    main = tree / "init" / "main.c"
    ours = main.read_text()
    main.write_text("int before;\n")
    for words in (
        ["init", "--quiet"],
        ["add", "--all", ":!lib/deeper.c"],
        ["commit", "--quiet", "--message", "base"],
        ["tag", BASE],
    ):
        git(tree, *words, stage="test")
    main.write_text(ours)
    git(tree, "add", "--all", stage="test")
    git(tree, "commit", "--quiet", "--message", "series", stage="test")
    return tree


@pytest.fixture
def kernel(source: Path, tmp_path: Path) -> Path:
    """A build folder as make leaves it."""
    build = tmp_path / "build"
    for name in (*ALWAYS, *LIBRARY, "init/version-timestamp"):
        made = build / f"{name}.o"
        made.parent.mkdir(parents=True, exist_ok=True)
        compile_c(build, source / f"{name}.c", f"{name}.o", "-I", source / "include")
        listed = (build / "deps").read_text().replace("\\\n", " ").split()[1:]
        (made.parent / f".{made.name}.cmd").write_text(
            f"savedcmd_{name}.o := gcc\n\nsource_{name}.o := {listed[0]}\n\ndeps_{name}.o := \\\n"
            f"    $(wildcard include/config/A) \\\n"
            + "".join(f"  {word} \\\n" for word in listed[1:])
            + f"\n{name}.o: $(deps_{name}.o)\n"
        )
    archive(build, "vmlinux.a", ALWAYS)
    archive(build, "lib/lib.a", LIBRARY)
    (build / ".vmlinux.o.cmd").write_text(
        "savedcmd_vmlinux.o := ld -r -o vmlinux.o --whole-archive vmlinux.a --no-whole-archive "
        "--start-group lib/lib.a --end-group \n"
    )
    return build


def compile_c(build: Path, file: Path, out: str, *more: str | os.PathLike[str]) -> None:
    subprocess.run(
        ["gcc", "-O1", "-fno-pie", "-c", file, "-o", out, "-MD", "-MF", "deps", *more],
        cwd=build, check=True, timeout=60,
    )  # fmt: skip


def archive(build: Path, name: str, members: tuple[str, ...]) -> None:
    words = ["ar", "cDPrST", name, *(f"./{member}.o" for member in members)]
    subprocess.run(words, cwd=build, check=True, timeout=60)


def test_linker_takes_of_a_library_what_is_in_demand(kernel: Path, source: Path) -> None:
    objects = linux_objects(kernel, source).objects
    assert [one.path for one in objects[:3]] == [
        "init/main.o", "drivers/pci/pci.o", "init/version-timestamp.o",
    ]  # fmt: skip
    # deeper.o stands before wanted.o, which alone asks for it.
    assert {one.path for one in objects[3:]} == {"lib/wanted.o", "lib/deeper.o"}


def test_sources_headers_and_sizes_of_an_object(kernel: Path, source: Path) -> None:
    found = linux_objects(kernel, source)
    by_path = {one.path: one for one in found.objects}
    main, pci = by_path["init/main.o"], by_path["drivers/pci/pci.o"]
    assert main.source == "init/main.c"
    assert main.sources == ("init/main.c", "init/part.c")
    assert main.headers == ("include/a.h",)
    assert main.needs == ("wanted",)
    assert set(main.functions) >= {"start"}
    assert pci.sizes.bss == 4096
    assert 0 < pci.sizes.text < 100
    assert pci.sizes == section_sizes(kernel / "drivers/pci/pci.o")
    assert found.files["init/part.c"].lines == Lines(3, 1)
    assert found.files["include/a.h"].lines == Lines(3, 1)


def test_makefiles_say_what_an_object_depends_on(kernel: Path, source: Path) -> None:
    options = {one.path: one.options for one in linux_objects(kernel, source).objects}
    assert options["drivers/pci/pci.o"] == ("CONFIG_ALL", "CONFIG_PCI", "CONFIG_PCI_MORE")
    assert options["init/main.o"] == ()


def test_lines_before_the_series(kernel: Path, source: Path) -> None:
    files = linux_objects(kernel, source).files
    assert files["init/main.c"].released == Lines(1, 1)
    assert files["init/main.c"].lines == Lines(4, 4)
    assert files["lib/deeper.c"].released == Lines(0, 0)
    assert files["lib/wanted.c"].released == files["lib/wanted.c"].lines


def test_objects_of_ninja(source: Path, tmp_path: Path) -> None:
    build = tmp_path / "ninja"
    build.mkdir()
    (build / "made.c").write_text("int made;\n")
    (build / "qemu.syms").write_text("-Wl,-u,unwanted\n")
    compiled = {
        "libx.a.p/wanted.c.o": "../src/lib/wanted.c",
        "libx.a.p/deeper.c.o": "../src/lib/deeper.c",
        "libx.a.p/unwanted.c.o": "../src/lib/unwanted.c",
        "libx.a.p/pci.c.o": "../src/drivers/pci/pci.c",
        "prog.p/main.c.o": "../src/init/main.c",
        "prog.p/made.c.o": "made.c",
    }
    rules = (
        "rule c_COMPILER\n command = gcc -O1 -I../src/include -MD -MF $out.d -c $in -o $out\n"
        " deps = gcc\n depfile = $out.d\n"
        "rule STATIC_LINKER\n command = ar csrDT $out $in\n"
        "rule c_LINKER\n command = gcc -r -nostdlib -o $out $in\n"
    )
    edges = "".join(f"build {out}: c_COMPILER {file}\n" for out, file in compiled.items())
    members = " ".join(name for name in compiled if name.startswith("libx"))
    link = (
        f"build libx.a: STATIC_LINKER {members}\n"
        "build prog: c_LINKER prog.p/main.c.o prog.p/made.c.o | libx.a || qemu.syms\n"
        " LINK_ARGS = -Wl,--start-group libx.a @qemu.syms -Wl,--end-group\n"
    )
    (build / "build.ninja").write_text(rules + edges + link)
    subprocess.run(["ninja"], cwd=build, check=True, capture_output=True, timeout=60)
    found = qemu_objects(build, source, "prog")
    # Also what nobody asks for but the command line; nobody wants PCI.
    assert {one.path for one in found.objects} == compiled.keys() - {"libx.a.p/pci.c.o"}
    by_source = {one.source: one for one in found.objects}
    assert by_source["build:made.c"].headers == ()
    assert by_source["init/main.c"].sources == ("init/main.c", "init/part.c")
    with pytest.raises(BuildError, match="does not make"):
        qemu_objects(build, source, "another")


def test_comes_back_from_disk_as_it_was(kernel: Path, source: Path, tmp_path: Path) -> None:
    objects = linux_objects(kernel, source)
    objects.save(tmp_path)
    assert Objects.load(tmp_path) == objects


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is missing"),
        ("", "is damaged"),
        ('{"shape": 1, "files": [["a.c", 1]], "objects": []}', "is damaged"),
        ('{"shape": 1, "files": [], "objects": [{"path": "a.o"}]}', "is damaged"),
        ('{"shape": 0}', "of another qvis"),
    ],
)
def test_record_that_is_no_good(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "objects.json").write_text(text)
    with pytest.raises(BuildError, match=said):
        Objects.load(tmp_path)


@pytest.mark.parametrize(
    "name", [".vmlinux.o.cmd", "init/.main.o.cmd", "init/main.o", "vmlinux.a"]
)  # fmt: skip
def test_build_that_is_not_whole(kernel: Path, source: Path, name: str) -> None:
    (kernel / name).unlink()
    with pytest.raises(BuildError):
        linux_objects(kernel, source)


def test_object_that_is_none(kernel: Path, source: Path) -> None:
    (kernel / "lib/deeper.o").write_text("half")
    with pytest.raises(BuildError, match="is no object"):
        linux_objects(kernel, source)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", Lines(0, 0)),
        ("int a;", Lines(1, 1)),
        ("\n \nint a;\n", Lines(3, 1)),
        ("/* a\n * b\n */\nint a; /* c */\n", Lines(4, 1)),
        ("int a; /* b\n c */ int d;\n/* e */ // f\n", Lines(3, 2)),
        ('char *a = "/*";\nint b;\nchar *c = "*/";\n', Lines(3, 3)),
        ("char a = '\"';\n// it's \" not\nint b;\n", Lines(3, 2)),
        ('char *a = "b\\\n// c";\n', Lines(2, 2)),
        ("// a \\\nstill a\nint b;\n", Lines(3, 1)),
        ("#define A \\\n\t1\n", Lines(2, 2)),
    ],
)
def test_lines_of_c(text: str, lines: Lines) -> None:
    assert count_lines(text) == lines


REAL: dict[str, Callable[[], Path]] = {
    "linux": lambda: build_linux().vmlinux,
    "qemu": lambda: build_qemu().binary,
}


@pytest.mark.parametrize("component", REAL)
def test_real_build_is_what_the_program_says(component: str) -> None:
    """The program's symbols name each C file that it was linked from, libraries' too."""
    program = REAL[component]()
    objects = Objects.load(program.parent).objects
    with program.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        symbols = list(table.iter_symbols())
    named = Counter(one.name for one in symbols if one["st_info"]["type"] == "STT_FILE")
    ours = Counter(Path(one.source).name for one in objects)
    # Assembler leaves no name or the object's; the C library's start has none of our sources.
    foreign = {name for name in named if not name.endswith(".c")} | {"crtstuff.c"}
    differ = {name for name in named | ours if named[name] != ours[name]}
    # meson gives this one a path that the compiler keeps.
    assert not {name for name in differ - foreign if not name.endswith((".S", "gdbstub-xml.c"))}

    functions = sum(one["st_size"] for one in symbols if one["st_info"]["type"] == "STT_FUNC")
    assert sum(sum(one.functions.values()) for one in objects) == pytest.approx(functions, rel=0.01)
    loaded = section_sizes(program)
    text = sum(one.sizes.text for one in objects)
    # The kernel's text is aligned to 2 MiB at three places.
    slack = 3 << 21 if component == "linux" else loaded.text // 50
    assert 0 <= loaded.text - text <= slack


@pytest.mark.parametrize(
    ("component", "compiled", "not_compiled"),
    [
        ("linux", ["drivers/virtio/virtio_mmio.c", "drivers/pci/probe.c", "lib/vsprintf.c"],
         ["drivers/pci/pcie/aer.c", "drivers/pci/hotplug/pciehp_core.c", "lib/test_printf.c"]),
        ("qemu", ["hw/virtio/virtio-mmio.c", "hw/pci/pci.c", "util/cutils.c"],
         ["hw/pci/pci-stub.c", "hw/pci-host/i440fx.c", "hw/arm/virt.c", "qemu-img.c"]),
    ],
)  # fmt: skip
def test_real_build_has_what_is_on_and_nothing_else(
    component: str, compiled: list[str], not_compiled: list[str]
) -> None:
    program = REAL[component]()
    sources = {name for one in Objects.load(program.parent).objects for name in one.sources}
    assert sources.issuperset(compiled)
    assert sources.isdisjoint(not_compiled)
