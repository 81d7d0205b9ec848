# SPDX-License-Identifier: GPL-2.0-or-later
"""Pages: they say what is so, load nothing, and let no guest write markup."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from qvis.experiments.result import Evidence, Metric, Result, Row
from qvis.report.comparison import write_comparison_report
from qvis.report.figures import ticks
from qvis.report.page import Html, duration, h, number, share
from qvis.report.trace import write_trace_report
from qvis.trace.model import Cause
from qvis.trace.store import Trace

from ..trace.synthetic import events, make, provenance, store

VOID = {"meta"}
SVG = {"svg", "path", "line", "rect"}


class Page(HTMLParser):
    """A page's text by element, after a check that its elements nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.classes: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: set[str] = set()
        self.feed(self.raw)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in VOID:
            return
        self.open.append(tag)
        self.classes.append(dict(attrs).get("class") or "")
        self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        """What a reader sees."""
        return " ".join(self.texts["main"])


def trace_page(tmp_path: Path, trace: Trace) -> Page:
    write_trace_report(trace, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def comparison_page(tmp_path: Path, result: Result) -> Page:
    write_comparison_report(result, tmp_path / "report.html")
    return Page(tmp_path / "report.html")


def check_loads_nothing(page: Page) -> None:
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    # A link loads nothing until somebody follows it, and none leads out (see below).
    assert not page.attributes & {"src", "srcset", "data", "action", "background"}
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "url(" not in page.raw
    assert "@import" not in page.raw
    assert "://" not in page.raw


def check_sources(page: Page, line: str) -> None:
    figures = page.texts["figure"]
    assert len(figures) >= 3
    assert all(line in figure for figure in figures)


def comparison(**changes: object) -> Result:
    """Three transports, six runs each."""
    counted = Metric("accesses per interrupt", "accesses", "interrupt")
    boot = Metric("boot to SSH", "s", "boot")
    counts = {"pci": 1.0, "intx": 3.0, "msi": 1.0}
    starts = {"pci": 1.3, "intx": 1.5, "msi": 1.31}
    eoi = Row("LAPIC", "EOI", "write", Cause.EOI, 1200)
    line = (
        Row("blk0", "InterruptStatus", "read", Cause.STATUS, 1200),
        Row("blk0", "InterruptACK", "write", Cause.ACKNOWLEDGE, 1200),
    )
    whole = Result(
        metrics=(counted, boot),
        provenance={name: provenance(name) for name in counts},
        series={
            **{(counted.name, name): (count,) * 6 for name, count in counts.items()},
            **{(boot.name, n): tuple(s + i / 50 for i in range(6)) for n, s in starts.items()},
        },
        order=("pci", "intx", "msi") * 6,
        evidence=tuple(
            Evidence("interrupt", n, f"traces/{n}-1", 1200, (eoi, *line) if n == "intx" else (eoi,))
            for n in counts
        ),
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def test_headline_of_a_line(tmp_path: Path) -> None:
    page = trace_page(tmp_path, make(tmp_path / "trace", "intx"))
    assert page.texts["h1"] == [
        "900 interrupts of blk0; each cost 2 device accesses (1 interrupt status, 1 acknowledge) "
        "and 1 EOI"
    ]
    assert "100 interrupts of net0; each cost 2 device accesses" in page.text


def test_headline_of_vectors(tmp_path: Path) -> None:
    page = trace_page(tmp_path, make(tmp_path / "trace", "msi"))
    assert page.texts["h1"] == ["900 interrupts of blk0; each cost no device access and 1 EOI"]


def test_headline_when_they_differ(tmp_path: Path) -> None:
    frame = events("intx", 1000, kvm=False, queues=4)
    half = (pl.col("cause") == Cause.STATUS) & (pl.col("interrupt") % 2 == 0)
    some = (pl.col("cause") == Cause.STATUS) & (pl.col("interrupt") <= 10)
    line = provenance("intx")
    average = store(tmp_path / "half", frame.filter(~half.fill_null(False)), line)
    said = trace_page(tmp_path, average).texts["h1"][0]
    assert "one costs on average 1.56 device accesses (0.556 interrupt status" in said
    nearly = store(tmp_path / "some", frame.filter(~some.fill_null(False)), line)
    assert "all but 9 cost 2 device accesses" in trace_page(tmp_path, nearly).texts["h1"][0]


@pytest.mark.parametrize("transport", ["pci", "intx", "msi", "vis"])
def test_trace_page_under_tcg(tmp_path: Path, transport: str) -> None:
    trace = make(tmp_path / "trace", transport)
    page = trace_page(tmp_path, trace)
    check_loads_nothing(page)
    check_sources(page, trace.manifest.provenance.line())
    assert "times say nothing about hardware" in page.text
    without_note = page.text.replace("where nothing exits", "")
    assert not re.search(r"\bexit", without_note)


def test_tables(tmp_path: Path) -> None:
    page = trace_page(tmp_path, make(tmp_path / "trace", "intx", interrupts=2000))
    assert ["LAPIC", "EOI", "write", "EOI", "2,000", "24.8%"] in page.rows
    assert ["blk0", "InterruptStatus", "read", "interrupt status", "1,800", "22.3%"] in page.rows
    assert ["blk0", "line", "57", "1,800", "0", "0", "0", "1,800"] in page.rows
    blk0 = "1,800", "900", "940", "980", "980", "980"
    assert ["blk0", "delivery to EOI", "instructions", *blk0] in page.rows
    assert ["blk0", "each", "1,800", "1", "1", "1", "1"] in page.rows


def test_one_interrupt_step_by_step(tmp_path: Path) -> None:
    page = trace_page(tmp_path, make(tmp_path / "trace", "intx"))
    steps = [step for step in page.texts["li"] if "nstructions" not in step]
    first = next(i for i, step in enumerate(steps) if "asks for" in step)
    assert steps[first].startswith("0") and "blk0 asks for vector 43" in steps[first]
    assert "+340the kernel enters vm_interrupt" in steps[first + 2]
    assert "+420reads blk0.InterruptStatus · 0x1 · interrupt status" in steps[first + 3]
    assert "+460writes blk0.InterruptACK" in steps[first + 4]
    assert "the kernel enters ioapic_ack_level" in steps[first + 6]
    assert "+940writes LAPIC.EOI" in steps[first + 7]


def test_what_is_missing_stands_at_the_top(tmp_path: Path) -> None:
    trace = make(tmp_path / "trace", partial=("The buffer was full for 2 s.",), lost=12345)
    page = trace_page(tmp_path, trace)
    said = page.text.index("This is not all.")
    assert said < page.text.index("The buffer was full for 2 s.") < page.text.index("12,345 events")
    assert page.text.index("12,345 events") < page.text.index(page.texts["h1"][0])
    assert "This is not all" not in trace_page(tmp_path, make(tmp_path / "whole")).text


def test_kvm_has_exits(tmp_path: Path) -> None:
    page = trace_page(tmp_path, make(tmp_path / "trace", "pci", kvm=True))
    said = "900 interrupts of blk0; each cost no device exit and 1 EOI without an exit"
    assert page.texts["h1"] == [said]
    assert "say nothing about hardware" not in page.text
    assert any(row[1:2] == ["HLT"] and row[4] == "1,000" for row in page.rows if len(row) > 4)
    assert "TSC cycles" in page.text


def test_little_or_nothing_to_show(tmp_path: Path) -> None:
    empty = trace_page(tmp_path, make(tmp_path / "empty", interrupts=0))
    assert empty.texts["h1"] == ["Nothing was recorded"]
    one = trace_page(tmp_path, make(tmp_path / "one", interrupts=1))
    assert one.texts["h1"] == ["1 interrupt of blk0; it cost no device access and 1 EOI"]
    trace_page(tmp_path, make(tmp_path / "clockless", "intx", clock=False))
    frame = events("intx", 50, kvm=False, queues=4)
    bare = frame.with_columns(
        pl.lit(None).cast(frame.schema[name]).alias(name)
        for name in ("device", "register", "cause", "source", "irq", "interrupt", "vcpu")
    )
    page = trace_page(tmp_path, store(tmp_path / "bare", bare, provenance()))
    assert page.texts["h1"] == ["51 interrupts, none of a known device"]
    assert "100.0% of them have no known cause" in page.text
    own = pl.col("device").cast(pl.String) == "LAPIC"
    device = pl.when(own).then(pl.col("device")).alias("device")
    page = trace_page(
        tmp_path, store(tmp_path / "unknown", frame.with_columns(device), provenance())
    )
    assert page.texts["h1"][0].startswith("50 interrupts of unknown devices; each cost 2 device")
    many = frame.with_columns((pl.col("interrupt") % 40).cast(pl.UInt16).alias("vcpu"))
    page = trace_page(tmp_path, store(tmp_path / "many", many, provenance(smp=40)))
    assert "16 less busy lanes are left out." in page.text


def test_names_of_guests_are_text(tmp_path: Path) -> None:
    bad = '<script>alert("&amp;")</script><b>\'"'
    frame = events("intx", 40, kvm=False, queues=4)
    frame = frame.with_columns(
        pl.when(pl.col(name).is_not_null()).then(pl.lit(bad)).cast(frame.schema[name]).alias(name)
        for name in ("device", "register", "source", "function", "reason")
    )
    trace = store(tmp_path / "trace", frame, provenance(host=bad, qemu=bad))
    manifest = dataclasses.replace(trace.manifest, machine=bad, command=bad, partial=(bad,))
    page = trace_page(tmp_path, dataclasses.replace(trace, manifest=manifest))
    assert "script" not in page.tags
    assert bad in page.text
    assert bad in page.texts["h1"][0]
    check_loads_nothing(page)

    sources = {name: provenance(name, host=bad) for name in ("pci", "intx", "msi")}
    rows = (Row(bad, bad, bad, Cause.OTHER, 1),)
    evidence = (Evidence("interrupt", "pci", bad, 1, rows),)
    other = comparison_page(tmp_path, comparison(provenance=sources, evidence=evidence))
    assert "script" not in other.tags
    assert bad in other.text


def test_size_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    sizes = []
    for interrupts in (5000, 50_000):
        trace = make(tmp_path / f"{interrupts}", "intx", interrupts=interrupts)
        sizes.append(len(trace_page(tmp_path, trace).raw))
    assert sizes[1] < 1.3 * sizes[0] < 300_000


def test_comparison(tmp_path: Path) -> None:
    page = comparison_page(tmp_path, comparison())
    check_loads_nothing(page)
    line = provenance("pci, intx, msi").line()
    check_sources(page, line)
    assert page.texts["h1"] == ["Per interrupt: 1 access over pci, 3 over intx and 1 over msi"]
    assert ["accesses", "1in every run", "3in every run", "1in every run"] in page.rows
    times = [row for row in page.rows if row[0] == "boot to SSH, s"]
    assert times[0][1:] == ["1.351.30 to 1.40", "1.551.50 to 1.60", "1.361.31 to 1.41"]
    assert "times say nothing about hardware" in page.text
    assert not re.search(r"\bexit", page.text.replace("where nothing exits", ""))


def test_comparison_of_five_transports(tmp_path: Path) -> None:
    names = ("pci", "intx", "msi", "vis", "vis-doorbell")
    counted = Metric("accesses per mask", "accesses", "mask")
    counts = dict(zip(names, (2.0, 3.0, 1.0, 0.0, 0.0), strict=True))
    page = comparison_page(
        tmp_path,
        comparison(
            metrics=(counted,),
            provenance={name: provenance(name) for name in names},
            series={(counted.name, name): (count,) * 6 for name, count in counts.items()},
            order=names * 6,
            evidence=tuple(Evidence("mask", n, f"traces/{n}", 50, ()) for n in names),
        ),
    )
    assert page.texts["h1"] == [
        "Per mask: 2 accesses over pci, 3 over intx, 1 over msi, 0 over vis and 0 over vis-doorbell"
    ]
    assert ["", *names] in page.rows
    assert ["accesses", *(f"{count:.0f}in every run" for count in counts.values())] in page.rows
    assert page.raw.count('class="n best"') == 2  # both that touch nothing
    assert page.text.count("No register was touched.") == 5
    assert 'style="--n:5"' in page.raw


def test_comparison_tells_chance(tmp_path: Path) -> None:
    page = comparison_page(tmp_path, comparison())
    told = {(row[1], row[2]): row[3:] for row in page.rows if len(row) == 7 and "against" in row[1]}
    sure = "more in every run: large effect, unlikely to be chance"
    assert told["intx against pci", sure] == ["+0.200", "1.15", "0.0022", "+1"]
    assert told["msi against pci", "no difference"] == ["0", "1", "1.0000", "0"]
    unsure = "more: small effect, could be chance"
    assert told["msi against pci", unsure][3] == "+0.170"
    fewer = {key: runs[:3] for key, runs in comparison().series.items()}
    page = comparison_page(tmp_path, comparison(series=fewer))
    assert "more in every run: large effect, too few runs to test" in page.text


def test_comparison_shows_its_evidence(tmp_path: Path) -> None:
    page = comparison_page(tmp_path, comparison())
    proof = page.texts["details"][0]
    assert "6 runs: 3, 3, 3, 3, 3, 3" in proof
    assert "1,200 operations in trace traces/intx-1" in proof
    assert ["blk0.InterruptStatus read", "interrupt status", "1,200"] in page.rows
    runs = page.texts["details"][1]
    assert "6 runs: 1.50, 1.52, 1.54, 1.56, 1.58, 1.60" in runs
    assert page.raw.count("<u ") == 3  # a median for each transport that was timed
    assert len(re.findall(r'<i style="--c:var\(--s\d\)', page.raw)) == 18  # each run a dot


def test_comparison_under_kvm(tmp_path: Path) -> None:
    sources = {name: provenance(name, kvm=True) for name in ("pci", "intx", "msi")}
    page = comparison_page(tmp_path, comparison(provenance=sources))
    assert "Where the exits come from" in page.text
    assert "hardware" not in page.text


def test_comparison_of_almost_nothing(tmp_path: Path) -> None:
    empty = Result(metrics=(), provenance={}, series={}, order=())
    assert "Nothing was measured" in comparison_page(tmp_path, empty).texts["h1"][0]
    one = comparison(
        provenance={"msi": provenance("msi")},
        series={("boot to SSH", "msi"): (1.5,)},
        order=("msi",),
        evidence=(),
    )
    page = comparison_page(tmp_path, one)
    assert page.texts["h1"] == ["Per boot, boot to SSH: 1.50 s over msi"]


def test_markup() -> None:
    assert h("p", "a<b", h("b", "&"), class_="x", data_y='"') == (
        '<p class="x" data-y="&quot;">a&lt;b<b>&amp;</b></p>'
    )
    assert isinstance(h("p"), Html)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567, "1,234,567"), (1.5, "1.50"), (31.84, "31.8"), (2306.5, "2,306"),
     (133.25, "133.2"), (0.333333, "0.333"), (0.00012, "0.00012"), (-4.25, "-4.25"),
     (1e-9, "1e-09")],
)  # fmt: skip
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_units() -> None:
    assert [duration(ns) for ns in (0, 999, 1500, 2e6, 3.25e9)] == [
        "0 ns", "999 ns", "1.50 µs", "2 ms", "3.25 s"
    ]  # fmt: skip
    assert [share(s) for s in (0, 0.0001, 0.248, 1)] == ["0.0%", "<0.1%", "24.8%", "100.0%"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (5, 5, [5]),
     (1.34, 1.61, [1.4, 1.5, 1.6]), (0, 0.004, [0, 0.001, 0.002, 0.003, 0.004])],
)  # fmt: skip
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == expected
